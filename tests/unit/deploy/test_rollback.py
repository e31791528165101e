"""A rollback beside a gateway that follows the alias at that very moment."""

# Generated stubs of gRPC have no types, and a servicer need not answer every call.
# pyright: reportUnknownMemberType=false, reportAbstractUsage=false

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from deploy.stages.errors import NotRunningError
from deploy.stages.journal import Journal, Promotion
from deploy.stages.rollback import rollback
from deploy.stages.settings import Connection, Stage, load_stage
from deploy.stages.work import Work
from manylora.admin.v1 import admin_pb2, admin_pb2_grpc
from manylora.inference.v1 import inference_pb2, inference_pb2_grpc
from manylora_registry import Registry, Version
from tests.integration.deploy.stage_files import write_stage
from tests.unit.gateway.in_process import publish


class Following(admin_pb2_grpc.AdminServiceServicer, inference_pb2_grpc.InferenceServiceServicer):
    """Serves nothing at first and the first version from the third look on: no other will load."""

    def __init__(self, first: Version) -> None:
        self._first, self._looks = first, 0

    def ListAdapters(  # noqa: N802 - the protocol's word
        self, request: inference_pb2.ListAdaptersRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListAdaptersResponse:
        del request, context
        self._looks += 1
        alias = inference_pb2.AliasListing(alias="production")
        if self._looks > 2:
            alias.serving.name, alias.serving.number = self._first.name, self._first.number
            alias.serving.digest = self._first.digest
        listing = inference_pb2.AdapterListing(name=self._first.name, aliases=[alias])
        return inference_pb2.ListAdaptersResponse(adapters=[listing])

    def GetRollout(  # noqa: N802
        self, request: admin_pb2.GetRolloutRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetRolloutResponse:
        del request, context
        share = admin_pb2.VersionShare(percent=100)
        share.version.number = self._first.number
        return admin_pb2.GetRolloutResponse(rollout=admin_pb2.Rollout(shares=[share]))

    def SetRollout(  # noqa: N802
        self, request: admin_pb2.SetRolloutRequest, context: grpc.ServicerContext
    ) -> admin_pb2.SetRolloutResponse:
        del request, context
        return admin_pb2.SetRolloutResponse()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Production points at the second version, and pointed at the first before."""
    with Registry.open(tmp_path / "registry") as opened:
        for number in (1, 2):
            publish(opened, tmp_path, "red", number)
            opened.set_alias("red", "production", number)
        yield opened


@pytest.fixture
def gateway(registry: Registry) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = Following(registry.find("red@1"))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def stage(gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("MANYLORA_STAGES", str(tmp_path))
    connect = {"inference": gateway, "admin": gateway}
    write_stage(
        tmp_path / "production",
        base=tmp_path,
        registry=tmp_path / "registry",
        connect=connect,
        start_timeout_s=1,
    )
    return load_stage("production")


def test_what_a_gateway_follows_meanwhile_is_no_division(stage: Stage, registry: Registry) -> None:
    outcome = rollback(stage, "red", None, Work([].append))

    assert outcome.text == "production serves red@1 again"
    assert registry.aliases("red")["production"].version == 1


@pytest.fixture
def away(stage: Stage) -> Stage:
    """Its gateway is where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"127.0.0.1:{closed.getsockname()[1]}"
    connect = Connection(inference=nowhere, admin=nowhere)
    return replace(stage, config=stage.config.model_copy(update={"connect": connect}))


def test_a_gateway_that_is_not_reached_keeps_no_alias_from_going_back(
    away: Stage, registry: Registry
) -> None:
    said = list[str]()
    outcome = rollback(away, "red", None, Work(said.append))

    assert outcome.text == "production will serve, once its gateway is back, red@1 again"
    assert registry.aliases("red")["production"].version == 1
    assert "no manylora server answers at" in said[0]


def test_a_promotion_whose_gateway_is_not_reached_waits_for_it(
    away: Stage, registry: Registry
) -> None:
    begun = Promotion("attempt", 1, registry.find("red@1").digest, "staging", 2, 2)
    Journal(away, "red").write(begun)

    with pytest.raises(NotRunningError, match="the gateway of production is away"):
        rollback(away, "red", None, Work([].append))

    assert registry.aliases("red")["production"].version == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_unless_it_is_told_where_the_alias_goes_which_ends_every_share(
    away: Stage, registry: Registry, damaged: bool
) -> None:
    begun = Promotion("attempt", 1, registry.find("red@1").digest, "staging", 2, 2)
    journal = Journal(away, "red")
    journal.write(begun)
    if damaged:
        (away.state / "promotions/red.json").write_text("{")

    with pytest.raises(NotRunningError, match=r"is away: bring it back first, .* by --to"):
        rollback(away, "red", "2", Work([].append))
    assert registry.aliases("red")["production"].version == 2

    outcome = rollback(away, "red", "1", Work([].append))

    assert outcome.text == "production will serve, once its gateway is back, red@1 again"
    assert registry.aliases("red")["production"].version == 1
    assert journal.read() is None


def test_a_full_disk_keeps_nobody_from_going_back(stage: Stage, registry: Registry) -> None:
    kept, said = stage.state / "promotions", list[str]()
    kept.mkdir(parents=True)
    holder = kept / "red.holder"
    holder.write_text(json.dumps({"pid": 1, "action": "promote"}))
    for file in ("red.holder", "red.json"):
        # What is written here before it gets its name finds no room.
        (kept / f"{file}.{os.getpid()}.new").symlink_to("/dev/full")

    outcome = rollback(stage, "red", None, Work(said.append))

    assert outcome.text == "production serves red@1 again"
    assert registry.aliases("red")["production"].version == 1
    told = "red.json cannot be written (No space left on device): going back all the same"
    assert any(line.endswith(told) for line in said)
    assert not holder.exists(), "it names a process that may be anybody's by now"
