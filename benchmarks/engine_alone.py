"""The engine of a gateway config called directly, no gateway around it; for `gateway.py`."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

from manylora_gateway.config import GatewayConfig
from manylora_gateway.engine import Sampling
from manylora_gateway.environment import engine_environment
from manylora_registry.config import load_config


async def measure(
    config: GatewayConfig, streams: int, tokens: int, rounds: int
) -> list[list[float]]:
    """Tokens/s and seconds to the first token, of each round."""
    from manylora_gateway.vllm_engine import VllmEngine

    engine = VllmEngine(config.base, config.engine, gpus=0)
    prompt = list(range(100, 164))
    found: list[list[float]] = []
    for turn in range(rounds):
        firsts: list[float] = []

        async def stream(index: int, turn: int, firsts: list[float]) -> None:
            asked = time.perf_counter()
            sampling = Sampling(max_tokens=tokens, ignore_eos=True)
            first = True
            async for _ in engine.generate(f"{turn}-{index}", prompt, sampling, None):
                if first:
                    firsts.append(time.perf_counter() - asked)
                    first = False

        began = time.perf_counter()
        await asyncio.gather(*(stream(index, turn, firsts) for index in range(streams)))
        found.append([streams * tokens / (time.perf_counter() - began), median(firsts)])
    await engine.close()
    return found


if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]), GatewayConfig, ())
    os.environ.update(engine_environment(config.engine))
    print(json.dumps(asyncio.run(measure(config, *map(int, sys.argv[2:])))))
