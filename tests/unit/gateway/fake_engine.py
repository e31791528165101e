"""An engine to read: it writes its adapter's name, one word a token, as told by the test."""

import asyncio
import math
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from manylora_gateway.constraints import FIELDS
from manylora_gateway.engine import (
    Candidate,
    Delta,
    Finish,
    Prompt,
    Regex,
    Sampling,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
)
from manylora_gateway.errors import (
    AdapterLoadError,
    InvalidRequestError,
    ReplicaLostError,
    Violation,
)

MAX_CONTEXT = 64
IMPOSSIBLE = Regex("(")
"""A constraint the engine refuses."""


def scores(token: int, text: str, sampling: Sampling) -> TokenLogprobs:
    """As many candidates as were asked for, the taken token first, each half as likely."""
    wanted = sampling.logprobs or 0
    candidates = [
        Candidate(token + rank, -math.log(2) * (rank + 1), text if rank == 0 else f"w{rank}")
        for rank in range(max(wanted, 1))
    ]
    return TokenLogprobs(candidates[0], tuple(candidates[:wanted]))


def without_others(entry: TokenLogprobs) -> TokenLogprobs:
    """As under a form that allows the taken token alone."""
    chosen, *others = entry.top
    out = [Candidate(other.token_id, -math.inf, other.text) for other in others]
    return TokenLogprobs(entry.chosen, (chosen, *out))


class FakeEngine:
    """Like vLLM where it matters: it dies when asked for more adapters than it has room for.

    A generation of `n` tokens says the name of its adapter (or "base") `n` times, so that an
    answer of two versions is seen at once.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.loaded: dict[str, Path] = {}
        self.loads: list[str] = []
        """Every load that was asked for, in order."""
        self.refused: set[str] = set()
        """Names that `load` refuses."""
        self.broken: set[str] = set()
        """Beginnings of names whose generations fail."""
        self.astray: set[str] = set()
        """Beginnings of names whose generations have other tokens than everybody's."""
        self.running: list[str] = []
        """Adapter of every generation under way, "base" for none; those of trials are apart."""
        self.trials: list[str] = []
        """Adapters that are tried as they are loaded."""
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.priorities: list[int] = []
        self.impossible = False
        """Candidates that were not taken have no probability at all."""
        self.repeats = 1
        """How often a token says its word."""
        self.dead = False
        self._loading = asyncio.Event()
        self._loading.set()
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._reading = threading.Event()
        self._reading.set()
        self._changed = asyncio.Condition()

    def hold_loads(self) -> None:
        """Loads wait from here on."""
        self._loading.clear()

    def let_load(self) -> None:
        self._loading.set()

    def hold_answers(self) -> None:
        """Generations stop after their first token from here on."""
        self._speaking.clear()

    def let_answer(self) -> None:
        self._speaking.set()

    def hold_reading(self) -> None:
        """Prompts that are too long take until `let_read`."""
        self._reading.clear()

    def let_read(self) -> None:
        self._reading.set()

    async def until_running(self, count: int) -> None:
        """Until `count` generations are under way, trials left out."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.running) == count)

    async def until_loads(self, count: int) -> None:
        """Until `count` loads were asked for."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.loads) >= count)

    async def until_gone(self, name: str) -> None:
        """Until the adapter `name` is not in the engine."""
        async with self._changed:
            await self._changed.wait_for(lambda: name not in self.loaded)

    async def load(self, name: str, directory: Path) -> None:
        self.loads.append(name)
        await self._tell()
        await self._loading.wait()
        assert (directory / "adapter_model.safetensors").is_file()
        if name in self.refused:
            raise AdapterLoadError(f"The engine refused {name}.")
        self.loaded[name] = directory

    async def unload(self, name: str) -> None:
        assert name not in (*self.running, *self.trials), "unloaded under a request"
        self.loaded.pop(name, None)
        await self._tell()

    def tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, TokenPrompt):
            ids = list(prompt.ids)
        elif isinstance(prompt, TextPrompt):
            ids = list(prompt.text.encode())
        else:
            ids = [len(turn.content) for turn in prompt.messages]
        if len(ids) >= MAX_CONTEXT:
            assert self._reading.wait(60), "nothing else ran while a long prompt was read"
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
        if adapter is not None and adapter not in self.loaded:
            self.dead = True
        self.prompts.append(token_ids)
        self.samplings.append(sampling)
        self.priorities.append(priority)
        if sampling.constraint == IMPOSSIBLE:
            violation = Violation(FIELDS[Regex], "cannot be held")
            raise InvalidRequestError([violation])
        if adapter is not None and adapter.startswith(tuple(self.broken)):
            raise ReplicaLostError("This adapter breaks.")
        first = 1000 if adapter is not None and adapter.startswith(tuple(self.astray)) else 0
        trial = request_id.startswith("trial")
        async with self._run(adapter or "base", self.trials if trial else self.running):
            for index in range(1, sampling.max_tokens + 1):
                self.check_health()
                last = index == sampling.max_tokens
                finish = Finish("length", len(token_ids), index) if last else None
                word = f"{adapter or 'base'} " * self.repeats
                for choice in range(sampling.n):
                    logprobs = () if sampling.logprobs is None else (scores(index, word, sampling),)
                    if self.impossible:
                        logprobs = tuple(map(without_others, logprobs))
                    yield Delta(word, (first + index,), logprobs, finish, choice)
                # The trial prompt of a load is not what a test holds up.
                if not trial:
                    await self._speaking.wait()
                await asyncio.sleep(0)

    def check_health(self) -> None:
        if self.dead:
            raise ReplicaLostError("The engine died.")

    async def close(self) -> None:
        self.dead = True

    @asynccontextmanager
    async def _run(self, name: str, beside: list[str]) -> AsyncGenerator[None, None]:
        beside.append(name)
        if len({*self.running, *self.trials} - {"base"}) > self.slots:
            self.dead = True
        await self._tell()
        try:
            yield
        finally:
            beside.remove(name)
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
