"""What an evaluation found: frozen dataclasses, and their JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from manylora_evaluator.errors import ResultsError
from manylora_evaluator.judgements import Agreement, Judgement, JudgeUsage
from manylora_evaluator.rows import Message
from manylora_evaluator.scorers.classification import ClassificationReport
from manylora_evaluator.scorers.tally import Tallies
from manylora_evaluator.suite import Decision
from manylora_evaluator.verdicts import Gate, ThresholdCheck


@dataclass(frozen=True)
class Version:
    """The immutable version a reference stood for during the evaluation."""

    name: str
    number: int
    digest: str


@dataclass(frozen=True)
class Score:
    """A score between 0 and 1 and the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Slice:
    """The rows of a task that share one value of a column."""

    column: str
    value: str
    rows: int
    scores: tuple[Mapping[str, Score], ...]
    """Of each of the task's columns, in their order."""


@dataclass(frozen=True)
class Column:
    """One task's rows, all answered by the bare base or by one adapter version."""

    adapter: str
    """The reference as asked for; empty: the bare base."""
    version: Version | None
    """What it was resolved to, once, before the first row; None: the bare base."""
    scores: Mapping[str, Score]
    requests: int
    failures: int
    """Requests that failed; each counts as a wrong answer in the scores."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From the first request's start to the last answer's end."""
    latency_p50: float
    """Seconds of the median answered request; 0 when none was answered."""
    latency_p95: float
    thresholds: tuple[ThresholdCheck, ...] = ()
    """Empty for the bare base."""
    reports: tuple[ClassificationReport, ...] = ()

    @property
    def label(self) -> str:
        """For tables: `bare base`, or the reference with the number it was resolved to."""
        return "bare base" if self.version is None else f"{self.adapter} · v{self.version.number}"


@dataclass(frozen=True)
class Output:
    """What one column's model made of one row."""

    adapter: str
    text: str
    """Empty when the request failed."""
    error: str | None
    """Why the request failed."""
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From sending the request to its answer or failure."""
    scores: Mapping[str, float | None]
    """The row alone; None where it has no weight, e.g. no fields expected and none given."""
    tallies: Mapping[str, Tallies]
    """The row's share of each score, from which scores are summed up again."""
    judgements: Mapping[str, Judgement] = field(default_factory=dict[str, Judgement])
    """By the score's name."""


@dataclass(frozen=True)
class RowResult:
    """One held-out row with every column's output, in the columns' order."""

    id: str
    """The same in every evaluation of the same row."""
    messages: tuple[Message, ...]
    expected: str
    outputs: tuple[Output, ...]
    slices: Mapping[str, str]
    """The row's value in each column the suite slices by."""


@dataclass(frozen=True)
class TaskResult:
    """One task: its columns, the one that adapters are told beside first, and its rows."""

    task: str
    columns: tuple[Column, ...]
    rows: tuple[RowResult, ...]
    compare: tuple[str, ...]
    """Scores by which versions are compared, the chief one first."""
    slices: tuple[Slice, ...]
    max_tokens: int | None = None
    """Most tokens of one answer; None: written by a version that did not say."""
    agreements: tuple[Agreement, ...] = ()
    """Of its judges with labels and with scorers that need no model."""

    @property
    def beside(self) -> Column:
        """The bare base, or the baseline where only what a gate needs was asked."""
        return self.columns[0]

    def index(self, adapter: str) -> int:
        """Which column `adapter`, a reference as asked for, is.

        Raises:
            ResultsError: when it was not evaluated.
        """
        for index, column in enumerate(self.columns):
            if column.adapter == adapter:
                return index
        known = ", ".join(column.adapter or "the bare base" for column in self.columns)
        raise ResultsError(f"task {self.task!r} did not evaluate {adapter!r}, but {known}")


@dataclass(frozen=True)
class EvaluationResult:
    """A whole evaluation."""

    suite: str
    server: str
    started_at: datetime
    """UTC."""
    seconds: float
    seed: int
    decision: Decision
    tasks: tuple[TaskResult, ...]
    judges: tuple[JudgeUsage, ...] = ()
    gates: tuple[Gate, ...] = ()
    """One an adapter, where the suite states thresholds or a baseline was named."""

    @property
    def requests(self) -> int:
        """Requests sent in all."""
        return sum(column.requests for task in self.tasks for column in task.columns)

    @property
    def failures(self) -> int:
        """Requests that failed."""
        return sum(column.failures for task in self.tasks for column in task.columns)

    @property
    def judge_failures(self) -> int:
        """Questions no judge answered."""
        return sum(judge.failures for judge in self.judges)

    def score(self, task: str, adapter: str, scorer: str) -> Score:
        """The score `scorer` of `adapter`, a reference as asked for (empty: bare base), in `task`.

        Raises:
            ResultsError: when there is none; says what there is.
        """
        scores = {
            (entry.task, column.adapter, name): score
            for entry in self.tasks
            for column in entry.columns
            for name, score in column.scores.items()
        }
        if (task, adapter, scorer) not in scores:
            known = ", ".join(f"{t}/{a or 'bare base'}/{s}" for t, a, s in scores)
            raise ResultsError(
                f"no score {task}/{adapter or 'bare base'}/{scorer}; there are {known}"
            )
        return scores[task, adapter, scorer]

    def to_json(self) -> str:
        """The result as indented JSON."""
        return _ADAPTER.dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> "EvaluationResult":
        """The result in what `to_json` wrote.

        Raises:
            ResultsError: when `text` is something else.
        """
        try:
            # Not at once: NaN, which no test can compare, would be taken.
            return _ADAPTER.validate_python(from_json(text, allow_inf_nan=False))
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        except ValueError as error:
            what = str(error)
        raise ResultsError(f"not what `manylora evaluate` wrote: {what}; evaluate again")


_ADAPTER = TypeAdapter(EvaluationResult)
