"""What to evaluate: a suite of tasks, read from YAML."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from manylora_evaluator.judge_settings import GatewayModel, JudgeModel, OpenAIModel
from manylora_evaluator.references import Reference
from manylora_evaluator.row_settings import Prompt, RowSource
from manylora_evaluator.scorer_settings import JudgeSettings, PairwiseSettings, ScorerSettings
from manylora_registry.config import ConfigModel, load_config


class Threshold(ConfigModel):
    """A bound a score must keep."""

    score: str = Field(min_length=1)
    """Name of the score, e.g. exact_match."""
    at_least: float | None = Field(default=None, ge=0, le=1)
    """Lowest value that is good enough."""
    at_most: float | None = Field(default=None, ge=0, le=1)
    """Highest value that is good enough."""
    bound: Literal["mean", "low", "high"] = "mean"
    """What is compared: the score, or an end of its 95 % confidence interval."""

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError("no score is at least at_least and at most at_most")
        return self


class Decision(ConfigModel):
    """When two versions differ."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance of calling equal versions different, over all scores compared."""
    power: float = Field(default=0.8, gt=0.5, lt=1)
    """Chance of noticing a true difference of `difference`, below which rows are too few."""
    difference: float = Field(default=0.05, gt=0, le=1)
    """Smallest difference of a score that matters."""
    rows: int = Field(default=20, ge=2)
    """Fewest rows for any decision."""


class Task(ConfigModel):
    """One set of held-out rows, asked of the bare base and of adapters."""

    name: str = Field(min_length=1)
    """Name in tables and reports; unique in the suite."""
    adapter: Reference
    """Adapter reference to score beside the bare base."""
    rows: RowSource
    """Where the rows come from."""
    prompt: Prompt | None = None
    """What is asked and expected, from columns; unset: the rows carry messages themselves."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows to ask, from the file's start; unset: all."""
    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of one answer."""
    scorers: list[ScorerSettings] = Field(min_length=1)
    """How answers are scored; the first score is the task's chief one."""
    thresholds: tuple[Threshold, ...] = ()
    """Bounds every adapter's scores must keep."""
    slices: tuple[str, ...] = ()
    """Columns by whose values the scores are told apart too."""
    compare: tuple[str, ...] = ()
    """Scores by which versions are compared; empty: the chief one."""

    @field_validator("scorers")
    @classmethod
    def _scores_are_unique(cls, scorers: list[ScorerSettings]) -> list[ScorerSettings]:
        twice = _repeated([scorer.name for scorer in scorers])
        if twice:
            raise ValueError(f"two scorers have the same name: {twice}; give one a `name`")
        return scorers


class Suite(ConfigModel):
    """Tasks that are evaluated together, with one server."""

    name: str = Field(min_length=1)
    """Title of the report."""
    tasks: list[Task] = Field(min_length=1)
    """What is asked."""
    concurrency: int = Field(default=16, ge=1)
    """Most requests under way at once."""
    timeout: float = Field(default=300, gt=0)
    """Seconds for one request, waiting in the server's queue included."""
    seed: int = Field(default=0, ge=0)
    """Of the resampling behind confidence intervals and tests."""
    decision: Decision = Decision()
    """When a version counts as better or worse than another."""
    judges: dict[str, JudgeModel] = Field(default_factory=dict[str, GatewayModel | OpenAIModel])
    """Models that judge, by the name scorers call them."""

    @field_validator("tasks")
    @classmethod
    def _names_are_unique(cls, tasks: list[Task]) -> list[Task]:
        twice = _repeated([task.name for task in tasks])
        if twice:
            raise ValueError(f"two tasks have the same name: {twice}")
        return tasks

    @model_validator(mode="after")
    def _judges_are_there(self) -> Self:
        problems = [
            f"tasks.{index}: {problem}"
            for index, task in enumerate(self.tasks)
            for scorer in task.scorers
            if isinstance(scorer, JudgeSettings | PairwiseSettings)
            if (problem := self._problem(scorer)) is not None
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problem(self, scorer: JudgeSettings | PairwiseSettings) -> str | None:
        judge = self.judges.get(scorer.by)
        if judge is None:
            known = ", ".join(self.judges) or "none"
            return f"{scorer.name} is judged by {scorer.by!r}; judges: {known}"
        if scorer.samples > 1 and judge.temperature == 0:
            return f"{scorer.name} takes {scorer.samples} samples of a judge with temperature 0"
        return None


def load_suite(path: Path) -> Suite:
    """Reads the suite at `path`.

    Raises:
        ConfigError: with every mistake of the file, each with its path and line.
    """
    return load_config(path, Suite)


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(sorted(name for name, times in Counter(names).items() if times > 1))
