"""Asks every row of a suite of the bare base and of adapters, and scores the answers."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from manylora_client import AsyncClient
from manylora_evaluator.asking import Replies, ask_rows, progress_bars, resolve
from manylora_evaluator.errors import EvaluationFailedError, SuiteError, UnknownTaskError
from manylora_evaluator.gates import gate
from manylora_evaluator.judge.cache import Cache
from manylora_evaluator.judge.caller import Caller
from manylora_evaluator.judge.judging import EXPECTED, Judge
from manylora_evaluator.judge.model import open_model
from manylora_evaluator.kept import KeptAnswers
from manylora_evaluator.report import write_report
from manylora_evaluator.results import EvaluationResult, TaskResult
from manylora_evaluator.scorer_settings import JudgeSettings, PairwiseSettings
from manylora_evaluator.scoring import PreparedTask, prepare_all, task_result
from manylora_evaluator.suite import Suite, Task, load_suite
from manylora_evaluator.verdicts import Gate

BARE_BASE = ""
RETRIES = 3
"""Times a row is asked again where the server is full or draining and says when to come back."""


def evaluate(
    suite_path: Path,
    server: str | None = None,
    adapters: Sequence[str] = (),
    out: Path | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    baseline: str | None = None,
    only: bool = False,
    resume: bool = False,
    token: str | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Evaluates the suite at `suite_path` with the gateway at `server`.

    Args:
        suite_path: YAML, see suite.py.
        server: HOST:PORT; None: MANYLORA_SERVER, or 127.0.0.1:50051.
        adapters: references scored in each task beside the bare base and the task's own.
        out: directory for results.json and report.html, and for answers.jsonl and verdicts as
            long as some answer or verdict is missing; None: nothing is written.
        tasks: names of the tasks to run; empty: all.
        limit: most rows of a task; None: as the suite says.
        baseline: reference that is scored too and that no other adapter may be worse than; the
            result's gates tell.
        only: whether nobody is asked but `adapters`, the baseline (the bare base where there is
            none), and whom pairwise scorers set answers against: what a gate needs.
        resume: whether answers and verdicts that an earlier evaluation left in `out` are used
            again, so that only what it did not get is asked. An adapter is known by its digest,
            the bare base by the server's address.
        token: what the gateway is shown; None: MANYLORA_TOKEN.
        console: where progress bars go; None: nowhere.

    Raises:
        ConfigError: the suite is wrong.
        RowsError, FixtureError, SuiteError: so are its rows, or they do not fit its scorers;
            nothing was asked.
        UnknownTaskError: the suite has no task of a name in `tasks`.
        ResultsError: `out` cannot be written, or another evaluation writes into it; seen before
            anything is asked.
        JudgeError: a judge lacks its key, or cannot write its cache.
        JudgeRefusesError: its key or address is wrong, as its first answers say.
        StatusError: the server is away or cannot serve an adapter; seen before any row is asked.
        EvaluationFailedError: requests failed. The result, which it carries, is written.
        ReportError: the result, which it carries, could not be written.
    """
    suite = load_suite(suite_path)
    prepared = prepare_all(_chosen(suite, tasks), limit)
    if not only:
        _check_opponents(prepared, adapters, baseline)
    asked = {task.settings.name: _asked(task, adapters, baseline, only) for task in prepared}
    keeping = nullcontext() if out is None else closing(KeptAnswers(out, resume=resume))
    with keeping as kept:
        result = asyncio.run(_evaluate(suite, prepared, server, token, asked, kept, console))
        result = replace(result, gates=_gates(result, adapters, baseline))
        if out is not None:
            write_report(result, out)
        if result.failures or result.judge_failures:
            raise EvaluationFailedError(_failure(result), result)
        if kept is not None:
            kept.discard()
        return result


def _chosen(suite: Suite, names: Sequence[str]) -> list[Task]:
    known = [task.name for task in suite.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownTaskError(
            f"suite {suite.name!r} has no task {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return [task for task in suite.tasks if not names or task.name in names]


def _asked(
    task: PreparedTask, adapters: Sequence[str], baseline: str | None, only: bool
) -> list[str]:
    """The references of a task's columns, each once."""
    named = [*([] if baseline is None else [baseline]), *adapters]
    if not only:
        return [*dict.fromkeys([BARE_BASE, task.settings.adapter, *named])]
    beside = BARE_BASE if baseline is None else baseline
    return [*dict.fromkeys([beside, *_opponents(task), *named])]


def _opponents(task: PreparedTask) -> dict[str, str]:
    """Whom scorers set answers against, each with the scorer's name."""
    return {
        scorer.against: scorer.name
        for scorer in task.settings.scorers
        if isinstance(scorer, PairwiseSettings) and scorer.against != EXPECTED
    }


def _check_opponents(
    tasks: Sequence[PreparedTask], adapters: Sequence[str], baseline: str | None
) -> None:
    for task in tasks:
        answered = {BARE_BASE, task.settings.adapter, *adapters, baseline}
        for opponent, scorer in _opponents(task).items():
            if opponent not in answered:
                raise SuiteError(
                    f"task {task.settings.name!r}: {scorer} sets answers against {opponent}, which "
                    f"is not evaluated; add --adapter {opponent}"
                )


def _gates(
    result: EvaluationResult, adapters: Sequence[str], baseline: str | None
) -> tuple[Gate, ...]:
    """Gates of the adapters that are candidates: those named, else each task's own."""
    stated = any(column.thresholds for task in result.tasks for column in task.columns)
    if baseline is None and not stated:
        return ()
    own = (column.adapter for task in result.tasks for column in task.columns[1:])
    candidates = dict.fromkeys(adapters or own)
    return tuple(
        gate(result, candidate, baseline) for candidate in candidates if candidate != baseline
    )


def _failure(result: EvaluationResult) -> str:
    outputs = [output for task in result.tasks for row in task.rows for output in row.outputs]
    if result.failures:
        first = next(output.error for output in outputs if output.error is not None)
        return (
            f"{result.failures} of {result.requests} requests failed and count as wrong answers; "
            f"the first with: {first}"
        )
    errors = (word.error for output in outputs for word in output.judgements.values())
    first = next((error for error in errors if error is not None), "a labelled answer")
    return (
        f"the judge did not answer {result.judge_failures} questions, which count as failed "
        f"answers; the first with: {first}"
    )


async def _evaluate(
    suite: Suite,
    tasks: Sequence[PreparedTask],
    server: str | None,
    token: str | None,
    asked: Mapping[str, Sequence[str]],
    kept: KeptAnswers | None,
    console: Console | None,
) -> EvaluationResult:
    started_at, begun = datetime.now(UTC), time.monotonic()
    results: list[TaskResult] = []
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            AsyncClient(server, token=token, timeout=suite.timeout, retries=RETRIES)
        )
        verdicts = None if kept is None else kept.verdicts
        callers = await _callers(suite, tasks, client.target, token, verdicts, stack)
        # All of them first: an alias may be moved while the rows are asked, and a reference that
        # cannot be served costs nobody's answers.
        rows = {name: task.rows[0] for task in tasks for name in asked[task.settings.name]}
        versions = {name: await resolve(client, name, row) for name, row in rows.items()}
        with progress_bars(console) as progress:
            for task in tasks:
                # One after the other, so that each column's seconds are its own.
                columns = [
                    await ask_rows(
                        client,
                        task.settings,
                        reference,
                        versions[reference],
                        task.rows,
                        suite.concurrency,
                        progress,
                        kept,
                    )
                    for reference in asked[task.settings.name]
                ]
                judges = [
                    Judge(settings, callers[settings.by], _bar(progress, task, settings, columns))
                    for settings in task.settings.scorers
                    if isinstance(settings, JudgeSettings | PairwiseSettings)
                ]
                results.append(await task_result(task, columns, judges, suite.seed))
    return EvaluationResult(
        suite=suite.name,
        server=client.target,
        started_at=started_at,
        seconds=time.monotonic() - begun,
        seed=suite.seed,
        decision=suite.decision,
        tasks=tuple(results),
        judges=tuple(caller.usage(name) for name, caller in callers.items()),
    )


def _bar(
    progress: Progress,
    task: PreparedTask,
    settings: JudgeSettings | PairwiseSettings,
    columns: Sequence[Replies],
) -> Callable[[], None]:
    """Shows a bar for all answers one scorer judges; returns what moves it on."""
    answers = len(task.rows) * len(columns) + len(task.labelled.get(settings.name, ()))
    bar = progress.add_task(f"{task.settings.name} · {settings.name}", total=answers)
    return functools.partial(progress.advance, bar)


async def _callers(
    suite: Suite,
    tasks: Sequence[PreparedTask],
    server: str,
    token: str | None,
    verdicts: Path | None,
    stack: AsyncExitStack,
) -> dict[str, Caller]:
    """A caller for every judge that these tasks use; `verdicts` is for those without a cache."""
    used = {
        scorer.by
        for task in tasks
        for scorer in task.settings.scorers
        if isinstance(scorer, JudgeSettings | PairwiseSettings)
    }
    judges = {name: settings for name, settings in suite.judges.items() if name in used}
    kept = None
    if verdicts is not None and any(settings.cache is None for settings in judges.values()):
        kept = Cache(verdicts)
    asked_before = set[str]() if kept is None else kept.keys()
    return {
        name: Caller(
            settings,
            await stack.enter_async_context(open_model(settings, server, token)),
            kept,
            asked_before,
        )
        for name, settings in judges.items()
    }
