"""Asks a gateway every row of a task."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from manylora_client import (
    AdapterVersion,
    AsyncClient,
    ClientError,
    DeadlineExceededError,
    Generation,
    Usage,
)
from manylora_evaluator.kept import KeptAnswer, KeptAnswers, content_key
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
    """What it was resolved to, once, before anything was asked."""
    replies: Sequence[Reply]
    seconds: float
    """From the first request's start to the last answer's end; for answers kept from an earlier
    evaluation their share of that one's time."""


async def resolve(client: AsyncClient, reference: str, row: Row) -> AdapterVersion | None:
    """What `reference` means now; None: the bare base.

    The request that tells it also loads the adapter, which so is no part of the latencies where
    the server has room for all that are asked.

    Raises:
        StatusError: the server is away or cannot serve the reference.
    """
    try:
        return (await client.generate(_prompt(row), reference, max_tokens=1)).adapter
    except DeadlineExceededError as error:
        # All others that are about a reference name it; this one comes of loading it.
        message = f"{reference or 'the bare base'}: {error}"
        raise DeadlineExceededError(message, code=error.code, reason=error.reason) from error


async def ask_rows(
    client: AsyncClient,
    task: Task,
    reference: str,
    version: AdapterVersion | None,
    rows: Sequence[Row],
    concurrency: int,
    progress: Progress,
    kept: KeptAnswers | None = None,
) -> Replies:
    """Asks every row of the `version` that `reference` means, but for those that are `kept`."""
    pinned = "" if version is None else f"{version.name}@{version.digest}"
    bar = progress.add_task(f"{task.name} · {reference or 'bare base'}", total=len(rows))

    earlier = 0.0

    async def ask(row: Row) -> Reply:
        nonlocal earlier
        asked = {"messages": _prompt(row), "max_tokens": task.max_tokens}
        key = content_key(asked | {"model": pinned or f"{client.target} bare base"})
        known = None if kept is None else kept.get(key)
        if known is not None:
            progress.advance(bar)
            earlier += known.seconds
            return Reply(_as_generated(known, version), None, known.seconds)
        begun = time.monotonic()
        try:
            answer = await client.generate(_prompt(row), pinned, max_tokens=task.max_tokens)
        except ClientError as error:
            return Reply(None, str(error), time.monotonic() - begun)
        finally:
            progress.advance(bar)
        reply = Reply(answer, None, time.monotonic() - begun)
        if kept is not None:
            kept.put(_to_keep(key, answer, reply.seconds))
        return reply

    begun = time.monotonic()
    replies = await in_parallel(rows, ask, concurrency)
    return Replies(reference, version, replies, time.monotonic() - begun + earlier / concurrency)


def _to_keep(key: str, answer: Generation, seconds: float) -> KeptAnswer:
    return KeptAnswer(
        key=key,
        text=answer.text,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.usage.prompt_tokens,
        completion_tokens=answer.usage.completion_tokens,
        seconds=seconds,
    )


def _as_generated(answer: KeptAnswer, version: AdapterVersion | None) -> Generation:
    return Generation(
        text=answer.text,
        token_ids=(),
        adapter=version,
        finish_reason=answer.finish_reason,
        usage=Usage(answer.prompt_tokens, answer.completion_tokens),
        logprobs=(),
        request_id="",
    )


async def in_parallel(
    items: Sequence[Item], work: Callable[[Item], Awaitable[Outcome]], workers: int
) -> list[Outcome]:
    """The outcomes of `work` on `items`, in their order, with so many `workers` at a time.

    What one of them raises ends the others.
    """
    outcomes: dict[int, Outcome] = {}
    remaining = iter(enumerate(items))

    async def worker() -> None:
        for index, item in remaining:
            outcomes[index] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workers, len(items))):
                group.create_task(worker())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
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
