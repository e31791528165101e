"""Promise 2 at random: many requests together, versions swapping, against each alone.

A few here; `make soak` asks for 500.
"""

import asyncio
import os
import random
from pathlib import Path

from manylora_client import AsyncClient, Generation
from manylora_registry import Registry
from manylora_registry.base import BaseModelIdentity
from tests.e2e.harness import ADAPTERS, Gateway, write_adapter
from tests.e2e.test_serving import QUESTIONS, ask, differ_by_rounding

REQUESTS = 500 if "SOAK_MINUTES" in os.environ else 24


async def test_random_requests_together_equal_each_alone(
    gateway: Gateway, registry: Registry, identity: BaseModelIdentity, tmp_path: Path
) -> None:
    chance = random.Random(11)
    names = ("", *ADAPTERS)
    second = write_adapter(tmp_path, identity, 8, seed=301)
    version = await asyncio.to_thread(registry.publish, "grey", second, base=identity)
    requests = [
        (chance.choice(names), chance.choice(QUESTIONS), chance.randrange(2, 20))
        for _ in range(REQUESTS)
    ]
    together: dict[int, Generation] = {}
    waiting = list(enumerate(requests))
    async with AsyncClient(gateway.inference, timeout=300) as client:

        async def generate(name: str, question: str, count: int) -> Generation:
            return await client.generate(ask(question), name, max_tokens=count, logprobs=2)

        async def some() -> None:
            while waiting:
                index, request = waiting.pop()
                together[index] = await generate(*request)
                await asyncio.sleep(chance.random() / 10)

        async def swap() -> None:
            numbers = (version.number, 1)
            while waiting:
                for number in numbers:
                    await asyncio.to_thread(registry.set_alias, "grey", "production", number)
                    await asyncio.sleep(1)

        try:
            await asyncio.gather(swap(), *(some() for _ in range(12)))
        finally:
            await asyncio.to_thread(registry.set_alias, "grey", "production", 1)
        alone: dict[tuple[str, str, int], Generation] = {}
        ties = 0
        for index, (name, question, count) in enumerate(requests):
            answer = together[index]
            reference = "" if answer.adapter is None else f"{name}@{answer.adapter.number}"
            key = (reference, question, count)
            if key not in alone:
                alone[key] = await generate(*key)
            if answer.token_ids != alone[key].token_ids:
                assert differ_by_rounding(alone[key], answer), key
                ties += 1
    assert ties <= max(1, REQUESTS // 1000)
