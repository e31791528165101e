"""Floods and cold adapters, over an engine that takes simulated time for each token."""

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from statistics import median, quantiles

import pytest

from manylora_gateway.errors import DisplacedError
from manylora_gateway.fair import FairOrder, Flow, Share
from manylora_gateway.figures import Turns
from manylora_gateway.pool import AdapterPool
from manylora_gateway.shadow import IN_TURN, SHARE
from manylora_registry import Version
from tests.unit.gateway.simulated import simulate
from tests.unit.gateway.test_pool import version

SEATS, EXPRESS, SLOTS = 16, 8, 2
PREFILL_S, TOKEN_S, LOAD_S, TURN_S = 0.05, 0.02, 0.15, 1.0
TOKENS = 64
ANSWER_S = (PREFILL_S + TOKENS * TOKEN_S) * 2
"""The longest answer: with all seats taken the engine is half as fast."""
CAPACITY = SEATS / ANSWER_S
"""Answers a second."""


class Engine:
    """As fast as it is empty: a full batch takes twice as long for each step."""

    def __init__(self) -> None:
        self.running = 0
        self.first: dict[str, list[float]] = defaultdict(list)
        """Seconds to the first token, by who asked."""
        self.tokens: dict[str, int] = defaultdict(int)
        self.pool = AdapterPool(
            self._load,
            self._unload,
            slots=SLOTS,
            capacity=8,
            seats=SEATS,
            express=EXPRESS,
            turn_s=TURN_S,
            clock=lambda: asyncio.get_running_loop().time(),
        )

    async def ask(
        self,
        who: str,
        adapter: Version | None,
        *,
        tokens: int = TOKENS,
        most: int = 0,
        share: Share | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        most = max(tokens, most)
        async with self.pool.hold(adapter, share or Share(), most) as seat, self._batch():
            await asyncio.sleep(PREFILL_S * self.slowness)
            self.first[who].append(loop.time() - asked)
            for _ in range(tokens):
                await asyncio.sleep(TOKEN_S * self.slowness)
                self.tokens[who] += 1
            seat.used = tokens

    @property
    def slowness(self) -> float:
        return 1 + self.running / SEATS

    @asynccontextmanager
    async def _batch(self) -> AsyncGenerator[None, None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def _load(self, version: Version) -> None:
        await asyncio.sleep(LOAD_S)

    async def _unload(self, version: Version) -> None:
        return


async def poisson(engine: Engine, who: str, adapter: Version | None, rate: float, until: float):
    """Asks `rate` times a second, whatever becomes of it."""
    chance, loop = random.Random(who), asyncio.get_running_loop()
    tasks = []
    while loop.time() < until:
        tasks.append(asyncio.create_task(engine.ask(who, adapter)))
        await asyncio.sleep(chance.expovariate(rate))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def p95(samples: list[float]) -> float:
    return quantiles(samples, n=20)[-1]


RED, GREEN, BLUE = map(version, ("red", "green", "blue"))
SECONDS = 120.0


@pytest.mark.parametrize("flooded", [RED, None], ids=["adapter", "base"])
def test_a_flood_hardly_moves_anothers_first_token(flooded: Version | None) -> None:
    """Ten times what the engine can do asks for one adapter; another has a request now and then."""

    async def green_with(flood: float) -> float:
        engine = Engine()
        # Both are warm: what a load costs is another question.
        await engine.ask("warm", GREEN, tokens=1)
        floods = [poisson(engine, "flood", flooded, flood, SECONDS)] if flood else []
        await asyncio.gather(poisson(engine, "green", GREEN, 0.5, SECONDS), *floods)
        return p95(engine.first["green"])

    idle = simulate(green_with(flood=0))
    flooded_p95 = simulate(green_with(flood=10 * CAPACITY))
    assert flooded_p95 < 3 * idle


def test_copies_hardly_move_a_clients_first_token() -> None:
    """As many adapters are asked for as there are slots, and all answers of one are copied."""

    async def answered(copied: bool) -> float:
        engine = Engine()
        chance, loop = random.Random(1), asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        async def copy() -> None:
            with suppress(DisplacedError):
                await engine.ask("copies", BLUE, share=SHARE)

        async def ask(adapter: Version) -> None:
            await engine.ask("clients", adapter)
            if copied and adapter is RED:
                tasks.add(loop.create_task(copy()))

        while loop.time() < SECONDS:
            tasks.add(loop.create_task(ask(chance.choice((RED, GREEN)))))
            await asyncio.sleep(chance.expovariate(0.3 * CAPACITY))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert bool(engine.tokens["copies"]) == copied
        return p95(engine.first["clients"])

    assert simulate(answered(copied=True)) < 1.5 * simulate(answered(copied=False))


def test_copies_that_wait_their_turn_hardly_move_a_clients_first_token() -> None:
    """Both slots are always busy, with answers of seconds."""
    seconds, tokens = 900, 4 * TOKENS

    async def answered() -> float:
        engine = Engine()
        loop = asyncio.get_running_loop()
        turns, chance = Turns(loop.time), random.Random(1)

        async def keep_asking(adapter: Version) -> None:
            await asyncio.sleep(chance.random())
            while loop.time() < seconds:
                await engine.ask("clients", adapter, tokens=chance.randint(tokens // 2, tokens))

        async def copy() -> None:
            while loop.time() < seconds:
                if turns.take():
                    began = loop.time()
                    await engine.ask("copies", BLUE, tokens=tokens, share=IN_TURN)
                    turns.end(loop.time() - began)
                await asyncio.sleep(1)

        await asyncio.gather(copy(), *(keep_asking(one) for one in (RED, GREEN) for _ in range(4)))
        assert engine.tokens["copies"] > tokens
        return p95(engine.first["clients"])

    # As long as it takes with a full batch.
    assert simulate(answered()) <= 2 * PREFILL_S


def test_a_cold_adapter_is_served_within_the_bound() -> None:
    """Two floods hold both slots, and cold adapters keep coming."""

    async def run() -> list[float]:
        engine = Engine()
        colds = [version(f"cold-{index}") for index in range(24)]

        async def cold() -> None:
            await asyncio.sleep(2)
            tasks = []
            for index, each in enumerate(colds):
                tasks.append(asyncio.create_task(engine.ask(f"cold-{index}", each, tokens=8)))
                await asyncio.sleep(0.05)
            await asyncio.gather(*tasks)

        floods = [
            asyncio.create_task(poisson(engine, each.name, each, 10 * CAPACITY, 300.0))
            for each in (RED, GREEN)
        ]
        await cold()
        for flood in floods:
            flood.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return [engine.first[f"cold-{index}"][0] for index in range(len(colds))]

    waits = simulate(run())
    for position, wait in enumerate(waits, start=1):
        # As docs/serving-operations.md states it.
        turns = -(-position // SLOTS)
        assert wait <= turns * (TURN_S + ANSWER_S + LOAD_S) + 2 * PREFILL_S, (position, wait)


def test_newcomers_do_not_starve_who_has_had_much() -> None:
    """An adapter that was served for long still gets seats while new ones come for ever."""

    async def run() -> int:
        engine = Engine()
        async with asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(engine.ask("red", RED))
        before = engine.tokens["red"]
        share = 0

        async def newcomers() -> None:
            nonlocal share
            for index in range(3000):
                share += 1
                group.create_task(engine.ask("new", None, share=Share(f"tenant-{index}")))
                await asyncio.sleep(0.1)

        async with asyncio.timeout(10_000), asyncio.TaskGroup() as group:
            task = asyncio.create_task(newcomers())
            await engine.ask("red", RED)
            task.cancel()
        assert engine.tokens["red"] == before + TOKENS
        return share

    assert simulate(run()) < 60


def test_adapters_that_cannot_be_loaded_hold_up_another_for_a_turn_at_most() -> None:
    """As while a disk is full; nor do they when it has room again."""
    mended, ended = 30.0, 90.0

    async def run() -> float:
        loop = asyncio.get_running_loop()
        colds = itertools.cycle([version(f"cold-{index}") for index in range(400)])
        longest = 0.0

        async def load(loaded: Version) -> None:
            await asyncio.sleep(0.1)
            if loaded is not RED and loop.time() < mended:
                raise OSError

        async def unload(_: Version) -> None:
            return

        pool = AdapterPool(load, unload, slots=SLOTS, capacity=8, seats=8, clock=loop.time)

        async def ask(adapter: Version) -> None:
            nonlocal longest
            asked = loop.time()
            try:
                async with pool.hold(adapter, tokens=100) as seat:
                    if adapter is RED:
                        longest = max(longest, loop.time() - asked)
                    await asyncio.sleep(1)
                    seat.used = 100
            except OSError:
                await asyncio.sleep(0.1)

        async def client(adapters: Iterator[Version]) -> None:
            while loop.time() < ended:
                await ask(next(adapters))

        warm = itertools.repeat(RED)
        await asyncio.gather(*(client(each) for each in (warm, colds) for _ in range(4)))
        return longest

    # Without faults it is 6.6 s.
    assert simulate(run()) < 10


def test_weights_divide_the_tokens() -> None:
    async def run() -> dict[str, int]:
        engine = Engine()
        shares = {"one": Share("one"), "three": Share("three", tenant_weight=3)}

        async def flood(who: str) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(400):
                    group.create_task(engine.ask(who, RED, share=shares[who]))

        floods = [asyncio.create_task(flood(who)) for who in shares]
        await asyncio.sleep(60)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return engine.tokens

    tokens = simulate(run())
    assert tokens["three"] / tokens["one"] == pytest.approx(3, rel=0.15)


def test_late_tenants_get_as_much_where_answers_are_shorter_than_allowed() -> None:
    """Seats are charged before anybody knows how long the answers will be."""

    async def run() -> dict[str, int]:
        engine = Engine()

        async def flood(who: str) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(400):
                    group.create_task(engine.ask(who, None, tokens=20, most=2048, share=Share(who)))
                    await asyncio.sleep(0.2)

        who = [f"tenant-{index}" for index in range(SEATS + EXPRESS + 6)]
        floods = [asyncio.create_task(flood(each)) for each in who]
        await asyncio.sleep(80)
        assert engine.tokens.keys() == {*who}
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return engine.tokens

    served = simulate(run()).values()
    assert min(served) > 0.9 * median(served)


@pytest.mark.parametrize("light", [GREEN, None], ids=["adapter", "base"])
def test_a_flood_of_many_adapters_holds_up_another_tenant_for_a_turn_at_most(
    light: Version | None,
) -> None:
    """More adapters than memory holds, all of one tenant."""

    async def run() -> list[float]:
        engine = Engine()
        crowd = [version(f"crowd-{index}") for index in range(40)]
        share = Share("crowd")

        async def flood() -> None:
            async with asyncio.TaskGroup() as group:
                for index in range(2000):
                    group.create_task(engine.ask("flood", crowd[index % 40], share=share))
                    await asyncio.sleep(1 / (10 * CAPACITY))

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(2)
        for _ in range(8):
            await engine.ask("light", light, share=Share("light"))
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        return engine.first["light"]

    bound = 2.5 * PREFILL_S + (0 if light is None else TURN_S + ANSWER_S + LOAD_S)
    assert max(simulate(run())) <= bound


def test_a_tenant_with_many_adapters_has_no_larger_share() -> None:
    order = FairOrder()
    served = defaultdict(int)
    flows = [Flow("many", f"adapter-{index}") for index in range(9)] + [Flow("one", "adapter")]
    for flow in flows:
        order.join(flow, Share(flow.tenant))
    for _ in range(1000):
        flow = min(flows, key=order.tag)
        order.charge(flow, 100)
        order.settle(flow, 100, used=random.Random(len(served)).randrange(1, 100))
        served[flow.tenant] += 1
    assert served["one"] == pytest.approx(500, abs=5)
