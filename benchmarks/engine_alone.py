"""A gateway whose engine can also be called without it; for `gateway.py`.

`python -m benchmarks.engine_alone CONFIG` serves like `manylora serve`. A request with the prompt
`MARK` has the replica call `AsyncLLM` itself, as many streams at once as the engine takes, and is
answered with a JSON line about that: tokens/s and median seconds to the first token. So both ways
are measured of one engine: two engines of one configuration, in processes of their own, differ by
up to an eighth here.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from statistics import median

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from benchmarks.gateway import MARK, PROMPT
from manylora_gateway.config import EngineConfig
from manylora_gateway.engine import Delta, Finish, Sampling
from manylora_gateway.vllm_engine import VllmEngine


class OpenEngine(VllmEngine):
    """The gateway's engine, which measures itself when it is asked to."""

    def __init__(self, base: Path, config: EngineConfig, gpus: int) -> None:
        super().__init__(base, config, gpus)
        self._streams = config.max_concurrent
        self._rounds = 0

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Sampling,
        adapter: str | None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """See Engine."""
        if token_ids != MARK:
            async for delta in super().generate(request_id, token_ids, sampling, adapter, priority):
                yield delta
            return
        measured = await self._measure(sampling.max_tokens)
        yield Delta(json.dumps(measured), (0,), finish=Finish("length", len(MARK), 1))

    async def _measure(self, tokens: int) -> tuple[float, float]:
        firsts: list[float] = []
        self._rounds += 1

        async def stream(index: int) -> None:
            asked = time.perf_counter()
            parameters = SamplingParams(
                max_tokens=tokens,
                ignore_eos=True,
                temperature=0.0,
                output_kind=RequestOutputKind.DELTA,
            )
            first = True
            outputs = self._llm.generate(
                tokens_input(PROMPT), parameters, f"alone-{self._rounds}-{index}"
            )
            async for _ in outputs:
                if first:
                    firsts.append(time.perf_counter() - asked)
                    first = False

        began = time.perf_counter()
        await asyncio.gather(*(stream(index) for index in range(self._streams)))
        return self._streams * tokens / (time.perf_counter() - began), median(firsts)


def make_engine(base: Path, config: EngineConfig, gpus: int) -> OpenEngine:
    """For a replica."""
    return OpenEngine(base, config, gpus)


if __name__ == "__main__":
    # Replicas import this module by its name.
    from benchmarks import engine_alone
    from manylora_gateway.serve import serve

    serve(Path(sys.argv[1]), sys.argv[2:], engine_alone.make_engine)
