"""Promise 6: a swap drops nothing, mixes nothing, and leaves no old weights behind."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.config import EngineConfig
from manylora_gateway.errors import YankedAdapterError
from manylora_registry import Adapter, AdapterReference, Registry, Version
from manylora_registry.transfer import copy_registry
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.in_process import OTHER_BASE, RunningGateway, publish, running_gateway
from tests.unit.gateway.test_errors import refused, told
from tests.unit.gateway.test_observing import until


async def stream(gateway: RunningGateway, adapter: str) -> tuple[int, str]:
    """Version number and text of one streamed answer; checks that one version made all of it."""
    started, texts = pb.GenerateStarted(), list[str]()
    async for event in gateway.inference.GenerateStream(
        pb.GenerateRequest(adapter=adapter, text="hi", sampling=pb.Sampling(max_tokens=12))
    ):
        if event.WhichOneof("event") == "started":
            started = event.started
        texts.append(event.delta.text)
    words = "".join(texts).split()
    digits = started.adapter.digest.removeprefix("sha256:")[:12]
    expected = f"{started.adapter.name}@{started.adapter.number}-{digits}"
    assert words == [expected] * 12
    return started.adapter.number, words[0]


@pytest.mark.parametrize("replicas", [1, 3])
async def test_a_swap_under_load_drops_and_mixes_nothing(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    replicas: int,
) -> None:
    async with start(replicas=replicas) as gateway:
        seen: dict[str, set[int]] = {"red": set(), "green": set()}
        stop = asyncio.Event()

        async def ask(adapter: str) -> None:
            while not stop.is_set():
                number, _ = await stream(gateway, adapter)
                seen[adapter].add(number)

        streams = [asyncio.create_task(ask(name)) for name in ("red", "green") * 4]
        await until(lambda: all(seen.values()))
        newest = served["red"]
        for seed in range(10, 15):
            newest = published("red", seed)
            registry.set_alias("red", "production", newest.number)
            await gateway.until_serving("red@production", newest.number)
        await stream(gateway, "red")
        stop.set()
        await asyncio.gather(*streams)
        assert seen["green"] == {1}
        assert {1, newest.number} <= seen["red"] | {(await stream(gateway, "red"))[0]}
        for fake in gateway.engines:
            assert not fake.dead
            await fake.until_gone(served["red"].engine_name)
            reds = {name for name in fake.loaded if name.startswith("red@")}
            assert reds == {newest.engine_name}


async def test_running_answers_keep_their_version_and_new_ones_get_the_new(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    gateway.engine.hold_answers()
    before = asyncio.create_task(stream(gateway, "red"))
    await gateway.engine.until_running(1)
    version = published("red", 5)
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)
    after = asyncio.create_task(stream(gateway, "red"))
    await gateway.engine.until_running(2)
    assert set(gateway.engine.running) == {served["red"].engine_name, version.engine_name}
    gateway.engine.let_answer()
    assert await before == (1, served["red"].engine_name)
    assert await after == (2, version.engine_name)
    await gateway.engine.until_gone(served["red"].engine_name)


async def test_the_new_version_is_loaded_before_the_alias_means_it(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    already = len(gateway.engine.loads)
    gateway.engine.hold_loads()
    published("red", 5)
    registry.set_alias("red", "production", 2)
    await gateway.engine.until_loads(already + 1)
    assert await stream(gateway, "red") == (1, served["red"].engine_name)
    gateway.engine.let_load()
    await gateway.until_serving("red@production", 2)
    assert (await stream(gateway, "red"))[0] == 2


@pytest.mark.parametrize("flaw", ["refused", "other base"])
async def test_a_version_that_fails_leaves_the_old_one_serving_and_says_so(
    gateway: RunningGateway, registry: Registry, published: Publish, flaw: str
) -> None:
    if flaw == "refused":
        version = published("red", 5)
        gateway.engine.refused.add(version.engine_name)
    else:
        version = published("red", 5, base=OTHER_BASE)
    registry.set_alias("red", "production", 2)
    entry = await gateway.until_failed("red@production")
    assert (entry.serving.number, entry.pending.number) == (1, 2)
    assert entry.pending_error
    assert (await stream(gateway, "red"))[0] == 1
    # Moving on mends it.
    published("red", 6)
    registry.set_alias("red", "production", 3)
    await gateway.until_serving("red@production", 3)
    assert version.engine_name not in gateway.engine.loaded


async def test_a_failure_on_one_replica_is_a_failure(
    served: dict[str, Version], registry: Registry, published: Publish, start: Start
) -> None:
    async with start(replicas=2) as gateway:
        version = published("red", 5)
        gateway.engines[1].refused.add(version.engine_name)
        registry.set_alias("red", "production", 2)
        await gateway.until_failed("red@production")
        assert {(await stream(gateway, "red"))[0] for _ in range(4)} == {1}
        # What could be retried is: the replica recovers.
        gateway.engines[1].refused.clear()
        await gateway.until_serving("red@production", 2)


async def test_a_yanked_version_is_served_no_more_and_the_next_one_is(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    red, request = served["red"], pb.GenerateRequest(adapter="red", text="hi")
    gateway.engine.hold_answers()
    running = gateway.inference.Generate(request)
    await gateway.engine.until_running(1)
    registry.yank("red@1")
    entry = await gateway.until_failed("red@production")
    assert not entry.HasField("serving")
    status = await refused(gateway.inference.Generate(request))
    assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_YANKED")
    # Who was answered is answered to the end.
    gateway.engine.let_answer()
    assert (await running).adapter.digest == red.digest
    await gateway.engine.until_gone(red.engine_name)
    published("red", 5)
    gateway.engine.hold_loads()
    already = len(gateway.engine.loads)
    registry.set_alias("red", "production", 2)
    await gateway.engine.until_loads(already + 1)
    # While it loads, nobody is told the error of the one before.
    waiting = asyncio.create_task(stream(gateway, "red"))
    listings = (await gateway.inference.ListAdapters(pb.ListAdaptersRequest())).adapters
    assert not any(alias.pending_error for listing in listings for alias in listing.aliases)
    gateway.engine.let_load()
    assert (await waiting)[0] == 2
    await gateway.until_serving("red@production", 2)
    assert (await stream(gateway, "red"))[0] == 2


async def test_a_withdrawn_version_ends_though_its_successor_cannot_be_served(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    version = published("red", 5)
    gateway.engine.refused.add(version.engine_name)
    registry.set_alias("red", "production", 2)
    await gateway.until_failed("red@production")
    assert (await stream(gateway, "red"))[0] == 1
    registry.yank("red@1")
    await gateway.engine.until_gone(served["red"].engine_name)
    status = await refused(gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi")))
    assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_LOAD_FAILED")
    gateway.engine.refused.clear()
    await gateway.until_serving("red@production", 2)


async def test_a_version_that_is_withdrawn_while_it_loads_is_never_served(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    already = len(gateway.engine.loads)
    await gateway.core.resolve("red@2")
    gateway.engine.hold_loads()
    registry.set_alias("red", "production", 2)
    await gateway.engine.until_loads(already + 1)
    registry.yank("red@2")

    async def keep_asking() -> None:
        while True:
            await gateway.core.resolve("red@2")
            await asyncio.sleep(0)

    with pytest.raises(YankedAdapterError):
        await asyncio.wait_for(keep_asking(), 60)
    gateway.engine.let_load()
    entry = await gateway.until_failed("red@production")
    assert (entry.serving.number, entry.pending.number) == (1, 2)
    assert (await stream(gateway, "red"))[0] == 1


async def test_a_version_that_is_served_again_stays_when_its_requests_end(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    version = published("red", 5)
    registry.set_alias("red", "canary", 2)
    gateway.engine.hold_answers()
    running = asyncio.create_task(stream(gateway, "red@canary"))
    await gateway.engine.until_running(1)
    registry.set_alias("red", "canary", 1)
    await gateway.until_serving("red@canary", 1)
    shares = [admin_pb2.RolloutShare(version=2, percent=100)]
    await gateway.admin.SetRollout(admin_pb2.SetRolloutRequest(adapter="red", shares=shares))
    gateway.engine.let_answer()
    assert (await running)[0] == 2
    for _ in range(5):
        assert (await stream(gateway, "red"))[0] == 2
    assert gateway.engine.loads.count(version.engine_name) == 1


async def test_a_rollout_ends_with_a_version_it_needs(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    shares = [admin_pb2.RolloutShare(version=2, percent=100)]
    await gateway.admin.SetRollout(admin_pb2.SetRolloutRequest(adapter="red", shares=shares))
    assert (await stream(gateway, "red"))[0] == 2
    registry.yank("red@2")
    async with asyncio.timeout(60):
        while (await stream(gateway, "red"))[0] == 2:
            pass
    assert (await stream(gateway, "red"))[0] == 1


async def test_a_registry_that_was_restored_is_followed(
    gateway: RunningGateway, registry: Registry, published: Publish, tmp_path: Path
) -> None:
    published("red", 5)
    with Registry.open(tmp_path / "backup") as backup:
        copy_registry(registry, backup)
    lost = published("red", 6)
    for number in (2, 3):
        registry.set_alias("red", "production", number)
        await gateway.until_serving("red@production", number)
    assert (await stream(gateway, "red@3"))[1] == lost.engine_name

    gateway.registry_location.rename(tmp_path / "lost")
    (tmp_path / "backup").rename(gateway.registry_location)
    await gateway.until_serving("red@production", 1)
    again = published("red", 7)
    assert again.number == lost.number
    assert (await stream(gateway, "red@3"))[1] == again.engine_name
    # Numbered as what happened before the restore, and so no news to who goes by the number alone.
    registry.yank("green@1")
    entry = await gateway.until_failed("green@production")
    assert not entry.HasField("serving")
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)


async def test_a_rollback_is_a_swap(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    published("red", 5)
    for number in (2, 1, 2, 1):
        registry.set_alias("red", "production", number)
        await gateway.until_serving("red@production", number)
        assert (await stream(gateway, "red"))[0] == number


async def test_an_alias_is_followed_from_its_first_request(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    registry.set_alias("red", "canary", 1)
    assert (await stream(gateway, "red@canary"))[0] == 1
    version = published("red", 5)
    registry.set_alias("red", "canary", 2)
    await gateway.until_serving("red@canary", 2)
    assert version.engine_name in gateway.engine.loaded
    assert (await stream(gateway, "red"))[0] == 1, "production has not moved"


class SlowRegistry(Registry):
    """One whose first answer about `canary` is long on its way."""

    def find(self, reference: str | AdapterReference) -> Version:
        version = super().find(reference)
        if isinstance(reference, AdapterReference) and reference.alias == "canary":
            READ.set()
            assert ARRIVES.wait(60)
        return version


READ, ARRIVES = threading.Event(), threading.Event()


@pytest.mark.parametrize("change", ["moved", "yanked"])
async def test_a_change_during_the_first_look_at_an_alias_is_not_missed(
    tmp_path: Path, change: str
) -> None:
    READ.clear()
    ARRIVES.clear()
    with SlowRegistry.open(tmp_path / "registry") as registry:
        for seed in (1, 2):
            publish(registry, tmp_path, "red", seed)
        registry.set_alias("red", "production", 1)
        registry.set_alias("red", "canary", 1)
        async with running_gateway(registry, tmp_path) as gateway:
            asking = asyncio.create_task(stream(gateway, "red@canary"))
            assert await asyncio.to_thread(READ.wait, 60)
            if change == "moved":
                registry.set_alias("red", "canary", 2)
            else:
                registry.yank("red@1")
            # Events come in order: what is followed has moved, so the other change was seen too.
            registry.set_alias("red", "production", 2)
            await gateway.until_serving("red@production", 2)
            ARRIVES.set()
            if change == "moved":
                assert (await asking)[0] == 2
            else:
                with pytest.raises(grpc.aio.AioRpcError, match="yanked"):
                    await asking


async def test_a_version_that_is_yanked_as_its_new_alias_is_looked_up_is_not_served(
    tmp_path: Path,
) -> None:
    READ.clear()
    ARRIVES.clear()
    with SlowRegistry.open(tmp_path / "registry") as registry:
        for seed in (1, 2):
            publish(registry, tmp_path, "red", seed)
        publish(registry, tmp_path, "green", 3)
        publish(registry, tmp_path, "green", 4)
        registry.set_alias("green", "production", 1)
        async with running_gateway(registry, tmp_path, aliases=("production", "canary")) as gateway:
            registry.set_alias("red", "canary", 1)
            assert await asyncio.to_thread(READ.wait, 60)
            registry.yank("red@1")
            # Events come in order: what is followed has moved, so the other change was seen too.
            registry.set_alias("green", "production", 2)
            await gateway.until_serving("green@production", 2)
            ARRIVES.set()
            entry = await gateway.until_failed("red@canary")
            assert not entry.HasField("serving")
            with pytest.raises(grpc.aio.AioRpcError, match="yanked"):
                await stream(gateway, "red@canary")


class SlowHistory(Registry):
    """One whose answers about the past are long on their way."""

    def way(self, name: str, alias: str) -> list[Version]:
        READ.set()
        assert ARRIVES.wait(60)
        return super().way(name, alias)


async def test_a_yanked_version_is_not_served_while_the_past_is_looked_up(tmp_path: Path) -> None:
    READ.clear()
    ARRIVES.clear()
    with SlowHistory.open(tmp_path / "registry") as registry:
        publish(registry, tmp_path, "red", 1)
        registry.set_alias("red", "production", 1)
        async with running_gateway(registry, tmp_path) as gateway:
            # While one is answered, the version is still loaded.
            gateway.engine.hold_answers()
            running = asyncio.create_task(stream(gateway, "red"))
            await gateway.engine.until_running(1)
            registry.yank("red@1")
            assert await asyncio.to_thread(READ.wait, 60)
            try:
                request = pb.GenerateRequest(adapter="red", text="hi")
                status = await refused(gateway.inference.Generate(request))
                assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_YANKED")
            finally:
                ARRIVES.set()
                gateway.engine.let_answer()
            assert (await running)[0] == 1


async def test_a_full_disk_under_a_rollout_does_not_end_following(
    gateway: RunningGateway, registry: Registry, published: Publish, tmp_path: Path
) -> None:
    for seed in (5, 6, 7):
        published("red", seed)
    shares = [admin_pb2.RolloutShare(version=2, percent=100)]
    divided = admin_pb2.SetRolloutRequest(adapter="red", shares=shares)
    await gateway.admin.SetRollout(divided)
    state = tmp_path / "state"
    (state / "rollouts.json").unlink()
    state.rmdir()
    state.write_text("in the place of the directory")
    status = await refused(gateway.admin.SetRollout(divided))
    assert told(status)[0] == "UNAVAILABLE"
    assert str(tmp_path) not in status.message
    for number in (3, 4):
        registry.set_alias("red", "production", number)
        await gateway.until_serving("red@production", number)
        assert (await stream(gateway, "red"))[0] == number
    state.unlink()
    await gateway.admin.SetRollout(divided)
    state.rename(state.with_name("away"))
    state.write_text("again")
    registry.yank("red@2")
    registry.set_alias("red", "production", 3)
    await gateway.until_serving("red@production", 3)
    assert (await stream(gateway, "red"))[0] == 3


async def test_a_version_another_alias_serves_is_kept(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    registry.set_alias("red", "stable", 1)
    await stream(gateway, "red@stable")
    published("red", 5)
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)
    assert (await stream(gateway, "red@stable"))[0] == 1
    assert gateway.engine.loads.count(served["red"].engine_name) == 1


async def test_a_new_adapter_is_served_without_a_restart(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await stream(gateway, "blue")
    published("blue", 5)
    registry.set_alias("blue", "production", 1)
    await gateway.until_serving("blue@production", 1)
    assert (await stream(gateway, "blue"))[0] == 1


class CountingRegistry(Registry):
    """One that counts what is asked about single versions."""

    asked = 0

    def find(self, reference: str | AdapterReference) -> Version:
        self.asked += 1
        return super().find(reference)


async def test_what_is_served_and_listed_is_read_at_once(tmp_path: Path) -> None:
    with CountingRegistry.open(tmp_path / "registry") as registry:
        for seed, name in enumerate(("blue", "green", "red", "white")):
            publish(registry, tmp_path, name, seed)
            publish(registry, tmp_path, name, 10 + seed)
            registry.set_alias(name, "production", 1)
            registry.set_alias(name, "canary", 1)
        publish(registry, tmp_path, "alien", 20, base=OTHER_BASE)
        registry.set_alias("alien", "canary", 1)
        registry.asked = 0
        async with running_gateway(registry, tmp_path) as gateway:
            assert registry.asked == 0
            listing = await gateway.inference.ListAdapters(pb.ListAdaptersRequest())
            assert registry.asked == 0
            alien, *others = listing.adapters
            assert not alien.aliases[0].HasField("serving")
            assert "made for the base" in alien.aliases[0].pending_error
            assert {alias.serving.number for each in others for alias in each.aliases} == {1}
            assert (await stream(gateway, "white"))[0] == 1


class ManyAdapters(Registry):
    """One that lists each adapter a thousand times, and when it was looked at."""

    def adapters(self, *, limit: int | None = None, after: str | None = None) -> list[Adapter]:
        return WatchedList(super().adapters(limit=limit, after=after) * 1000)


class WatchedList(list[Adapter]):
    """Counts how many are taken from it between two turns of the event loop, at most."""

    most = 0

    def __iter__(self) -> Iterator[Adapter]:
        taken, ended = 0, False

        def begin_anew() -> None:
            nonlocal taken
            taken = 0
            if not ended:
                loop.call_soon(begin_anew)

        loop = asyncio.get_running_loop()
        loop.call_soon(begin_anew)
        for adapter in super().__iter__():
            taken += 1
            WatchedList.most = max(WatchedList.most, taken)
            yield adapter
        ended = True


async def test_a_long_listing_lets_streams_go_on(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        publish(registry, tmp_path, "red", 1)
        registry.set_alias("red", "production", 1)
    with ManyAdapters.open(tmp_path / "registry") as registry:
        async with running_gateway(registry, tmp_path) as gateway:
            WatchedList.most = 0
            listing = await gateway.inference.ListAdapters(pb.ListAdaptersRequest())
            assert len(listing.adapters) == 1000
            assert 0 < WatchedList.most <= 100


async def test_a_broken_version_at_the_start_does_not_hold_up_the_others(
    served: dict[str, Version], registry: Registry, published: Publish, start: Start
) -> None:
    published("alien", 5, base=OTHER_BASE)
    registry.set_alias("alien", "production", 1)
    async with start() as gateway:
        assert (await stream(gateway, "red"))[0] == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream(gateway, "alien")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_aliases_that_move_together_leave_room_for_clients(
    registry: Registry, published: Publish, start: Start
) -> None:
    """Five hundred that moved kept a client waiting until each was loaded."""
    names = [f"moving{index}" for index in range(6)]
    for index, name in enumerate([*names, "other"]):
        published(name, 10 * index)
        registry.set_alias(name, "production", 1)
    config = EngineConfig(slots=3, host_adapters=6, max_concurrent=8, turn_s=0)
    async with start(engine=config) as gateway:
        engine = gateway.engine
        engine.hold_loads()
        before = len(engine.loads)
        for index, name in enumerate(names):
            registry.set_alias(name, "production", published(name, 10 * index + 1).number)
        await engine.until_loads(before + 2)
        asking = asyncio.ensure_future(stream(gateway, "other"))
        # Of the four places for loads those that moved would take all.
        await engine.until_loads(before + 3)
        assert engine.loads[-1].startswith("other@1")
        engine.let_load()
        assert (await asking)[0] == 1
        for name in names:
            await gateway.until_serving(f"{name}@production", 2)
