"""Requests of the scripts themselves: a smoke load, and probes where clients are too few."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy.stages.errors import GateError
from deploy.stages.gate_settings import Smoke
from deploy.stages.hosting import Running
from deploy.stages.settings import Stage
from manylora_client import AsyncClient
from manylora_client.errors import ClientError, PermissionDeniedError, UnauthenticatedError
from manylora_evaluator.row_settings import JsonlRows, RowSource
from manylora_evaluator.row_settings import Prompt as PromptSettings
from manylora_evaluator.rows import load_rows
from manylora_evaluator.suite import load_suite

Prompt = Sequence[Mapping[str, str]]
MOST_PROMPTS = 256


@dataclass(frozen=True)
class Asked:
    """How one request went."""

    first_token_s: float
    answer_s: float
    error: str = ""


@dataclass(frozen=True)
class Load:
    """How a load went."""

    asked: tuple[Asked, ...]

    @property
    def errors(self) -> list[str]:
        """What failed requests failed with."""
        return [one.error for one in self.asked if one.error]

    @property
    def first_token_p95_s(self) -> float:
        """Of the answered ones; 0 where there are none."""
        return _p95([one.first_token_s for one in self.asked if not one.error])

    @property
    def answer_p95_s(self) -> float:
        """The same to the whole answer."""
        return _p95([one.answer_s for one in self.asked if not one.error])

    def broken(self, bounds: Smoke) -> list[str]:
        """Which bounds it broke."""
        reasons: list[str] = []
        # Divided, as 0.29 times 100 is a little less than 29.
        if len(self.errors) / len(self.asked) > bounds.errors:
            reasons.append(
                f"{len(self.errors)} of {len(self.asked)} requests of the smoke load failed, the "
                f"first with: {self.errors[0]}"
            )
        for what, value, limit in (
            ("the first token", self.first_token_p95_s, bounds.first_token_p95_s),
            ("an answer", self.answer_p95_s, bounds.answer_p95_s),
        ):
            if limit is not None and value > limit:
                reasons.append(
                    f"{what} takes {value:.2f} s under the smoke load (95th percentile), {limit:g} "
                    "s may be"
                )
        return reasons


class Prompts:
    """What the scripts ask, one after the other and over again."""

    def __init__(self, stage: Stage, name: str) -> None:
        found = list(itertools.islice(_prompts(stage, name), MOST_PROMPTS))
        if not found:
            raise GateError(
                f"{stage.directory}/gates.yaml has no prompts for {name}: give `prompts`, or a "
                "suite with a task for it"
            )
        self._next = itertools.cycle(found)

    def take(self, count: int) -> list[Prompt]:
        """The next `count`."""
        return list(itertools.islice(self._next, count))


def send(
    running: Running,
    token: str | None,
    requests: Sequence[tuple[str, Prompt]],
    *,
    concurrency: int,
    timeout_s: float,
    max_tokens: int,
) -> Load:
    """Asks each reference its prompt.

    Raises:
        UnauthenticatedError, PermissionDeniedError: the scripts themselves may not ask.
    """
    return asyncio.run(_send(running, token, requests, concurrency, timeout_s, max_tokens))


async def _send(
    running: Running,
    token: str | None,
    requests: Sequence[tuple[str, Prompt]],
    concurrency: int,
    timeout_s: float,
    max_tokens: int,
) -> Load:
    seats = asyncio.Semaphore(concurrency)
    async with AsyncClient(running.inference, token=token, timeout=timeout_s) as client:

        async def ask(reference: str, prompt: Prompt) -> Asked:
            async with seats:
                began = time.monotonic()
                first: float | None = None
                try:
                    async for _ in client.stream(prompt, reference, max_tokens=max_tokens):
                        first = first or time.monotonic() - began
                except (UnauthenticatedError, PermissionDeniedError):
                    raise
                except ClientError as error:
                    return Asked(0, 0, str(error))
                took = time.monotonic() - began
                return Asked(took if first is None else first, took)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(*request)) for request in requests]
    return Load(tuple(task.result() for task in tasks))


def _prompts(stage: Stage, name: str) -> Iterator[Prompt]:
    gates = stage.gates
    if gates.prompts is not None:
        yield from _read(JsonlRows(kind="jsonl", path=gates.prompts))
        return
    for entry in gates.suites:
        for task in load_suite(entry.path).tasks:
            if task.adapter.partition("@")[0] == name:
                yield from _read(task.rows, task.prompt)


def _read(rows: RowSource, prompt: PromptSettings | None = None) -> Iterator[Prompt]:
    # As evaluations read them, so that probes ask what those ask.
    for row in load_rows(rows, prompt, MOST_PROMPTS):
        yield [message.model_dump() for message in row.messages]


def _p95(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0.0
