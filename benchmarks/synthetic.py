"""A gateway whose engine only makes up tokens: everything but the model, at any speed.

`python -m benchmarks.synthetic CONFIG` serves it like `manylora serve`; the base in the config
needs a tokenizer and weights only to have a fingerprint. Tokens say which adapter made them and
from what prompt, so that a wrong answer is seen. Environment:

SYNTHETIC_TOKENS_PER_S  of each stream (default 300)
SYNTHETIC_PREFILL_S     to a stream's first token (default 0.005)
SYNTHETIC_LOAD_S        of one adapter (default 0.02)
SYNTHETIC_DEATHS        a directory; an engine is dead once it has a file named by its process
"""

# The methods are those of `Engine`.
# ruff: noqa: D102, ARG002

import asyncio
import os
import sys
import time
import zlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from ray.serve import Application

from manylora_gateway.application import Arguments, application
from manylora_gateway.config import EngineConfig
from manylora_gateway.engine import Delta, Finish, Prompt, Sampling, TextPrompt, TokenPrompt
from manylora_gateway.errors import (
    AdapterLoadError,
    InvalidRequestError,
    ReplicaLostError,
    Violation,
)

VOCABULARY = 49_152


def expected_tokens(adapter: str | None, prompt: Sequence[int], count: int) -> list[int]:
    """What the engine answers: a run of numbers that starts where adapter and prompt say."""
    start = zlib.crc32(f"{adapter} {list(prompt)}".encode())
    return [(start + index) % VOCABULARY for index in range(count)]


class SyntheticEngine:
    """The `Engine` protocol without a model."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._rate = float(os.environ.get("SYNTHETIC_TOKENS_PER_S", "300"))
        self._prefill_s = float(os.environ.get("SYNTHETIC_PREFILL_S", "0.005"))
        self._load_s = float(os.environ.get("SYNTHETIC_LOAD_S", "0.02"))
        deaths = os.environ.get("SYNTHETIC_DEATHS")
        self._death = None if deaths is None else Path(deaths, str(os.getpid()))
        self._loaded: set[str] = set()

    async def load(self, name: str, directory: Path) -> None:
        if not (directory / "adapter_model.safetensors").is_file():
            raise AdapterLoadError(f"{name} has no weights.")
        await asyncio.sleep(self._load_s)
        self._loaded.add(name)

    async def unload(self, name: str) -> None:
        self._loaded.discard(name)

    def tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, TokenPrompt):
            ids = list(prompt.ids)
        elif isinstance(prompt, TextPrompt):
            ids = list(prompt.text.encode())
        else:
            ids = [byte for turn in prompt.messages for byte in turn.content.encode()]
        if len(ids) >= self._config.max_context:
            raise InvalidRequestError([Violation("text", "is too long")])
        return ids

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Sampling,
        adapter: str | None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        self.check_health()
        assert adapter is None or adapter in self._loaded, f"{adapter} is not loaded"
        ids = expected_tokens(adapter, token_ids, sampling.max_tokens)
        await asyncio.sleep(self._prefill_s)
        began, made = time.perf_counter(), 0
        while made < len(ids):
            self.check_health()
            # As from vLLM: what was made since the last delta comes in one.
            due = 1 + int((time.perf_counter() - began) * self._rate)
            new = tuple(ids[made : max(made + 1, due)])
            made += len(new)
            last = made == len(ids)
            finish = Finish("length", len(token_ids), made) if last else None
            yield Delta(" tok" * len(new), new, finish=finish)
            if not last:
                next_at = max(self._config.stream_interval_ms / 1000, 1 / self._rate)
                await asyncio.sleep(next_at)

    def check_health(self) -> None:
        if self._death is not None and self._death.exists():
            raise ReplicaLostError("The engine died.")

    async def close(self) -> None:
        return


def make_engine(base: Path, config: EngineConfig, gpus: int) -> SyntheticEngine:
    """For a replica."""
    del base, gpus
    return SyntheticEngine(config)


def engines(args: Arguments) -> Application:
    """For a Serve config, in the place of the gateway's own."""
    from benchmarks import synthetic

    return application(args, synthetic.make_engine)


if __name__ == "__main__":
    # Replicas import this module by its name.
    from benchmarks import synthetic
    from manylora_gateway.serve import serve

    serve(Path(sys.argv[1]), sys.argv[2:], synthetic.make_engine)
