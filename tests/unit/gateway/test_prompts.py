"""Whose long prompt the engine computes next."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from manylora_gateway.config import EngineConfig
from manylora_gateway.engine import Delta, Sampling, TokenPrompt
from manylora_gateway.prompts import AT_ONCE, PromptTurns
from manylora_gateway.worker import Servable, Worker
from manylora_registry import Cache, Registry
from tests.unit.gateway.fake_engine import FakeEngine
from tests.unit.gateway.in_process import BASE, MAX_RANK

LONG, SHORT = 21, 20


class Prompt:
    """One that waits for its turn, and has it until it ends."""

    def __init__(self, turns: PromptTurns, tokens: int = LONG, priority: int = 0) -> None:
        self.end: Callable[[], None] | None = None
        self.task = asyncio.create_task(self._compute(turns, tokens, priority))

    @property
    def begun(self) -> bool:
        return self.end is not None

    async def _compute(self, turns: PromptTurns, tokens: int, priority: int) -> None:
        async with turns.turn(tokens, priority) as self.end:
            await asyncio.Event().wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def turns() -> PromptTurns:
    return PromptTurns(SHORT)


async def flood(turns: PromptTurns) -> list[Prompt]:
    """Prompts of one client that have all turns, and one more."""
    prompts = [Prompt(turns, priority=10 + number) for number in range(AT_ONCE + 1)]
    await settle()
    assert [prompt.begun for prompt in prompts] == [True] * AT_ONCE + [False]
    return prompts


async def test_who_uses_less_of_its_share_goes_first(turns: PromptTurns) -> None:
    first, *_, waiting = await flood(turns)
    other = Prompt(turns, priority=1)
    await settle()
    assert not other.begun
    assert first.end is not None
    first.end()
    await settle()
    assert (other.begun, waiting.begun) == (True, False)
    # Twice is once: its block ends as well.
    first.task.cancel()
    await settle()
    assert not waiting.begun


async def test_a_short_one_waits_for_nobody(turns: PromptTurns) -> None:
    await flood(turns)
    short = Prompt(turns, SHORT, priority=100)
    await settle()
    assert short.begun


async def test_all_go_at_once_where_nothing_is_long() -> None:
    prompts = [Prompt(PromptTurns(None)) for _ in range(AT_ONCE + 1)]
    await settle()
    assert all(prompt.begun for prompt in prompts)


async def test_who_leaves_gives_its_turn_on(turns: PromptTurns) -> None:
    first, second, waiting = await flood(turns)
    gone = Prompt(turns, priority=1)
    await settle()
    gone.task.cancel()
    await settle()
    first.task.cancel()
    await settle()
    assert waiting.begun
    # In the very moment it gets one.
    last, following = Prompt(turns, priority=1), Prompt(turns, priority=2)
    await settle()
    assert second.end is not None
    second.end()
    last.task.cancel()
    await settle()
    assert not last.begun
    assert following.begun


class Computing(FakeEngine):
    """One whose prompts are computed when the test says so."""

    def __init__(self) -> None:
        super().__init__(2)
        self.computing: list[int] = []
        """Tokens of the prompts it was given."""
        self.compute = asyncio.Event()

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Sampling,
        adapter: str | None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        self.computing.append(len(token_ids))
        await self.compute.wait()
        async for delta in super().generate(request_id, token_ids, sampling, adapter, priority):
            yield delta


async def test_a_workers_engine_is_given_few_long_prompts_at_once(
    registry: Registry, tmp_path: Path
) -> None:
    engine, config = Computing(), EngineConfig(slots=1, max_batched_tokens=3 * SHORT)
    servable, cache = Servable(BASE.fingerprint, MAX_RANK), Cache(tmp_path / "cache")
    worker = Worker("one", engine, registry, cache, servable, config)

    async def ask(tokens: int) -> list[Delta]:
        sampling = Sampling(max_tokens=2)
        prompt = TokenPrompt(tuple(range(tokens)))
        return [delta async for delta in worker.generate("one", prompt, sampling, None)]

    sizes = [LONG] * (AT_ONCE + 1) + [SHORT]
    asked = [asyncio.create_task(ask(tokens)) for tokens in sizes]
    await settle()
    assert engine.computing == [LONG] * AT_ONCE + [SHORT]
    # Once the first are computed the last is, though their answers have not ended.
    engine.hold_answers()
    engine.compute.set()
    await engine.until_running(len(sizes))
    engine.let_answer()
    assert all(await asyncio.gather(*asked))
    # Each with one seat more in their line.
    assert sorted(engine.priorities) == [100, 200, 300, 400]
