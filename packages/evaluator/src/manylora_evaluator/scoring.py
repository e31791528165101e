"""Prepares a task's rows and scorers, and makes its result of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manylora_evaluator.asking import Replies, Reply
from manylora_evaluator.bootstrap import estimate
from manylora_evaluator.errors import RowsError, SuiteError
from manylora_evaluator.results import (
    Column,
    Output,
    RowResult,
    Score,
    Slice,
    TaskResult,
    Version,
)
from manylora_evaluator.rows import Row, load_rows
from manylora_evaluator.scorers import make_scorer
from manylora_evaluator.scorers.classification import Classification
from manylora_evaluator.scorers.tally import Scorer, Tallies, ratio
from manylora_evaluator.suite import Task, Threshold
from manylora_evaluator.verdicts import ThresholdCheck

MISSING = "(none)"
"""Slice of rows that lack its column."""

RowTallies = Mapping[str, Tallies]
"""One row's share of every score."""


@dataclass(frozen=True)
class PreparedTask:
    """A task whose rows are read and found fit for its scorers."""

    settings: Task
    rows: Sequence[Row]
    scorers: Sequence[Scorer]
    """Those that need no model."""
    scores: Sequence[str]
    """Every score there will be, the chief one first."""


def prepare(task: Task, limit: int | None) -> PreparedTask:
    """Reads the rows of `task`, at most `limit`, and makes its scorers; nothing is asked.

    Raises:
        RowsError: a row is malformed, or no scorer can use it.
        FixtureError: the script of a database fails.
        SuiteError: a threshold or a comparison names no score, or a slice no column.
    """
    rows = load_rows(task.rows, task.prompt, limit or task.limit)
    made = [(settings, make_scorer(settings, rows)) for settings in task.scorers]
    scorers = [scorer for _, scorer in made if scorer is not None]
    for row in rows:
        for settings, scorer in made:
            problem = None if scorer is None else scorer.unfit(row)
            if problem is not None:
                raise RowsError(
                    task.rows.file, f"expected: {problem}, which {settings.name} needs", row.number
                )
    names = [name for _, scorer in made if scorer is not None for name in scorer.names]
    _check_names(task, rows, names)
    # json_valid comes with json_field_f1 too.
    return PreparedTask(task, rows, scorers, list(dict.fromkeys(names)))


def _check_names(task: Task, rows: Sequence[Row], scores: Sequence[str]) -> None:
    wanted = [*(threshold.score for threshold in task.thresholds), *task.compare]
    unknown = [name for name in wanted if name not in scores]
    if unknown:
        raise SuiteError(
            f"task {task.name!r} has no score {', '.join(unknown)}; it has {', '.join(scores)}"
        )
    missing = [name for name in task.slices if not any(name in row.columns for row in rows)]
    if missing:
        raise SuiteError(
            f"task {task.name!r} is to be sliced by {', '.join(missing)}, which none of the rows "
            f"of {task.rows.file} has"
        )


def task_result(task: PreparedTask, columns: Sequence[Replies], seed: int) -> TaskResult:
    """Scores every column of `task`, the bare base first."""
    tallied = [
        [_tally(task, row, reply) for row, reply in zip(task.rows, column.replies, strict=True)]
        for column in columns
    ]
    return TaskResult(
        task=task.settings.name,
        columns=tuple(
            _column(task, replies, rows, seed)
            for replies, rows in zip(columns, tallied, strict=True)
        ),
        rows=tuple(
            RowResult(
                id=row.id,
                messages=row.messages,
                expected=row.expected,
                outputs=tuple(
                    _output(column.reference, column.replies[index], rows[index])
                    for column, rows in zip(columns, tallied, strict=True)
                ),
                slices=_slices_of(task.settings, row),
            )
            for index, row in enumerate(task.rows)
        ),
        compare=tuple(task.settings.compare) or (task.scores[0],),
        slices=_slices(task, tallied, seed),
    )


def _tally(task: PreparedTask, row: Row, reply: Reply) -> RowTallies:
    return {
        name: tallies
        for scorer in task.scorers
        for name, tallies in scorer.score(reply.text, row).items()
    }


def _column(
    task: PreparedTask, column: Replies, tallied: Sequence[RowTallies], seed: int
) -> Column:
    answers = [reply.generation for reply in column.replies if reply.generation is not None]
    latencies = [reply.seconds for reply in column.replies if reply.generation is not None]
    p50, p95 = np.quantile(latencies or [0.0], [0.5, 0.95])
    version = column.version
    scores = _estimates(task, tallied, seed)
    return Column(
        adapter=column.reference,
        version=None if version is None else Version(version.name, version.number, version.digest),
        scores=scores,
        requests=len(column.replies),
        failures=len(column.replies) - len(answers),
        prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.usage.completion_tokens for answer in answers),
        seconds=column.seconds,
        latency_p50=float(p50),
        latency_p95=float(p95),
        thresholds=()
        if version is None
        else tuple(check(entry, scores[entry.score]) for entry in task.settings.thresholds),
        reports=tuple(
            scorer.report(
                [
                    (row.expected, reply.text)
                    for row, reply in zip(task.rows, column.replies, strict=True)
                ]
            )
            for scorer in task.scorers
            if isinstance(scorer, Classification)
        ),
    )


def _estimates(task: PreparedTask, tallied: Sequence[RowTallies], seed: int) -> Mapping[str, Score]:
    return {name: estimate([row[name] for row in tallied], seed) for name in task.scores}


def check(threshold: Threshold, score: Score) -> ThresholdCheck:
    """Holds `threshold` against `score`."""
    value = {"mean": score.mean, "low": score.low, "high": score.high}[threshold.bound]
    name = threshold.score if threshold.bound == "mean" else f"{threshold.bound} {threshold.score}"
    if threshold.at_least is not None and value < threshold.at_least:
        return ThresholdCheck(
            threshold, value, False, f"{name} {value:.3f} is below {threshold.at_least:.3f}"
        )
    if threshold.at_most is not None and value > threshold.at_most:
        return ThresholdCheck(
            threshold, value, False, f"{name} {value:.3f} is above {threshold.at_most:.3f}"
        )
    return ThresholdCheck(threshold, value, True, f"{name} {value:.3f} is within its bounds")


def _slices_of(task: Task, row: Row) -> Mapping[str, str]:
    return {name: str(row.columns.get(name, MISSING)) for name in task.slices}


def _slices(
    task: PreparedTask, tallied: Sequence[Sequence[RowTallies]], seed: int
) -> tuple[Slice, ...]:
    slices: list[Slice] = []
    for name in task.settings.slices:
        values = [_slices_of(task.settings, row)[name] for row in task.rows]
        for value in sorted(set(values)):
            chosen = [index for index, own in enumerate(values) if own == value]
            scores = tuple(
                _estimates(task, [column[index] for index in chosen], seed) for column in tallied
            )
            slices.append(Slice(name, value, len(chosen), scores))
    return tuple(slices)


def _output(reference: str, reply: Reply, tallies: RowTallies) -> Output:
    answer = reply.generation
    return Output(
        adapter=reference,
        text=reply.text,
        error=reply.error,
        finish_reason=None if answer is None else answer.finish_reason,
        prompt_tokens=0 if answer is None else answer.usage.prompt_tokens,
        completion_tokens=0 if answer is None else answer.usage.completion_tokens,
        seconds=reply.seconds,
        scores={name: ratio(shares) for name, shares in tallies.items()},
        tallies=tallies,
    )
