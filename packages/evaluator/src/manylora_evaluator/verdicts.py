"""What was decided about a version: thresholds, paired tests and gates, as plain data."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import TypeAdapter

from manylora_evaluator.suite import Threshold

Verdict: TypeAlias = Literal["better", "worse", "not_distinguishable", "too_few_rows"]


@dataclass(frozen=True)
class ThresholdCheck:
    """One bound of the suite, held against one column."""

    threshold: Threshold
    value: float
    """What was compared."""
    passed: bool
    reason: str
    """One line, e.g. `exact_match 0.612 is below 0.700`."""


@dataclass(frozen=True)
class PairedTest:
    """One score of two versions on the same rows."""

    rows: int
    """Those that ask the same are one."""
    baseline: float
    candidate: float
    difference: float
    """Candidate less baseline."""
    low: float
    """Ends of the difference's 95 % interval, by paired bootstrap."""
    high: float
    p_value: float
    """Two-sided: how often chance alone would make such a difference."""
    method: Literal["mcnemar", "permutation"]
    better: int
    """Rows on which the candidate scores higher."""
    worse: int
    deviation: float
    """Standard deviation of one row's share of the difference."""


@dataclass(frozen=True)
class RowDifference:
    """One row on which two versions score differently."""

    row: str
    """The row's id."""
    prompt: str
    """Its last message."""
    expected: str
    baseline: str
    """The baseline's answer."""
    candidate: str
    """The candidate's."""
    baseline_score: float
    candidate_score: float


@dataclass(frozen=True)
class ScoreComparison:
    """Two versions by one score of one task."""

    task: str
    score: str
    verdict: Verdict
    reason: str
    """One line."""
    test: PairedTest
    adjusted_p: float
    """The p-value, made larger for the number of scores compared (Holm 1979)."""
    needed_rows: int
    """Rows enough to notice a difference that matters."""
    regressions: tuple[RowDifference, ...]
    """Rows on which the candidate scores lower, the largest loss first."""


@dataclass(frozen=True)
class Comparison:
    """A candidate beside a baseline, over every score compared."""

    candidate: str
    baseline: str
    verdict: Verdict
    """`worse` when some score is; else `too_few_rows` when some score cannot be told; else
    `better` when some score is; else `not_distinguishable`."""
    scores: tuple[ScoreComparison, ...]

    @property
    def not_worse(self) -> bool:
        """Whether the candidate may take the baseline's place."""
        return self.verdict in ("better", "not_distinguishable")

    def to_json(self) -> str:
        """The comparison as indented JSON."""
        return TypeAdapter(Comparison).dump_json(self, indent=2).decode()


@dataclass(frozen=True)
class Gate:
    """Whether a version may go on."""

    candidate: str
    """Adapter reference as asked for."""
    passed: bool
    reasons: tuple[str, ...]
    """Why not, one line each; empty when it passed."""
    comparison: Comparison | None
    """Beside the baseline, if one was named."""

    def to_json(self) -> str:
        """The gate as indented JSON."""
        return TypeAdapter(Gate).dump_json(self, indent=2).decode()
