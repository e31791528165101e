"""Asks every row of a suite of the bare base and of adapters, and scores the answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from manylora_client import AsyncClient, ClientError, Generation
from manylora_evaluator.bootstrap import estimate
from manylora_evaluator.errors import EvaluationFailedError, UnknownTaskError
from manylora_evaluator.report import write_report
from manylora_evaluator.results import (
    Column,
    EvaluationResult,
    Output,
    RowResult,
    TaskResult,
    Version,
)
from manylora_evaluator.rows import Row, load_rows
from manylora_evaluator.scorers import SCORERS, Tally
from manylora_evaluator.suite import Suite, Task, load_suite

BARE_BASE = ""
RETRIES = 3
"""Times a row is asked again where the server is draining and says when to come back."""


def evaluate(
    suite_path: Path,
    server: str | None = None,
    adapters: Sequence[str] = (),
    out: Path | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Evaluates the suite at `suite_path` with the gateway at `server`.

    Args:
        suite_path: YAML, see suite.py.
        server: HOST:PORT; None: MANYLORA_SERVER, or 127.0.0.1:50051.
        adapters: references scored in each task beside the bare base and the task's own.
        out: directory for results.json and report.html; None: nothing is written.
        tasks: names of the tasks to run; empty: all.
        limit: most rows of a task; None: as the suite says.
        console: where progress bars go; None: nowhere.

    Raises:
        ConfigError: the suite is wrong.
        RowsError: a row is malformed; nothing was asked.
        UnknownTaskError: the suite has no task of a name in `tasks`.
        StatusError: the server is away or cannot serve an adapter; seen before its first row.
        EvaluationFailedError: requests failed. The result, which it carries, is written.
    """
    suite = load_suite(suite_path)
    chosen = _chosen(suite, tasks)
    rows = [load_rows(task.rows, task.scorers, limit or task.limit) for task in chosen]
    result = asyncio.run(
        _evaluate(suite, list(zip(chosen, rows, strict=True)), server, adapters, console)
    )
    if out is not None:
        write_report(result, out)
    if result.failures:
        raise EvaluationFailedError(_failure(result), result)
    return result


def _chosen(suite: Suite, names: Sequence[str]) -> list[Task]:
    known = [task.name for task in suite.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownTaskError(
            f"suite {suite.name!r} has no task {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return [task for task in suite.tasks if not names or task.name in names]


def _failure(result: EvaluationResult) -> str:
    outputs = (output for task in result.tasks for row in task.rows for output in row.outputs)
    first = next(output.error for output in outputs if output.error is not None)
    return (
        f"{result.failures} of {result.requests} requests failed and count as wrong answers; "
        f"the first with: {first}"
    )


async def _evaluate(
    suite: Suite,
    tasks: Sequence[tuple[Task, Sequence[Row]]],
    server: str | None,
    adapters: Sequence[str],
    console: Console | None,
) -> EvaluationResult:
    started_at, begun = datetime.now(UTC), time.monotonic()
    results: list[TaskResult] = []
    async with AsyncClient(server, timeout=suite.timeout, retries=RETRIES) as client:
        with _progress(console) as progress:
            for task, rows in tasks:
                # dict: each reference once, in this order.
                references = dict.fromkeys([BARE_BASE, task.adapter, *adapters])
                # One after the other, so that each column's seconds are its own.
                columns = [
                    await _column(client, suite, task, reference, rows, progress)
                    for reference in references
                ]
                results.append(_task_result(task, rows, columns))
    return EvaluationResult(
        suite=suite.name,
        server=client.target,
        started_at=started_at,
        seconds=time.monotonic() - begun,
        seed=suite.seed,
        tasks=tuple(results),
    )


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=console is None,
    )


def _task_result(
    task: Task, rows: Sequence[Row], columns: Sequence[tuple[Column, Sequence[Output]]]
) -> TaskResult:
    outputs = zip(*(outputs for _, outputs in columns), strict=True)
    return TaskResult(
        task=task.name,
        columns=tuple(column for column, _ in columns),
        rows=tuple(
            RowResult(row.messages, row.expected, beside)
            for row, beside in zip(rows, outputs, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Reply:
    """How one request ended: with an answer, or with what it failed with."""

    generation: Generation | None
    error: str | None
    seconds: float


async def _column(
    client: AsyncClient,
    suite: Suite,
    task: Task,
    reference: str,
    rows: Sequence[Row],
    progress: Progress,
) -> tuple[Column, list[Output]]:
    """Asks every row of `reference`."""
    # A first request before the clock starts: it fails at once where the server is away or the
    # reference unknown, keeps loading the adapter out of the latencies, and resolves an alias,
    # which may be moved while the rows are asked.
    version = (await client.generate(_prompt(rows[0]), reference, max_tokens=1)).adapter
    pinned = BARE_BASE if version is None else f"{version.name}@{version.digest}"
    bar = progress.add_task(f"{task.name} · {reference or 'bare base'}", total=len(rows))

    async def ask(row: Row) -> _Reply:
        begun = time.monotonic()
        try:
            answer = await client.generate(_prompt(row), pinned, max_tokens=task.max_tokens)
        except ClientError as error:
            return _Reply(None, str(error), time.monotonic() - begun)
        finally:
            progress.advance(bar)
        return _Reply(answer, None, time.monotonic() - begun)

    begun = time.monotonic()
    replies = await _in_parallel(rows, ask, suite.concurrency)
    seconds = time.monotonic() - begun
    tallies = [_tallies(task, row, reply) for row, reply in zip(rows, replies, strict=True)]
    answers = [reply.generation for reply in replies if reply.generation is not None]
    latencies = [reply.seconds for reply in replies if reply.generation is not None]
    p50, p95 = np.quantile(latencies or [0.0], [0.5, 0.95])
    column = Column(
        adapter=reference,
        version=None if version is None else Version(version.name, version.number, version.digest),
        scores={
            name: estimate([tally[name] for tally in tallies], suite.seed) for name in tallies[0]
        },
        requests=len(rows),
        failures=len(rows) - len(answers),
        prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.usage.completion_tokens for answer in answers),
        seconds=seconds,
        latency_p50=float(p50),
        latency_p95=float(p95),
    )
    outputs = [
        _output(reference, reply, tally) for reply, tally in zip(replies, tallies, strict=True)
    ]
    return column, outputs


async def _in_parallel(
    rows: Sequence[Row], ask: Callable[[Row], Awaitable[_Reply]], workers: int
) -> list[_Reply]:
    """The replies to `rows`, in their order, with so many `workers` asking at a time."""
    replies: dict[int, _Reply] = {}
    remaining = iter(enumerate(rows))

    async def work() -> None:
        for index, row in remaining:
            replies[index] = await ask(row)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(workers, len(rows))):
            group.create_task(work())
    return [replies[index] for index in range(len(rows))]


def _tallies(task: Task, row: Row, reply: _Reply) -> Mapping[str, Tally]:
    # A failed request is scored as an empty answer: no score looks better for it.
    text = "" if reply.generation is None else reply.generation.text
    return {
        name: tally
        for scorer in task.scorers
        for name, tally in SCORERS[scorer].score(text, row.expected).items()
    }


def _output(reference: str, reply: _Reply, tallies: Mapping[str, Tally]) -> Output:
    answer = reply.generation
    return Output(
        adapter=reference,
        text="" if answer is None else answer.text,
        error=reply.error,
        finish_reason=None if answer is None else answer.finish_reason,
        prompt_tokens=0 if answer is None else answer.usage.prompt_tokens,
        completion_tokens=0 if answer is None else answer.usage.completion_tokens,
        seconds=reply.seconds,
        scores={
            name: tally.hits / tally.of if tally.of else None for name, tally in tallies.items()
        },
    )


def _prompt(row: Row) -> list[Mapping[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.messages]
