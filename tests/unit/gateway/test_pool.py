"""The pool: slots, seats and turns."""

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import ClassVar

import pytest

from manylora_gateway.errors import DisplacedError, PoolFullError
from manylora_gateway.fair import EVERYBODY, Share
from manylora_gateway.pool import AdapterPool
from manylora_registry import Version


def version(name: str) -> Version:
    return Version(
        name=name,
        number=1,
        digest="sha256:" + name.encode().hex().ljust(64, "0"),
        base_fingerprint="sha256:" + "0" * 64,
        rank=8,
        size=1,
        created_at=datetime.now(UTC),
        metrics={},
        tags={},
        lineage={},
        yanked=False,
    )


RED, GREEN, BLUE, GREY = map(version, ("red", "green", "blue", "grey"))


class Memory:
    """An engine's memory: loads as the test allows, and tells what it holds."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.loads: list[str] = []
        self.fails: set[str] = set()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def load(self, version: Version) -> None:
        self.loads.append(version.name)
        await self.may_load.wait()
        if version.name in self.fails:
            raise OSError(version.name)
        self.held.add(version.name)

    async def unload(self, version: Version) -> None:
        self.held.remove(version.name)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(memory: Memory, clock: Clock) -> Callable[..., AdapterPool]:
    def make(
        slots: int = 2, capacity: int = 4, seats: int = 8, express: int = 0, turn_s: float = 1
    ) -> AdapterPool:
        return AdapterPool(
            memory.load,
            memory.unload,
            slots=slots,
            capacity=capacity,
            seats=seats,
            express=express,
            turn_s=turn_s,
            clock=clock,
        )

    return make


class Request:
    """One request that holds its seat until it is told to end."""

    _running: ClassVar[set[asyncio.Task[None]]] = set()

    def __init__(
        self, pool: AdapterPool, version: Version | None, share: Share = EVERYBODY
    ) -> None:
        self.seated = asyncio.Event()
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._run(pool, version, share))
        # The loop itself keeps no task that waits, and not every test keeps its requests.
        self._running.add(self.task)
        self.task.add_done_callback(self._running.discard)

    async def _run(self, pool: AdapterPool, version: Version | None, share: Share) -> None:
        async with pool.hold(version, share):
            self.seated.set()
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def turn() -> None:
    """Until every task that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def settled(pool: AdapterPool) -> None:
    """Until nothing in the pool moves without the test doing something."""
    for _ in range(5):
        await asyncio.sleep(0)
        await pool.settle()


async def test_an_adapter_is_loaded_once_for_all_who_wait(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make()
    memory.may_load.clear()
    requests = [Request(pool, RED) for _ in range(5)]
    await turn()
    assert memory.loads == ["red"]
    memory.may_load.set()
    await settled(pool)
    assert all(request.seated.is_set() for request in requests)
    assert memory.loads == ["red"]


async def test_a_caller_who_gives_up_does_not_take_the_load_along(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make()
    memory.may_load.clear()
    first, second = Request(pool, RED), Request(pool, RED)
    await turn()
    first.task.cancel()
    await asyncio.wait([first.task])
    memory.may_load.set()
    await settled(pool)
    assert second.seated.is_set()
    assert memory.loads == ["red"]
    assert pool.requests == 1


async def test_a_failed_load_reaches_all_who_wait_and_is_tried_again_later(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1)
    memory.fails.add("red")
    requests = [Request(pool, RED) for _ in range(3)]
    results = await asyncio.gather(*(request.task for request in requests), return_exceptions=True)
    assert [str(result) for result in results] == ["red"] * 3
    assert pool.requests == 0
    assert pool.residents() == []
    memory.fails.clear()
    again = Request(pool, RED)
    await settled(pool)
    assert again.seated.is_set()


async def test_never_more_adapters_at_once_than_slots(make: Callable[..., AdapterPool]) -> None:
    pool = make(slots=2, turn_s=1000)
    red, green, blue = (Request(pool, each) for each in (RED, GREEN, BLUE))
    await settled(pool)
    assert red.seated.is_set()
    assert green.seated.is_set()
    assert not blue.seated.is_set()
    await red.end()
    await settled(pool)
    assert blue.seated.is_set()


async def test_the_base_needs_a_seat_and_no_slot(make: Callable[..., AdapterPool]) -> None:
    pool = make(slots=1, capacity=2, seats=2)
    red = Request(pool, RED)
    await settled(pool)
    bare, another = Request(pool, None), Request(pool, None)
    await settled(pool)
    assert red.seated.is_set()
    assert bare.seated.is_set()
    assert not another.seated.is_set()
    await bare.end()
    await settled(pool)
    assert another.seated.is_set()


async def test_the_longest_idle_goes_when_memory_is_full(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=2, capacity=3)
    for each in (RED, GREEN, BLUE):
        async with pool.hold(each):
            pass
    async with pool.hold(RED):
        pass
    async with pool.hold(GREY):
        assert memory.held == {"red", "blue", "grey"}


async def test_a_flood_on_one_adapter_does_not_hold_up_another(
    make: Callable[..., AdapterPool],
) -> None:
    """With one seat, the lines take turns however long they are."""
    pool = make(seats=1)
    flood = [Request(pool, RED) for _ in range(10)]
    await settled(pool)
    late = Request(pool, GREEN)
    served = 0
    while not late.seated.is_set():
        await flood[served].end()
        served += 1
        await settled(pool)
    assert served <= 2


@pytest.mark.parametrize("loaded", [False, True])
async def test_a_busy_adapter_gives_its_slot_away_when_its_turn_is_over(
    make: Callable[..., AdapterPool], clock: Clock, loaded: bool
) -> None:
    pool = make(slots=1, capacity=2, turn_s=1)
    if loaded:
        await pool.prepare(GREEN)
    first = Request(pool, RED)
    await settled(pool)
    cold = Request(pool, GREEN)
    clock.now = 0.5
    second = Request(pool, RED)
    await settled(pool)
    assert second.seated.is_set(), "its turn is not over"
    clock.now = 1.5
    third = Request(pool, RED)
    await settled(pool)
    assert not third.seated.is_set(), "its turn is over and green waits"
    await first.end()
    await second.end()
    await settled(pool)
    assert cold.seated.is_set()
    assert not third.seated.is_set()
    await cold.end()
    await settled(pool)
    assert third.seated.is_set()


async def test_a_prepared_version_needs_no_free_slot(make: Callable[..., AdapterPool]) -> None:
    """One slot beyond those shared out is kept for it."""
    pool = make(slots=2)
    busy = [Request(pool, RED), Request(pool, GREEN)]
    await settled(pool)
    await pool.prepare(BLUE)
    assert {resident.version.name for resident in pool.residents()} == {"red", "green", "blue"}
    assert all(request.seated.is_set() for request in busy)


async def test_a_successor_runs_beside_the_retiring_version(
    make: Callable[..., AdapterPool],
) -> None:
    pool = make(slots=2, turn_s=1000)
    old, other = Request(pool, RED), Request(pool, GREEN)
    await settled(pool)
    await pool.prepare(BLUE)
    pool.retire(RED)
    new = Request(pool, BLUE)
    await settled(pool)
    assert new.seated.is_set()
    assert not old.task.done()
    assert not other.task.done()


async def test_a_retired_version_is_unloaded_when_its_last_request_ends(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make()
    first, second = Request(pool, RED), Request(pool, RED)
    await settled(pool)
    assert pool.retire(RED)
    await first.end()
    await settled(pool)
    assert memory.held == {"red"}
    await second.end()
    await settled(pool)
    assert memory.held == set()
    assert not pool.retire(RED)


async def test_a_retired_version_that_is_asked_for_again_stays(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make()
    first = Request(pool, RED)
    await settled(pool)
    pool.retire(RED)
    second = Request(pool, RED)
    await settled(pool)
    await first.end()
    await second.end()
    await settled(pool)
    assert memory.held == {"red"}
    # Idle, it goes at once.
    pool.retire(RED)
    await settled(pool)
    assert memory.held == set()


async def test_a_waiting_request_that_is_cancelled_leaves_nothing(
    make: Callable[..., AdapterPool],
) -> None:
    pool = make(seats=1)
    running = Request(pool, RED)
    await settled(pool)
    waiting = Request(pool, RED)
    await asyncio.sleep(0)
    assert pool.requests == 2
    waiting.task.cancel()
    await asyncio.wait([waiting.task])
    assert pool.requests == 1
    await running.end()
    assert pool.requests == 0


async def test_a_request_cancelled_as_it_is_seated_gives_the_seat_back(
    make: Callable[..., AdapterPool],
) -> None:
    pool = make(seats=1)
    async with pool.hold(None):
        waiting = Request(pool, None)
        await turn()
    # Its seat is granted by the end above, and it has not run since.
    waiting.task.cancel()
    await asyncio.wait([waiting.task])
    assert not waiting.seated.is_set()
    assert pool.requests == 0
    async with pool.hold(None):
        assert pool.requests == 1


@pytest.mark.parametrize("seed", range(20))
async def test_random_traffic_leaks_nothing_and_never_overfills(
    seed: int, memory: Memory, make: Callable[..., AdapterPool]
) -> None:
    chance = random.Random(seed)
    pool = make(slots=2, capacity=4, seats=6, turn_s=0)
    busy: list[str] = []

    async def request(version: Version | None) -> None:
        async with pool.hold(version):
            name = "" if version is None else version.name
            assert name in {"", *memory.held}
            busy.append(name)
            try:
                assert len(busy) <= 6
                assert len({*busy} - {""}) <= 3
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                busy.remove(name)

    versions = [version(name) for name in "abcdefg"]
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        tasks = []
        for _ in range(200):
            chosen = chance.choice([None, *versions])
            tasks.append(asyncio.create_task(request(chosen)))
            if chance.random() < 0.2:
                chance.choice(tasks).cancel()
            if chance.random() < 0.1:
                pool.retire(chance.choice(versions))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        stack.push_async_callback(pool.settle)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [error for error in results if isinstance(error, Exception)]
    assert errors == []
    assert pool.requests == 0


async def test_a_pinned_adapter_stays_when_memory_is_full(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=3)
    await pool.pin(RED)
    for each in (GREEN, BLUE, GREY):
        async with pool.hold(each):
            pass
    assert {"red", "grey"} <= memory.held
    assert not pool.retire(RED)
    with pytest.raises(PoolFullError):
        await pool.pin(GREEN)
    assert pool.unpin(RED)
    for each in (GREEN, BLUE):
        async with pool.hold(each):
            pass
    assert "red" not in memory.held
    assert pool.counts.evictions >= 2


async def test_pins_that_are_asked_for_at_once_are_counted(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=3)
    memory.may_load.clear()
    pins = [asyncio.create_task(pool.pin(each)) for each in (RED, GREEN, BLUE)]
    await turn()
    memory.may_load.set()
    results = await asyncio.gather(*pins, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), PoolFullError, PoolFullError]
    memory.fails.add("green")
    assert pool.unpin(RED)
    with pytest.raises(OSError, match="green"):
        await pool.pin(GREEN)
    await pool.pin(BLUE)


async def test_what_is_being_pinned_makes_no_room_for_another(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    """Memory is full of it the moment it is loaded, and somebody waits for room."""
    pool = make(slots=1, capacity=3, seats=2)
    memory.may_load.clear()
    pin = asyncio.create_task(pool.pin(RED))
    await turn()
    others = [asyncio.create_task(pool.prepare(each)) for each in (GREEN, BLUE, GREY)]
    await turn()
    memory.may_load.set()
    await asyncio.gather(pin, *others)
    assert [one.version for one in pool.residents() if one.pinned] == [RED]


async def test_copies_that_wait_keep_no_client_out_of_memory(
    make: Callable[..., AdapterPool],
) -> None:
    pool = make(slots=1, capacity=2, seats=1)
    for each in (RED, GREEN):
        await pool.prepare(each)
    running, waiting = Request(pool, None), Request(pool, None)
    await settled(pool)
    copy = Share("shadow", gives_way=True)
    copies = [Request(pool, each, copy) for each in (RED, GREEN)]
    client = Request(pool, BLUE)
    await running.end()
    await waiting.end()
    await settled(pool)
    assert client.seated.is_set()
    assert not any(each.seated.is_set() for each in copies)


async def test_a_copy_that_is_seated_as_a_client_comes_gives_way(
    make: Callable[..., AdapterPool],
) -> None:
    pool = make(seats=1)
    async with pool.hold(None):
        copy = Request(pool, None, Share("shadow", gives_way=True))
        await turn()
        client = Request(pool, None)
    # The seat is granted to the copy by the end above, and the client asks before the copy runs.
    await settled(pool)
    assert client.seated.is_set()
    with pytest.raises(DisplacedError):
        await copy.task


async def test_copies_give_no_way_to_one_another(make: Callable[..., AdapterPool]) -> None:
    pool = make(seats=1)
    copies = [Request(pool, None, Share("shadow", gives_way=True)) for _ in range(2)]
    await settled(pool)
    for copy in copies:
        assert copy.seated.is_set()
        await copy.end()
        await settled(pool)


async def test_adapters_that_are_always_asked_for_leave_room_for_another(
    make: Callable[..., AdapterPool],
) -> None:
    """More adapters than memory holds, each with a line that never ends."""
    pool = make(slots=1, capacity=2, turn_s=0)
    busy = {each: [Request(pool, each) for _ in range(2)] for each in (RED, GREEN)}
    await settled(pool)
    cold = Request(pool, BLUE)
    for _ in range(10):
        await settled(pool)
        if cold.seated.is_set():
            return
        for each, (first, second) in busy.items():
            if first.seated.is_set():
                busy[each] = [second, Request(pool, each)]
                await first.end()
                break
    raise AssertionError("the cold adapter was never loaded")


async def test_thousands_may_leave_at_once(make: Callable[..., AdapterPool]) -> None:
    pool = make(seats=1)
    running = Request(pool, None)
    waiting = [Request(pool, None) for _ in range(3000)]
    await settled(pool)
    ending = asyncio.create_task(running.end())
    await asyncio.sleep(0)
    # The seat is given back before any of these has run.
    for each in waiting[:-1]:
        each.task.cancel()
    await ending
    await asyncio.wait([each.task for each in waiting[:-1]])
    assert waiting[-1].seated.is_set()
    assert pool.requests == 1


async def test_a_turn_that_is_over_takes_nobody_in_while_another_waits(
    make: Callable[..., AdapterPool], clock: Clock
) -> None:
    """Also one that has waited for a seat for longer."""
    pool = make(slots=1, capacity=2, seats=2, turn_s=1)
    first, second, third = (Request(pool, RED) for _ in range(3))
    await settled(pool)
    cold = Request(pool, GREEN)
    await settled(pool)
    clock.now = 1.5
    await first.end()
    await settled(pool)
    assert not third.seated.is_set()
    await second.end()
    await settled(pool)
    assert cold.seated.is_set()


async def test_a_turn_goes_on_when_nobody_wants_the_slot_any_more(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=3, turn_s=0)
    Request(pool, RED)
    await settled(pool)
    memory.may_load.clear()
    loading, waiting = (asyncio.create_task(pool.prepare(each)) for each in (GREEN, BLUE))
    await turn()
    more = Request(pool, RED)
    await turn()
    assert not more.seated.is_set()
    waiting.cancel()
    await turn()
    assert more.seated.is_set()
    memory.may_load.set()
    await loading


async def test_who_needs_no_slot_ends_no_turn(make: Callable[..., AdapterPool]) -> None:
    pool = make(slots=1, capacity=2, seats=2, turn_s=0)
    first, _, third = (Request(pool, RED) for _ in range(3))
    await settled(pool)
    bare = [Request(pool, None) for _ in range(3)]
    await settled(pool)
    for request in (first, *bare[:2]):
        await request.end()
        await settled(pool)
    # Both lines were given as much, and red has waited for longer.
    assert third.seated.is_set()
    assert not bare[2].seated.is_set()


async def test_a_flood_leaves_express_seats_to_others(make: Callable[..., AdapterPool]) -> None:
    pool = make(seats=2, express=1)
    flood = [Request(pool, RED) for _ in range(4)]
    await settled(pool)
    assert [request.seated.is_set() for request in flood] == [True, True, False, False]
    green, more = Request(pool, GREEN), Request(pool, GREEN)
    await settled(pool)
    assert green.seated.is_set()
    assert not more.seated.is_set()


@pytest.mark.parametrize(
    ("flood", "other"),
    [
        ([RED] * 3, GREEN),
        # However many adapters a tenant floods.
        ([RED, GREEN, None], BLUE),
    ],
)
async def test_prompts_of_a_flood_go_behind_anothers_in_the_engine(
    make: Callable[..., AdapterPool], flood: list[Version | None], other: Version
) -> None:
    pool = make(slots=3)
    async with AsyncExitStack() as held:

        async def priority(version: Version | None, share: Share) -> int:
            return (await held.enter_async_context(pool.hold(version, share))).priority

        shares = Share("a"), Share("b"), Share("b", tenant_weight=2)
        flooded = [await priority(version, shares[0]) for version in flood]
        assert flooded == sorted(set(flooded))
        assert await priority(other, shares[1]) == flooded[0]
        assert await priority(None, Share("c", gives_way=True)) > 1000 * flooded[-1]
    async with pool.hold(RED, shares[0]) as one, pool.hold(RED, shares[2]) as heavy:
        assert heavy.priority == one.priority / 2
    light = Share("light", tenant_weight=0.001, adapter_weight=0.001)
    async with pool.hold(RED, replace(light, adapter_weight=1000)), pool.hold(GREEN, light) as last:
        # As much as fits in what vLLM is told.
        assert last.priority < 1 << 31


@pytest.mark.parametrize(
    ("flood", "other", "express"),
    [
        (Share(), Share(), 2),
        (Share(adapter_weight=3), Share(), 1),
        (Share(), Share(adapter_weight=3), 3),
        (Share("a"), Share("b"), 2),
        (Share("a"), Share("b", tenant_weight=3), 3),
        (Share("a", tenant_weight=3), Share("b", adapter_weight=9), 1),
    ],
)
async def test_express_seats_are_for_lines_that_hold_less_than_their_share(
    make: Callable[..., AdapterPool], flood: Share, other: Share, express: int
) -> None:
    pool = make(seats=4, express=4)
    seated = [Request(pool, RED, flood) for _ in range(6)]
    await settled(pool)
    assert sum(request.seated.is_set() for request in seated) == 4
    others = [Request(pool, GREEN, other) for _ in range(6)]
    await settled(pool)
    assert sum(request.seated.is_set() for request in others) == express
    assert sum(request.seated.is_set() for request in seated) == 4


async def test_as_many_leave_as_want_a_slot(make: Callable[..., AdapterPool], clock: Clock) -> None:
    pool = make(slots=2, turn_s=1)
    busy = [Request(pool, RED), Request(pool, GREEN)]
    await settled(pool)
    clock.now = 2
    cold = [Request(pool, BLUE), Request(pool, GREY)]
    late = [Request(pool, RED), Request(pool, GREEN)]
    await settled(pool)
    for request in busy:
        await request.end()
    await settled(pool)
    assert all(request.seated.is_set() for request in cold)
    assert not any(request.seated.is_set() for request in late)


async def test_who_has_held_its_slot_for_longest_leaves(
    make: Callable[..., AdapterPool], clock: Clock
) -> None:
    pool = make(slots=2, turn_s=1)
    for each in (RED, GREEN):
        Request(pool, each)
        await settled(pool)
        clock.now += 2
    Request(pool, BLUE)
    late = [Request(pool, RED), Request(pool, GREEN)]
    await settled(pool)
    assert [request.seated.is_set() for request in late] == [False, True]


async def test_what_is_waited_for_last_makes_room(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=2, seats=1)
    for each in (RED, GREEN):
        await pool.prepare(each)
    for each in (None, RED, GREEN):
        Request(pool, each)
    await settled(pool)
    # A tenant who had nothing yet goes before all of them.
    Request(pool, BLUE, Share("other"))
    await settled(pool)
    assert memory.loads == ["red", "green", "blue"]
    assert memory.held == {"red", "blue"}


async def test_what_is_let_go_while_it_loads_is_not_pinned(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=3, seats=1)
    memory.may_load.clear()
    pins = [asyncio.create_task(pool.pin(RED)) for _ in range(2)]
    await turn()
    assert pool.unpin(RED)
    memory.may_load.set()
    await asyncio.gather(*pins)
    assert not any(one.pinned for one in pool.residents())
    await pool.pin(GREEN)


async def test_who_gives_up_a_pin_takes_no_other_along(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=3, seats=1)
    memory.may_load.clear()
    pins = [asyncio.create_task(pool.pin(RED)) for _ in range(3)]
    await turn()
    pins[0].cancel()
    pins[2].cancel()
    await turn()
    memory.may_load.set()
    await pins[1]
    assert [one.version for one in pool.residents() if one.pinned] == [RED]


async def test_who_gives_up_a_pin_ends_no_later_one(
    make: Callable[..., AdapterPool], memory: Memory
) -> None:
    pool = make(slots=1, capacity=3, seats=1)
    memory.may_load.clear()
    early = asyncio.create_task(pool.pin(RED))
    await turn()
    pool.unpin(RED)
    late = asyncio.create_task(pool.pin(RED))
    await turn()
    early.cancel()
    await turn()
    memory.may_load.set()
    await late
    assert [one.version for one in pool.residents() if one.pinned] == [RED]
