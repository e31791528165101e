"""What a flood on one adapter does to another's first token, and how long a cold one waits.

A gateway over the base model, with as few slots as floods. Measured in one run: the seconds to the
first token of an adapter that is asked now and then, while nothing else happens and while another
adapter is asked for `--times` what the engine can answer; then, while floods hold all slots, how
long adapters that are not loaded wait for their first token, beside the bound that
docs/serving-operations.md states.

Prints a table and, last, one JSON line.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles

from benchmarks.adapters import write_random_adapter
from benchmarks.gateway import Served, write_config
from manylora_client import AsyncClient, ResourceExhaustedError
from manylora_gateway.config import EngineConfig
from manylora_registry import Registry
from manylora_registry.base import identify_base

ROOT = Path(__file__).parents[1]
PROMPT = list(range(100, 132))
RANK = 8
SLOTS = 2
COLD = 6


class Load:
    """Requests to one gateway, and what became of them."""

    def __init__(self, client: AsyncClient, tokens: int, flood_prompt: int) -> None:
        self.refused = 0
        self.answers_s: list[float] = []
        self._client = client
        self._tokens = tokens
        self._flood_prompt = flood_prompt
        self._chance = random.Random(1)

    async def ask(self, adapter: str) -> float:
        """Seconds to the first token; the answer is read to its end."""
        # No two of a flood are alike: none is in the prefix cache.
        flooding = adapter == "flood"
        prompt = self._chance.choices(PROMPT, k=self._flood_prompt) if flooding else PROMPT
        asked, first = time.perf_counter(), math.nan
        stream = self._client.stream(prompt, adapter, max_tokens=self._tokens, ignore_eos=True)
        async for _ in stream:
            if math.isnan(first):
                first = time.perf_counter() - asked
        self.answers_s.append(time.perf_counter() - asked - first)
        return first

    async def capacity(self, adapter: str, streams: int, seconds: float) -> float:
        """Answers a second with all seats taken."""
        answered, until = 0, time.perf_counter() + seconds

        async def again() -> None:
            nonlocal answered
            while time.perf_counter() < until:
                await self.ask(adapter)
                answered += 1

        began = time.perf_counter()
        await asyncio.gather(*(again() for _ in range(streams)))
        return answered / (time.perf_counter() - began)

    @asynccontextmanager
    async def flood(self, adapter: str, rate: float) -> AsyncGenerator[None, None]:
        """Asks `rate` times a second, whatever becomes of it, until the block ends."""
        tasks: set[asyncio.Task[None]] = set()

        async def one() -> None:
            try:
                await self.ask(adapter)
            except ResourceExhaustedError:
                self.refused += 1

        async def ask_on() -> None:
            began = time.perf_counter()
            for number in itertools.count():
                # By the clock, not by naps: however late the loop is, the rate is what was asked.
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                tasks.add(task := asyncio.create_task(one()))
                task.add_done_callback(tasks.discard)

        asking = asyncio.create_task(ask_on())
        try:
            yield
        finally:
            asking.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(asking, *tasks, return_exceptions=True)

    async def now_and_then(self, adapter: str, requests: int, rate: float) -> list[float]:
        """The seconds to the first token of requests at random times."""
        chance = random.Random(0)
        asked: list[asyncio.Task[float]] = []
        for _ in range(requests):
            await asyncio.sleep(chance.expovariate(rate))
            asked.append(asyncio.create_task(self.ask(adapter)))
        return await asyncio.gather(*asked)


async def measure(
    target: str, seats: int, tokens: int, flood_prompt: int, requests: int, times: float
) -> dict[str, float]:
    """All figures of a running gateway."""
    async with AsyncClient(target, timeout=600) as client:
        load = Load(client, tokens, flood_prompt)
        for adapter in ("flood", "other"):
            await load.ask(adapter)
        capacity = await load.capacity("flood", seats, 20)
        rate = capacity / 10
        idle = await load.now_and_then("other", requests, rate)
        async with load.flood("flood", times * capacity):
            await asyncio.sleep(5)
            flooded = await load.now_and_then("other", requests, rate)
        refused = load.refused
        async with (
            load.flood("flood", times * capacity / SLOTS),
            load.flood("other", times * capacity / SLOTS),
        ):
            await asyncio.sleep(5)
            load.answers_s.clear()
            waits = await asyncio.gather(*(load.ask(f"cold-{index}") for index in range(COLD)))
            longest = max(load.answers_s)
    return {
        "other_p95_ttft_vs_idle": quantiles(flooded, n=20)[-1] / quantiles(idle, n=20)[-1],
        "other_p50_ttft_vs_idle": median(flooded) / median(idle),
        "other_p95_ttft_idle_s": quantiles(idle, n=20)[-1],
        "other_p95_ttft_flooded_s": quantiles(flooded, n=20)[-1],
        "capacity_answers_per_s": capacity,
        "refused": refused,
        "cold_longest_wait_s": max(waits),
        "cold_bound_s": math.ceil(COLD / SLOTS) * (EngineConfig().turn_s + longest),
    }


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "bases/smollm2-135m")
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--flood-prompt", type=int, default=32)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--times", type=float, default=10)
    options = parser.parse_args()
    identity = identify_base(options.base)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with Registry.open(root / "registry") as registry:
            names = ["flood", "other", *(f"cold-{index}" for index in range(COLD))]
            for index, name in enumerate(names):
                source = write_random_adapter(root / f"adapter-{index}", identity, RANK, index)
                registry.publish(name, source, base=identity)
                registry.set_alias(name, "production", 1)
        config = root / "gateway.yaml"
        write_config(
            config,
            options.base,
            context=512,
            streams=options.seats,
            slots=SLOTS,
            express=options.seats // 2,
            max_requests=1024,
        )
        with Served(["manylora_cli", "serve"], config) as ready:
            figures = asyncio.run(
                measure(
                    ready["grpc"],
                    options.seats,
                    options.tokens,
                    options.flood_prompt,
                    options.requests,
                    options.times,
                )
            )
    for name, value in figures.items():
        print(f"{name:26}{value:10.3f}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
