"""The engine of a gateway config called directly, no gateway around it; for `gateway.py`.

Prints `up` once it is, then for each line it reads one JSON line about a round:
tokens/s and median seconds to the first token.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

from manylora_gateway.config import GatewayConfig
from manylora_gateway.engine import Engine, Sampling
from manylora_gateway.environment import engine_environment
from manylora_registry.config import load_config

PROMPT = list(range(100, 164))


async def measure(engine: Engine, turn: int, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens/s and median seconds to the first token of one round."""
    firsts: list[float] = []

    async def stream(index: int) -> None:
        asked = time.perf_counter()
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        first = True
        async for _ in engine.generate(f"{turn}-{index}", PROMPT, sampling, None):
            if first:
                firsts.append(time.perf_counter() - asked)
                first = False

    began = time.perf_counter()
    await asyncio.gather(*(stream(index) for index in range(streams)))
    return streams * tokens / (time.perf_counter() - began), median(firsts)


async def serve(config: GatewayConfig, streams: int, tokens: int) -> None:
    """Measures whenever it is told to, until there is no more."""
    from manylora_gateway.vllm_engine import VllmEngine

    engine = VllmEngine(config.base, config.engine, gpus=0)
    print("up", flush=True)
    turn = 0
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await measure(engine, turn, streams, tokens)), flush=True)
        turn += 1
    await engine.close()


if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]), GatewayConfig, ())
    os.environ.update(engine_environment(config.engine))
    asyncio.run(serve(config, *map(int, sys.argv[2:])))
