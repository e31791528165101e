"""What moving an alias costs, and what loads do to everybody else.

A gateway over the base model. Measured: from the alias move in the registry to the first token of
the new version; gaps between tokens of streams of other adapters, while versions are swapped and
while nothing happens; how long an adapter takes to its first token when it is in a slot, in host
memory, and on disk only.

Prints a table and, last, one JSON line.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import grpc

from benchmarks.adapters import write_random_adapter
from benchmarks.gateway import Served, write_config
from manylora.admin.v1 import admin_pb2
from manylora.admin.v1.admin_pb2_grpc import AdminServiceStub
from manylora_client import AsyncClient
from manylora_registry import Registry
from manylora_registry.base import identify_base

ROOT = Path(__file__).parents[1]
PROMPT = list(range(100, 132))
RANK = 8


async def gaps_while(
    client: AsyncClient, streams: int, tokens: int, during: "asyncio.Task[None]"
) -> float:
    """The 99th percentile of seconds between tokens of `streams` that run beside a task."""
    gaps: list[float] = []

    async def stream(name: str) -> None:
        while not during.done():
            last = None
            answer = client.stream(PROMPT, name, max_tokens=tokens, ignore_eos=True)
            async for delta in answer:
                now = time.perf_counter()
                if last is not None:
                    gaps.extend([(now - last) / len(delta.token_ids)] * len(delta.token_ids))
                last = now

    await asyncio.gather(*(stream(("steady", "")[index % 2]) for index in range(streams)))
    await during
    return quantiles(gaps, n=100)[-1]


async def first_token(client: AsyncClient, reference: str) -> tuple[float, int]:
    """Seconds to the first token, and the version that made it."""
    asked = time.perf_counter()
    async with client.stream(PROMPT, reference, max_tokens=2, ignore_eos=True) as answer:
        async for _ in answer:
            break
        assert answer.adapter is not None
        return time.perf_counter() - asked, answer.adapter.number


async def measure(
    target: str, admin: str, registry: Registry, swaps: int, tokens: int
) -> dict[str, float]:
    """All figures of a running gateway."""
    waits: list[float] = []
    async with AsyncClient(target, timeout=300) as client:

        async def swap() -> None:
            number = (await first_token(client, "moving"))[1]
            for _ in range(swaps):
                number = 3 - number
                moved = time.perf_counter()
                await asyncio.to_thread(registry.set_alias, "moving", "production", number)
                while (await first_token(client, "moving"))[1] != number:
                    pass
                waits.append(time.perf_counter() - moved)

        async def idle() -> None:
            # As many requests for the same adapter as the swaps make, and no swap.
            for _ in range(swaps):
                await first_token(client, "moving")
                await asyncio.sleep(1)

        await gaps_while(client, 2, tokens, asyncio.create_task(asyncio.sleep(2)))
        calm = await gaps_while(client, 4, tokens, asyncio.create_task(idle()))
        busy = await gaps_while(client, 4, tokens, asyncio.create_task(swap()))

        loads: dict[str, list[float]] = {"device": [], "host": [], "disk": []}
        async with grpc.aio.insecure_channel(admin) as channel:
            stub = AdminServiceStub(channel)
            for _ in range(3):
                unload = stub.Unload(admin_pb2.UnloadRequest(adapter="tier-0@1"))
                await unload
                loads["disk"].append((await first_token(client, "tier-0@1"))[0])
                loads["device"].append((await first_token(client, "tier-0@1"))[0])
                # More others than there are slots: it leaves its slot and stays in memory.
                for index in range(1, 7):
                    await first_token(client, f"tier-{index}@1")
                loads["host"].append((await first_token(client, "tier-0@1"))[0])
    return {
        "swap_s": median(waits),
        "others_p99_vs_idle": busy / calm,
        **{f"load_{tier}_ms": 1000 * median(seconds) for tier, seconds in loads.items()},
    }


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "bases/smollm2-135m")
    parser.add_argument("--swaps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    identity = identify_base(options.base)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with Registry.open(root / "registry") as registry:
            names = ["moving", "moving", "steady", *(f"tier-{index}" for index in range(7))]
            for index, name in enumerate(names):
                source = write_random_adapter(root / f"adapter-{index}", identity, RANK, index)
                registry.publish(name, source, base=identity)
            for name in ("moving", "steady"):
                registry.set_alias(name, "production", 1)
            config = root / "gateway.yaml"
            write_config(config, options.base, context=512, streams=8, interval_ms=0)
            with Served(["manylora_cli", "serve"], config) as ready:
                figures = asyncio.run(
                    measure(ready["grpc"], ready["admin"], registry, options.swaps, options.tokens)
                )
    for name, value in figures.items():
        print(f"{name:24}{value:10.3f}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
