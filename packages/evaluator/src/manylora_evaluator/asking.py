"""Asks a gateway every row of a task."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from manylora_client import AdapterVersion, AsyncClient, ClientError, Generation
from manylora_evaluator.rows import Row
from manylora_evaluator.suite import Task

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Reply:
    """How one request ended: with an answer, or with what it failed with."""

    generation: Generation | None
    error: str | None
    seconds: float

    @property
    def text(self) -> str:
        """A failed request is an empty answer: no score looks better for it."""
        return "" if self.generation is None else self.generation.text


@dataclass(frozen=True)
class Replies:
    """One model's answers to every row."""

    reference: str
    """As asked for; empty: the bare base."""
    version: AdapterVersion | None
    """What it was resolved to, once, before the first row."""
    replies: Sequence[Reply]
    seconds: float
    """From the first request's start to the last answer's end."""


async def ask_rows(
    client: AsyncClient,
    task: Task,
    reference: str,
    rows: Sequence[Row],
    concurrency: int,
    progress: Progress,
) -> Replies:
    """Asks every row of `reference`.

    Raises:
        StatusError: the server is away or cannot serve the reference; seen before the first row.
    """
    # A first request before the clock starts: it fails at once where the server is away or the
    # reference unknown, keeps loading the adapter out of the latencies, and resolves an alias,
    # which may be moved while the rows are asked.
    version = (await client.generate(_prompt(rows[0]), reference, max_tokens=1)).adapter
    pinned = "" if version is None else f"{version.name}@{version.digest}"
    bar = progress.add_task(f"{task.name} · {reference or 'bare base'}", total=len(rows))

    async def ask(row: Row) -> Reply:
        begun = time.monotonic()
        try:
            answer = await client.generate(_prompt(row), pinned, max_tokens=task.max_tokens)
        except ClientError as error:
            return Reply(None, str(error), time.monotonic() - begun)
        finally:
            progress.advance(bar)
        return Reply(answer, None, time.monotonic() - begun)

    begun = time.monotonic()
    replies = await in_parallel(rows, ask, concurrency)
    return Replies(reference, version, replies, time.monotonic() - begun)


async def in_parallel(
    items: Sequence[Item], work: Callable[[Item], Awaitable[Outcome]], workers: int
) -> list[Outcome]:
    """The outcomes of `work` on `items`, in their order, with so many `workers` at a time."""
    outcomes: dict[int, Outcome] = {}
    remaining = iter(enumerate(items))

    async def worker() -> None:
        for index, item in remaining:
            outcomes[index] = await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(workers, len(items))):
            group.create_task(worker())
    return [outcomes[index] for index in range(len(items))]


def progress_bars(console: Console | None) -> Progress:
    """Bars on `console`; None: none are shown."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=console is None,
    )


def _prompt(row: Row) -> list[Mapping[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.messages]
