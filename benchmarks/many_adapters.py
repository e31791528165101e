"""Throughput and latency with 1, 8, 64 and 512 adapters over fewer slots.

The same requests at the same concurrency, their adapters drawn from a Zipf distribution, over a
gateway with `--slots` slots and `--host-adapters` adapters in host memory. By default no request
waits for a slot and the cost is that of loads; with `--slots 4` most wait.

Prints a table and, last, one JSON line.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import quantiles

import numpy as np

from benchmarks.adapters import write_random_adapter
from benchmarks.gateway import Served, write_config
from manylora_client import AsyncClient
from manylora_registry import Registry
from manylora_registry.base import identify_base

ROOT = Path(__file__).parents[1]
PROMPT = list(range(100, 116))
RANK = 4
ZIPF = 1.0
"""The k-th adapter is asked for in proportion to 1/k."""


async def measure(
    target: str, adapters: int, requests: int, concurrency: int, tokens: int
) -> tuple[float, float]:
    """Tokens/s and the 99th percentile of seconds a request takes."""
    chance = np.random.default_rng(0)
    weights = 1 / np.arange(1, adapters + 1) ** ZIPF
    drawn = list(chance.choice(adapters, size=requests, p=weights / weights.sum()))
    seconds: list[float] = []
    async with AsyncClient(target, timeout=300) as client:

        async def ask() -> None:
            while drawn:
                name = f"adapter-{drawn.pop()}@1"
                asked = time.perf_counter()
                await client.generate(PROMPT, name, max_tokens=tokens, ignore_eos=True)
                seconds.append(time.perf_counter() - asked)

        await client.generate(PROMPT, "adapter-0@1", max_tokens=2)
        began = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return requests * tokens / (time.perf_counter() - began), quantiles(seconds, n=100)[-1]


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "bases/smollm2-135m")
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--host-adapters", type=int, default=32)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 512])
    options = parser.parse_args()
    identity = identify_base(options.base)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        config = root / "gateway.yaml"
        write_config(
            config,
            options.base,
            context=512,
            streams=options.concurrency,
            slots=options.slots,
            host_adapters=options.host_adapters,
        )
        # Its engine takes a minute to start: time to publish them all.
        served = Served(["manylora_cli", "serve"], config)
        with Registry.open(root / "registry") as registry:
            for index in range(max(options.adapters)):
                # Small, so that 512 are published quickly; their slots are as big as any.
                directory = root / f"adapter-{index}"
                source = write_random_adapter(directory, identity, RANK, index, ("q_proj",))
                registry.publish(f"adapter-{index}", source, base=identity)
        with served as ready:
            for count in options.adapters:
                speed, late = asyncio.run(
                    measure(
                        ready["grpc"], count, options.requests, options.concurrency, options.tokens
                    )
                )
                figures[f"tokens_per_s_{count}"] = speed
                figures[f"p99_s_{count}"] = late
                print(f"{count:4d} adapters: {speed:7.1f} tokens/s, p99 {late:6.2f} s", flush=True)
    for count in options.adapters[1:]:
        ratio = figures[f"tokens_per_s_{count}"] / figures[f"tokens_per_s_{options.adapters[0]}"]
        figures[f"throughput_{count}_vs_{options.adapters[0]}"] = ratio
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
