"""Dividing requests among versions, copies to a shadow, and going back at once."""

import asyncio
import json
import shutil
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora_registry import Cache, Registry, Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.in_process import (
    OTHER_BASE,
    RunningGateway,
    publish,
    running_gateway,
)
from tests.unit.gateway.test_errors import detail, refused, told


async def ask(gateway: RunningGateway, session: str, reference: str = "red") -> int:
    """The version that answers."""
    reply = await gateway.inference.Generate(
        pb.GenerateRequest(adapter=reference, text="hi"),
        metadata=(("manylora-session", session),),
    )
    return reply.adapter.number


async def divide(
    gateway: RunningGateway,
    *shares: tuple[int, int],
    shadow: tuple[int, int] | None = None,
    adapter: str = "red",
) -> admin_pb2.Rollout:
    request = admin_pb2.SetRolloutRequest(
        adapter=adapter,
        shares=[
            admin_pb2.RolloutShare(version=version, percent=percent) for version, percent in shares
        ],
    )
    if shadow is not None:
        request.shadow.version, request.shadow.percent = shadow
    return (await gateway.admin.SetRollout(request)).rollout


async def told_of(gateway: RunningGateway) -> admin_pb2.Rollout:
    return (await gateway.admin.GetRollout(admin_pb2.GetRolloutRequest(adapter="red"))).rollout


async def test_requests_are_divided_and_sessions_stick(
    gateway: RunningGateway, published: Publish
) -> None:
    new = published("red", 5)
    rollout = await divide(gateway, (2, 10), (1, 90))
    assert new.engine_name in gateway.engine.loaded
    assert rollout.durable
    sessions = [f"session-{index}" for index in range(300)]
    first = {session: await ask(gateway, session) for session in sessions}
    counts = Counter(first.values())
    assert 10 <= counts[2] <= 60
    assert {session: await ask(gateway, session) for session in sessions[:40]} == {
        session: first[session] for session in sessions[:40]
    }
    # Who had the new version keeps it as its share grows.
    await divide(gateway, (2, 50), (1, 50))
    for session in sessions:
        if first[session] == 2:
            assert await ask(gateway, session) == 2
    report = await told_of(gateway)
    assert [(share.version.number, share.percent) for share in report.shares] == [(2, 50), (1, 50)]
    figures = {share.version.number: share.figures for share in report.shares}
    assert figures[1].requests + figures[2].requests == 340 + counts[2]
    # Those without a session are divided by what they ask.
    versions: set[int] = set()
    for index in range(20):
        asked = pb.GenerateRequest(adapter="red", text=f"hi {index}")
        replies = [await gateway.inference.Generate(asked) for _ in range(2)]
        (number,) = {reply.adapter.number for reply in replies}
        versions.add(number)
    assert versions == {1, 2}
    assert figures[2].errors == 0
    assert figures[2].tokens == 4 * figures[2].requests
    assert 0 < figures[2].ttft_p50_s <= figures[2].ttft_p95_s


async def test_clearing_sends_everybody_back_at_once(
    gateway: RunningGateway, published: Publish
) -> None:
    new = published("red", 5)
    await divide(gateway, (2, 100))
    assert await ask(gateway, "any") == 2
    cleared = await divide(gateway)
    assert [(share.version.number, share.percent) for share in cleared.shares] == [(1, 100)]
    assert await ask(gateway, "any") == 1
    await gateway.engine.until_gone(new.engine_name)


async def test_moving_the_alias_ends_the_rollout(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    published("red", 5)
    await divide(gateway, (2, 10), (1, 90))
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)
    assert {await ask(gateway, f"session-{index}") for index in range(20)} == {2}
    await gateway.engine.until_gone(served["red"].engine_name)


class Broken(Registry):
    """One that fails as nobody expects."""

    broken = False

    def hold(self, version: Version, cache: Cache) -> AbstractContextManager[Path]:
        if self.broken and version.number == 2:
            raise RuntimeError("as nobody expects")
        return super().hold(version, cache)


async def test_a_rollout_that_cannot_be_set_at_a_start_is_set_at_the_next(tmp_path: Path) -> None:
    with Broken.open(tmp_path / "registry") as registry:
        for seed in range(3):
            publish(registry, tmp_path, "red", seed)
        for name, seed in (("green", 5), ("green", 6), ("green", 7)):
            publish(registry, tmp_path, name, seed)
        for name in ("red", "green"):
            registry.set_alias(name, "production", 1)
        async with running_gateway(registry, tmp_path) as gateway:
            await divide(gateway, (2, 100))
            await divide(gateway, (3, 100), adapter="green")
        registry.broken = True
        async with running_gateway(registry, tmp_path) as gateway:
            assert await ask(gateway, "", "green") == 3
            assert await ask(gateway, "", "red") == 1
            await divide(gateway, adapter="green")
        registry.broken = False
        async with running_gateway(registry, tmp_path) as gateway:
            assert await ask(gateway, "", "green") == 1
            assert await ask(gateway, "", "red") == 2
            registry.set_alias("red", "production", 3)
            await gateway.until_serving("red@production", 3)
        registry.set_alias("red", "production", 1)
        async with running_gateway(registry, tmp_path) as gateway:
            assert await ask(gateway, "", "red") == 1


async def test_a_rollout_survives_a_restart_and_not_a_move(
    served: dict[str, Version], registry: Registry, published: Publish, start: Start
) -> None:
    published("red", 5)
    async with start() as gateway:
        await divide(gateway, (2, 100), shadow=(1, 5))
    async with start() as gateway:
        assert await ask(gateway, "any") == 2
        assert (await told_of(gateway)).shadow.version.number == 1
    registry.set_alias("red", "production", 2)
    registry.set_alias("red", "production", 1)
    registry.set_alias("red", "production", 2)
    async with start() as gateway:
        assert (await told_of(gateway)).shares[0].percent == 100
        assert not (await told_of(gateway)).HasField("shadow")


def stored(directory: Path) -> dict[Path, bytes]:
    """The weights in a registry."""
    files = {blob: blob.read_bytes() for blob in directory.glob("registry/blobs/sha256/*/*")}
    return {blob: content for blob, content in files.items() if b"lora_A" in content}


@pytest.fixture
async def fallen_back(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    tmp_path: Path,
) -> AsyncGenerator[tuple[RunningGateway, Callable[[], None]], None]:
    """A gateway whose alias serves 1, as 2 is damaged, with a saved rollout; and what mends 2."""
    others = stored(tmp_path)
    for seed in (5, 6):
        published("red", seed)
    registry.set_alias("red", "production", 2)
    async with start() as gateway:
        await divide(gateway, (3, 50), (2, 50))
    blobs = stored(tmp_path)

    def write(change: int) -> None:
        for blob in blobs.keys() - others.keys():
            blob.write_bytes(blobs[blob][:-1] + bytes([blobs[blob][-1] ^ change]))

    write(1)
    shutil.rmtree(tmp_path / "cache")
    async with start() as gateway:
        await gateway.until_serving("red@production", 1)
        assert await shares_of(gateway) == [1]
        yield gateway, lambda: write(0)


async def shares_of(gateway: RunningGateway) -> list[int]:
    return [share.version.number for share in (await told_of(gateway)).shares]


async def test_a_saved_rollout_goes_on_when_its_alias_serves_its_version_again(
    fallen_back: tuple[RunningGateway, Callable[[], None]],
) -> None:
    gateway, mend = fallen_back
    mend()
    async with asyncio.timeout(60):
        while await shares_of(gateway) != [3, 2]:
            pass
    assert {await ask(gateway, f"session-{index}") for index in range(20)} == {2, 3}


@pytest.mark.parametrize("change", ["moved", "cleared", "withdrawn"])
async def test_a_saved_rollout_that_cannot_be_set_yet_ends_like_any_other(
    fallen_back: tuple[RunningGateway, Callable[[], None]],
    registry: Registry,
    tmp_path: Path,
    change: str,
) -> None:
    gateway, mend = fallen_back
    saved = tmp_path / "state/rollouts.json"
    assert json.loads(saved.read_text())["rollouts"]
    if change == "moved":
        registry.set_alias("red", "production", 1)
    elif change == "cleared":
        await divide(gateway)
    else:
        registry.yank("red@3")
    async with asyncio.timeout(60):
        while json.loads(saved.read_text())["rollouts"]:
            await shares_of(gateway)
    mend()
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)
    assert await shares_of(gateway) == [2]


async def test_a_rollout_is_cleared_where_nothing_can_be_served(
    served: dict[str, Version],
    published: Publish,
    start: Start,
    tmp_path: Path,
) -> None:
    published("red", 5)
    async with start() as gateway:
        await divide(gateway, (2, 50), (1, 50))
    cache, blobs = tmp_path / "cache", tmp_path / "registry/blobs"
    shutil.rmtree(cache)
    blobs.rename(blobs.with_name("away"))
    saved = tmp_path / "state/rollouts.json"
    async with start() as gateway:
        entry = await gateway.until_failed("red@production")
        assert not entry.HasField("serving")
        assert json.loads(saved.read_text())["rollouts"]
        cleared = await divide(gateway)
        assert (list(cleared.shares), cleared.HasField("shadow")) == ([], False)
        assert json.loads(saved.read_text())["rollouts"] == []
        status = await refused(divide(gateway, adapter="nobody"))
        assert told(status)[0] == "NOT_FOUND"


async def test_a_saved_rollout_is_over_when_a_version_it_needs_was_yanked_meanwhile(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    tmp_path: Path,
) -> None:
    published("red", 5)
    async with start() as gateway:
        await divide(gateway, (2, 50), (1, 50))
    registry.yank("red@2")
    async with start() as gateway:
        assert await shares_of(gateway) == [1]
        assert json.loads((tmp_path / "state/rollouts.json").read_text())["rollouts"] == []


async def test_a_version_that_cannot_be_loaded_takes_no_share(
    gateway: RunningGateway, published: Publish
) -> None:
    refused_version = published("red", 5)
    published("red", 6, base=OTHER_BASE)
    gateway.engine.refused.add(refused_version.engine_name)
    for version in (2, 3, 9):
        with pytest.raises(grpc.aio.AioRpcError):
            await divide(gateway, (version, 50), (1, 50))
        assert await ask(gateway, "any") == 1
        assert [share.percent for share in (await told_of(gateway)).shares] == [100]


async def test_a_version_that_is_withdrawn_while_it_loads_takes_no_share(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    gateway.engine.hold_loads()
    already = len(gateway.engine.loads)
    dividing = asyncio.create_task(divide(gateway, (2, 100)))
    await gateway.engine.until_loads(already + 1)
    registry.yank("red@2")
    # Events come in order: once this one is told, the withdrawal was seen too.
    registry.yank("green@1")
    await gateway.until_failed("green@production")
    gateway.engine.let_load()
    with pytest.raises(grpc.aio.AioRpcError, match="yanked"):
        await dividing
    assert await ask(gateway, "any") == 1


async def test_a_version_that_is_no_number_is_named(gateway: RunningGateway) -> None:
    request = admin_pb2.SetRolloutRequest(
        adapter="red",
        shares=[admin_pb2.RolloutShare(percent=100)],
        shadow=admin_pb2.RolloutShadow(percent=5),
    )
    status = await refused(gateway.admin.SetRollout(request))
    violations = detail(status, error_details_pb2.BadRequest).field_violations
    assert [one.field for one in violations] == ["shares[0].version", "shadow.version"]


async def test_shares_that_are_no_division_are_refused(gateway: RunningGateway) -> None:
    for shares in ([(1, 90)], [(1, 50), (1, 50)], [(1, 0), (1, 100)]):
        request = admin_pb2.SetRolloutRequest(
            adapter="red",
            shares=[admin_pb2.RolloutShare(version=v, percent=p) for v, p in shares],
        )
        assert told(await refused(gateway.admin.SetRollout(request)))[0] == "INVALID_ARGUMENT"
    request = admin_pb2.GetRolloutRequest(adapter="red@1")
    assert told(await refused(gateway.admin.GetRollout(request)))[0] == "INVALID_ARGUMENT"
    for adapter, alias in (("../red", ""), ("red", "../production"), ("red", "1")):
        read = admin_pb2.GetRolloutRequest(adapter=adapter, alias=alias)
        write = admin_pb2.SetRolloutRequest(adapter=adapter, alias=alias)
        for call in (gateway.admin.GetRollout(read), gateway.admin.SetRollout(write)):
            assert told(await refused(call))[0] == "INVALID_ARGUMENT"
    request = admin_pb2.GetRolloutRequest(adapter="nobody")
    assert told(await refused(gateway.admin.GetRollout(request)))[0] == "NOT_FOUND"


async def test_a_shadow_answers_copies_that_nobody_gets(
    gateway: RunningGateway, published: Publish
) -> None:
    published("red", 5)
    await divide(gateway, shadow=(2, 100))
    assert {await ask(gateway, f"session-{index}") for index in range(4)} == {1}
    # Of several answers the first is compared.
    several = pb.Sampling(max_tokens=4, n=2, temperature=1)
    await gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi", sampling=several))
    await gateway.core.shadows.settle()
    report = (await told_of(gateway)).shadow
    # The fake engine's tokens are the same for everybody.
    assert (report.same, report.different, report.failed) == (5, 0, 0)
    assert report.ttft_p95_s > 0
    assert (await told_of(gateway)).shares[0].figures.requests == 5


async def test_a_shadow_is_not_compared_with_itself(
    gateway: RunningGateway, published: Publish
) -> None:
    published("red", 5)
    await divide(gateway, (1, 50), (2, 50), shadow=(2, 100))
    answered = Counter([await ask(gateway, f"session-{index}") for index in range(40)])
    await gateway.core.shadows.settle()
    assert answered[1] > 0 < answered[2]
    report = (await told_of(gateway)).shadow
    assert report.same + report.skipped == answered[1]


async def test_a_failing_shadow_hurts_nobody(gateway: RunningGateway, published: Publish) -> None:
    published("red", 5)
    await divide(gateway, shadow=(2, 100))
    gateway.engine.broken.add("red@2")
    assert await ask(gateway, "any") == 1
    await gateway.core.shadows.settle()
    assert (await told_of(gateway)).shadow.failed == 1


async def with_a_copy_under_way(gateway: RunningGateway) -> list[Any]:
    """Requests for red, which has a slot as the copy does, and for green, which waits for one."""
    red = pb.GenerateRequest(adapter="red", text="hi", sampling=pb.Sampling(max_tokens=1))
    engine = gateway.engine
    engine.hold_answers()
    copied = gateway.inference.Generate(red)
    await engine.until_running(1)
    # Lets go of this answer, and of no other.
    engine.let_answer()
    engine.hold_answers()
    await copied
    await engine.until_running(1)
    others = [gateway.inference.Generate(red)]
    await engine.until_running(2)
    others.append(gateway.inference.Generate(pb.GenerateRequest(adapter="green", text="hi")))
    return others


async def test_a_copy_gives_way_to_a_client_that_waits(
    gateway: RunningGateway, published: Publish
) -> None:
    published("red", 5)
    await divide(gateway, shadow=(2, 100))
    others = await with_a_copy_under_way(gateway)
    async with asyncio.timeout(60):
        await gateway.core.shadows.settle()
    shadow = (await told_of(gateway)).shadow
    assert (shadow.skipped, shadow.failed) == (1, 0)
    await gateway.engine.until_running(2)
    gateway.engine.let_answer()
    assert [(await other).adapter.name for other in others] == ["red", "green"]


async def test_now_and_then_a_copy_waits_its_turn_like_a_client(
    gateway: RunningGateway, published: Publish
) -> None:
    """Or a gateway that is never idle would compare nothing."""
    published("red", 5)
    await divide(gateway, shadow=(2, 100))
    found = gateway.routes.rollout("red")
    assert found is not None
    found[1].figures.turns.due_at = 0
    others = await with_a_copy_under_way(gateway)
    async with asyncio.timeout(60):
        while not (await gateway.replicas.states())[0].waiting:
            await told_of(gateway)
    assert (await told_of(gateway)).shadow.skipped == 0
    gateway.engine.let_answer()
    await asyncio.gather(*others)
    await gateway.core.shadows.settle()
    assert (await told_of(gateway)).shadow.same >= 1


async def test_a_rollout_under_load_fails_nothing(
    gateway: RunningGateway, published: Publish
) -> None:
    published("red", 5)
    stop = asyncio.Event()
    seen: set[int] = set()

    async def keep_asking(session: str) -> None:
        while not stop.is_set():
            seen.add(await ask(gateway, session))

    tasks = [asyncio.create_task(keep_asking(f"session-{index}")) for index in range(6)]
    for percent in (20, 50, 100):
        shares = [(2, percent), (1, 100 - percent)] if percent < 100 else [(2, 100)]
        await divide(gateway, *shares)
        await ask(gateway, "one more")
    await divide(gateway)
    stop.set()
    await asyncio.gather(*tasks)
    assert seen == {1, 2}
    assert not gateway.engine.dead


async def test_the_command_line_sets_shows_and_clears(
    gateway: RunningGateway, published: Publish
) -> None:
    published("red", 5)
    admin = ("--admin", gateway.front.admin_address)

    async def said(*arguments: str) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "manylora_cli", "rollout", *arguments, *admin),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out

    async def rollout(*arguments: str) -> list[tuple[int, int]]:
        out = await said(*arguments, "--json")
        return [(share["version"], share["percent"]) for share in json.loads(out)["shares"]]

    assert await rollout("set", "red", "2=10", "1=90") == [(2, 10), (1, 90)]
    assert await rollout("show", "red") == [(2, 10), (1, 90)]
    # In a pipe, cells stand between tabs as in every other table.
    header, *rows = (await said("show", "red")).decode().splitlines()
    assert header.split("\t")[:3] == ["version", "share", "requests"]
    assert [row.split("\t")[:2] for row in rows] == [["2", "10 %"], ["1", "90 %"]]
    assert await rollout("clear", "red") == [(1, 100)]
