"""Confidence intervals of scores by resampling the rows (Efron's percentile bootstrap)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manylora_evaluator.results import Score
from manylora_evaluator.scorers import Tally

RESAMPLES = 2_000
TAIL = 0.025
"""Share of the resamples on either side of the 95 % interval."""


def estimate(tallies: Sequence[Tally], seed: int) -> Score:
    """The score of `tallies`, one a row, with the ends of its 95 % confidence interval.

    The same seed draws the same rows, so that the columns of a task are resampled alike. Where
    all rows score the same, the interval has no width: resampling cannot see what it never met.
    """
    hits = np.array([tally.hits for tally in tallies], dtype=np.float64)
    of = np.array([tally.of for tally in tallies], dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(tallies), len(tallies)) for _ in range(RESAMPLES))
    resampled = [_ratio(hits[rows], of[rows]) for rows in draws]
    low, high = np.quantile(resampled, [TAIL, 1 - TAIL])
    return Score(mean=_ratio(hits, of), low=float(low), high=float(high))


def _ratio(hits: NDArray[np.float64], of: NDArray[np.float64]) -> float:
    whole = float(of.sum())
    return float(hits.sum()) / whole if whole else 0.0
