"""Prepares a task's rows and scorers, and makes its result of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manylora_evaluator.asking import Replies, Reply
from manylora_evaluator.bootstrap import ROUNDING, by_prompt, estimate
from manylora_evaluator.errors import EvaluatorError, RowsError, SuiteError
from manylora_evaluator.judge.agreement import agreement
from manylora_evaluator.judge.judging import EXPECTED, Judge, Judgements, tallies_of
from manylora_evaluator.judge.labels import LabelledAnswer, load_labels
from manylora_evaluator.judgements import Agreement, Judgement
from manylora_evaluator.results import (
    Column,
    Output,
    RowResult,
    Score,
    Slice,
    TaskResult,
    Version,
)
from manylora_evaluator.rows import Row, load_rows, text_of
from manylora_evaluator.scorer_settings import (
    AnyScorer,
    ClassificationSettings,
    ExactMatchSettings,
    JudgeSettings,
    NormalisedMatchSettings,
    NumericSettings,
    PairwiseSettings,
    RegexSettings,
    SqlSettings,
)
from manylora_evaluator.scorers import make_scorer
from manylora_evaluator.scorers.classification import Classification
from manylora_evaluator.scorers.tally import Scorer, Tallies, one, ratio
from manylora_evaluator.suite import Task, Threshold
from manylora_evaluator.verdicts import ThresholdCheck

RIGHT = one(True)
RIGHT_OR_WRONG = (
    ExactMatchSettings,
    NormalisedMatchSettings,
    ClassificationSettings,
    NumericSettings,
    RegexSettings,
    SqlSettings,
)
"""Scorers that tell right answers from wrong ones, as a judge does."""
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
    labelled: Mapping[str, Sequence[LabelledAnswer]]
    """Answers to measure a judge by, by the name of its scorer."""
    scores: Sequence[str]
    """Every score there will be, the chief one first."""


def prepare_all(tasks: Sequence[Task], limit: int | None) -> list[PreparedTask]:
    """`prepare` for each of `tasks`; what is wrong with several of them is told at once.

    Raises:
        RowsError, FixtureError, SuiteError: as `prepare` does, of the one task that has mistakes.
        SuiteError: of several, with the mistakes of them all.
    """
    prepared: list[PreparedTask] = []
    wrong: list[EvaluatorError] = []
    for task in tasks:
        try:
            prepared.append(prepare(task, limit))
        except EvaluatorError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise SuiteError("; ".join(dict.fromkeys(map(str, wrong))))
    return prepared


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
    names = [
        name
        for settings, scorer in made
        for name in (_judged_names(settings) if scorer is None else scorer.names)
    ]
    _check_names(task, rows, names)
    for settings in task.scorers:
        needs_expected = isinstance(settings, PairwiseSettings) and settings.against == EXPECTED
        bare = next((row for row in rows if needs_expected and not row.expected), None)
        if bare is not None:
            problem = f"expected: is empty, which {settings.name} needs"
            raise RowsError(task.rows.file, problem, bare.number)
    labelled = {
        settings.name: load_labels(settings)
        for settings in task.scorers
        if isinstance(settings, JudgeSettings)
    }
    # json_valid comes with json_field_f1 too.
    return PreparedTask(task, rows, scorers, labelled, list(dict.fromkeys(names)))


def _judged_names(settings: AnyScorer) -> Sequence[str]:
    if isinstance(settings, JudgeSettings):
        return [settings.name, *(f"{settings.name}.{name}" for name in settings.criteria)]
    return [settings.name]


def _check_names(task: Task, rows: Sequence[Row], scores: Sequence[str]) -> None:
    wanted = [*(threshold.score for threshold in task.thresholds), *task.compare]
    problems: list[str] = []
    if unknown := [name for name in wanted if name not in scores]:
        problems.append(f"has no score {', '.join(unknown)}; it has {', '.join(scores)}")
    if missing := [name for name in task.slices if not any(name in row.columns for row in rows)]:
        problems.append(
            f"is to be sliced by {', '.join(missing)}, which none of the rows of "
            f"{task.rows.file} has"
        )
    if problems:
        raise SuiteError(f"task {task.name!r} {'; and '.join(problems)}")


async def task_result(
    task: PreparedTask, columns: Sequence[Replies], judges: Sequence[Judge], seed: int
) -> TaskResult:
    """Scores every column of `task`, the one others are told beside first."""
    judged = [await _judged(task, columns, index, judges) for index in range(len(columns))]
    tallied = [
        [
            {**_tally(task, row, reply), **tallies_of(judgements)}
            for row, reply, judgements in zip(task.rows, column.replies, words, strict=True)
        ]
        for column, words in zip(columns, judged, strict=True)
    ]
    labelled = [
        entry
        for judge in judges
        for entry in await judge.labelled(task.labelled.get(judge.settings.name, ()), seed)
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
                    _output(column.reference, column.replies[index], rows[index], words[index])
                    for column, rows, words in zip(columns, tallied, judged, strict=True)
                ),
                slices=_slices_of(task.settings, row),
            )
            for index, row in enumerate(task.rows)
        ),
        compare=tuple(task.settings.compare) or (task.scores[0],),
        slices=_slices(task, tallied, seed),
        max_tokens=task.settings.max_tokens,
        agreements=(*labelled, *_beside_scorers(task, judges, tallied, seed)),
    )


async def _judged(
    task: PreparedTask, columns: Sequence[Replies], index: int, judges: Sequence[Judge]
) -> list[Judgements]:
    """What every judge says of one column's answers."""
    words: list[dict[str, Judgement]] = [{} for _ in task.rows]
    for judge in judges:
        for own, said in zip(words, await judge.column(task.rows, columns, index), strict=True):
            own.update(said)
    return list(words)


def _beside_scorers(
    task: PreparedTask,
    judges: Sequence[Judge],
    tallied: Sequence[Sequence[RowTallies]],
    seed: int,
) -> list[Agreement]:
    """How far judges agree with the scorers that pass or fail without a model."""
    rows = [row for column in tallied for row in column]
    scores = [entry.name for entry in task.settings.scorers if isinstance(entry, RIGHT_OR_WRONG)]
    return [
        agreement(
            judge.settings.name,
            name,
            [(row[judge.settings.name] == RIGHT, row[name] == RIGHT) for row in rows],
            seed,
        )
        for judge in judges
        if isinstance(judge.settings, JudgeSettings)
        for name in scores
    ]


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
    scores = _estimates(task, range(len(task.rows)), tallied, seed)
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


def _estimates(
    task: PreparedTask, chosen: Sequence[int], tallied: Sequence[RowTallies], seed: int
) -> Mapping[str, Score]:
    """Every score of the rows `chosen` by their places."""
    prompts = [task.rows[index].messages for index in chosen]
    return {
        name: estimate(by_prompt(prompts, [tallied[index][name] for index in chosen]), seed)
        for name in task.scores
    }


def check(threshold: Threshold, score: Score) -> ThresholdCheck:
    """Holds `threshold` against `score`."""
    value = {"mean": score.mean, "low": score.low, "high": score.high}[threshold.bound]
    name = threshold.score if threshold.bound == "mean" else f"{threshold.bound} {threshold.score}"
    # A mean of 0.1 and 0.7 is a little less than 0.4.
    if threshold.at_least is not None and value < threshold.at_least - ROUNDING:
        return ThresholdCheck(
            threshold, value, False, f"{name} {value:.3f} is below {threshold.at_least:.3f}"
        )
    if threshold.at_most is not None and value > threshold.at_most + ROUNDING:
        return ThresholdCheck(
            threshold, value, False, f"{name} {value:.3f} is above {threshold.at_most:.3f}"
        )
    return ThresholdCheck(threshold, value, True, f"{name} {value:.3f} is within its bounds")


def _slices_of(task: Task, row: Row) -> Mapping[str, str]:
    return {
        name: text_of(row.columns[name]) if name in row.columns else MISSING for name in task.slices
    }


def _slices(
    task: PreparedTask, tallied: Sequence[Sequence[RowTallies]], seed: int
) -> tuple[Slice, ...]:
    slices: list[Slice] = []
    for name in task.settings.slices:
        values = [_slices_of(task.settings, row)[name] for row in task.rows]
        for value in sorted(set(values)):
            chosen = [index for index, own in enumerate(values) if own == value]
            scores = tuple(_estimates(task, chosen, column, seed) for column in tallied)
            slices.append(Slice(name, value, len(chosen), scores))
    return tuple(slices)


def _output(reference: str, reply: Reply, tallies: RowTallies, judgements: Judgements) -> Output:
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
        judgements=judgements,
    )
