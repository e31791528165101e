"""A canary at a gateway that is away for a while."""

# Generated stubs of gRPC have no types, and a servicer need not answer every call.
# pyright: reportUnknownMemberType=false, reportAbstractUsage=false

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from deploy.stages.errors import MovedError
from deploy.stages.gate_settings import Canary
from deploy.stages.hosting import Running
from deploy.stages.journal import Journal, Promotion
from deploy.stages.operator import Operator
from deploy.stages.settings import load_stage
from deploy.stages.taking_over import Place, take_over
from deploy.stages.work import Work
from manylora.admin.v1 import admin_pb2, admin_pb2_grpc
from manylora_registry import Registry
from tests.integration.deploy.stage_files import write_stage
from tests.unit.gateway.in_process import publish


class Away(admin_pb2_grpc.AdminServiceServicer):
    """Is not there for three looks, then divides as nobody asked for."""

    looks = 0

    def GetRollout(  # noqa: N802 - the protocol's word
        self, request: admin_pb2.GetRolloutRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetRolloutResponse:
        self.looks += 1
        if self.looks <= 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"away for look {self.looks}")
        share = admin_pb2.VersionShare(percent=100)
        share.version.number = 7
        return admin_pb2.GetRolloutResponse(rollout=admin_pb2.Rollout(shares=[share]))


@pytest.fixture
def gateway() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Away(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_that_a_gateway_is_waited_for_is_said_once(
    gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYLORA_STAGES", str(tmp_path))
    write_stage(tmp_path / "production", base=tmp_path, registry=tmp_path / "registry")
    stage, running, said = load_stage("production"), Running(None, gateway, gateway), list[str]()
    with Registry.open(tmp_path / "registry") as registry, Operator(running, None) as operator:
        _, version = (publish(registry, tmp_path, "red", seed) for seed in (1, 2))
        promotion = Promotion("attempt", version.number, version.digest, "staging", 1, 1)
        place = Place(registry, stage, running, operator, Journal(stage, "red"), version, 1)
        with pytest.raises(MovedError, match="version 7 100 %"):
            take_over(place, Canary(look_s=0.01), promotion, Work(said.append))

    (waiting,) = said
    assert waiting.startswith("waiting: ")
    assert "away for look 1" in waiting
