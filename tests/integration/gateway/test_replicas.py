"""Several replicas under Ray Serve: each adapter at home, swaps on all, deaths survived."""

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks.synthetic import expected_tokens
from manylora_client import AsyncClient, Generation, UnavailableError
from manylora_registry import Registry
from tests.e2e.harness import Gateway, replica_processes, wait_until
from tests.integration.gateway.conftest import ADAPTERS

PROMPT = [3, 1, 4]


def expected(answer: Generation, count: int) -> tuple[int, ...]:
    """What the engine says for the version that the answer names."""
    version = answer.adapter
    assert version is not None
    name = f"{version.name}@{version.number}-{version.digest.removeprefix('sha256:')[:12]}"
    return tuple(expected_tokens(name, PROMPT, count))


async def test_an_adapter_has_a_home_and_a_hot_one_spreads(gateway: Gateway) -> None:
    cold = ("grey", "red")  # The others were loaded everywhere at the start.
    async with AsyncClient(gateway.inference, timeout=300) as client:

        async def ask(name: str, count: int = 20) -> None:
            answer = await client.generate(PROMPT, name, max_tokens=count)
            assert tuple(answer.token_ids) == expected(answer, count)

        for _ in range(3):
            for name in cold:
                await ask(name)
                # An answer may come before its call returns, and until then it is load for Serve.
                # What a replica is asked now returns behind it.
                gateway.replicas()
        holders = Counter(
            entry.adapter.name for replica in gateway.replicas() for entry in replica.adapters
        )
        assert {name: holders[name] for name in cold} == dict.fromkeys(cold, 1)
        await asyncio.gather(*(ask("grey", 300) for _ in range(24)))
        holders = Counter(
            entry.adapter.name for replica in gateway.replicas() for entry in replica.adapters
        )
        assert holders["grey"] == 2


def test_replicas_are_not_behind_everything_else_on_the_machine(gateway: Gateway) -> None:
    front = psutil.Process(gateway.process.pid)
    assert {one.nice() for one in replica_processes(gateway.process.pid)} == {front.nice()}


async def test_a_swap_loads_everywhere_before_anyone_gets_the_new_version(
    gateway: Gateway, registry: Registry
) -> None:
    seen: set[int] = set()
    async with AsyncClient(gateway.inference, timeout=300) as client:

        async def stream() -> None:
            while 2 not in seen:
                answer = client.stream(PROMPT, "red", max_tokens=30)
                tokens = [token async for delta in answer for token in delta.token_ids]
                whole = await answer.result()
                assert tuple(tokens) == expected(whole, 30)
                assert whole.adapter is not None
                if whole.adapter.number == 2 and 2 not in seen:
                    holders = [
                        replica.replica_id
                        for replica in await asyncio.to_thread(gateway.replicas)
                        if ("red", 2)
                        in {
                            (entry.adapter.name, entry.adapter.number) for entry in replica.adapters
                        }
                    ]
                    assert len(holders) == 2
                seen.add(whole.adapter.number)

        streams = [asyncio.create_task(stream()) for _ in range(6)]
        while 1 not in seen:
            await asyncio.wait(streams, timeout=0.05)
        await asyncio.to_thread(registry.set_alias, "red", "production", 2)
        async with asyncio.timeout(120):
            await asyncio.gather(*streams)
    assert await asyncio.to_thread(
        wait_until, lambda: ("red", 1) not in gateway.loaded(), within_s=60
    )


async def test_a_replica_that_dies_costs_streams_and_no_unary_request(gateway: Gateway) -> None:
    victims = replica_processes(gateway.process.pid)
    assert len(victims) == 2
    before = {replica.replica_id for replica in gateway.replicas()}
    async with AsyncClient(gateway.inference, timeout=300) as client:
        begun: set[int] = set()
        killed = asyncio.Event()

        # Each asks again and again, so that a slow machine too finds all of them under way.
        async def unary(index: int) -> None:
            while not killed.is_set():
                answer = await client.generate(PROMPT, ADAPTERS[index % 4], max_tokens=300)
                assert tuple(answer.token_ids) == expected(answer, 300)

        async def stream(index: int) -> str:
            while not killed.is_set():
                answer = client.stream(PROMPT, ADAPTERS[index % 4], max_tokens=600)
                tokens: list[int] = []
                try:
                    async for delta in answer:
                        begun.add(index)
                        tokens.extend(delta.token_ids)
                except UnavailableError as error:
                    return "lost" if error.retry_after else "lost without a time to come back"
                assert tuple(tokens) == expected(await answer.result(), 600)
            return "whole"

        def busy() -> bool:
            """Whether every stream has begun and both replicas generate."""
            return len(begun) == 8 and all(
                any(entry.requests for entry in replica.adapters) for replica in gateway.replicas()
            )

        streams = [asyncio.create_task(stream(index)) for index in range(8)]
        requests = [asyncio.create_task(unary(index)) for index in range(8)]
        assert await asyncio.to_thread(wait_until, busy, within_s=120)
        os.kill(victims[0].pid, signal.SIGKILL)
        killed.set()
        await asyncio.gather(*requests)
        outcomes = Counter(await asyncio.gather(*streams))
        assert set(outcomes) == {"lost", "whole"}
        # Serve puts a new one in its place.
        assert await asyncio.to_thread(
            wait_until,
            lambda: len({one.replica_id for one in gateway.replicas()} - before) == 1,
            within_s=240,
        )
        for name in ADAPTERS:
            answer = await client.generate(PROMPT, name, max_tokens=20)
            assert tuple(answer.token_ids) == expected(answer, 20)
    assert await asyncio.to_thread(wait_until, lambda: gateway.requests() == 0, within_s=60)


async def test_a_replica_whose_engine_dies_costs_no_unary_request(
    gateway: Gateway, deaths: Path
) -> None:
    before = {replica.replica_id for replica in gateway.replicas()}
    assert len(before) == 2
    async with AsyncClient(gateway.inference, timeout=300) as client:
        (deaths / str(replica_processes(gateway.process.pid)[0].pid)).touch()
        # Some of them are at home in it.
        for name in (*ADAPTERS, *ADAPTERS):
            answer = await client.generate(PROMPT, name, max_tokens=20)
            assert tuple(answer.token_ids) == expected(answer, 20)
    assert await asyncio.to_thread(
        wait_until,
        lambda: len({one.replica_id for one in gateway.replicas()} - before) == 1,
        within_s=240,
    )


@pytest.mark.parametrize("streams", [64])
async def test_many_streams_leave_nothing_behind(gateway: Gateway, streams: int) -> None:
    async with AsyncClient(gateway.inference, timeout=300) as client:

        async def stream(index: int) -> None:
            answer = client.stream(PROMPT, ADAPTERS[index % 4], max_tokens=200)
            tokens = [token async for delta in answer for token in delta.token_ids]
            assert tuple(tokens) == expected(await answer.result(), 200)

        await asyncio.gather(*(stream(index) for index in range(streams)))
    assert await asyncio.to_thread(wait_until, lambda: gateway.requests() == 0, within_s=60)
