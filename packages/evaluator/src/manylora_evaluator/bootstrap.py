"""Confidence intervals of scores by resampling the rows (Efron's percentile bootstrap)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from manylora_evaluator.results import Score
from manylora_evaluator.scorers.tally import Tallies

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES = 2_000
TAIL = 0.025
"""Share of the resamples on either side of the 95 % interval."""
CELLS = 4_000_000
"""Resampled rows held in memory at once."""


@dataclass(frozen=True)
class Sums:
    """The tallies of one score as numbers, ready to be weighed and summed."""

    hits: Floats
    """[rows, groups]"""
    of: Floats
    """[rows, groups]"""

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.hits)

    def scores(self, weights: Floats) -> Floats:
        """The score under each of `weights` [draws, rows]: how often each row counts."""
        return ratios(weights @ self.hits, weights @ self.of)

    def score(self) -> float:
        """The score of the rows as they are."""
        return float(self.scores(np.ones((1, self.rows)))[0])


def sums(*columns: Sequence[Tallies]) -> tuple[Sums, ...]:
    """The tallies of one score in several columns of the same rows, over the groups of them all."""
    groups = {tally.group for column in columns for row in column for tally in row}
    places = {group: place for place, group in enumerate(sorted(groups or {""}))}
    return tuple(_sums(column, places) for column in columns)


def _sums(column: Sequence[Tallies], places: dict[str, int]) -> Sums:
    hits, of = np.zeros((len(column), len(places))), np.zeros((len(column), len(places)))
    for index, row in enumerate(column):
        for tally in row:
            hits[index, places[tally.group]] += tally.hits
            of[index, places[tally.group]] += tally.of
    return Sums(hits, of)


def ratios(hits: Floats, of: Floats) -> Floats:
    """The mean over the groups that have weight, for each row of [n, groups]; 0 without any."""
    weighed = of > 0
    each = np.divide(hits, of, out=np.zeros_like(hits), where=weighed)
    return each.sum(axis=-1) / np.maximum(weighed.sum(axis=-1), 1)


def estimate(rows: Sequence[Tallies], seed: int) -> Score:
    """The score of `rows` with the ends of its 95 % confidence interval.

    The same seed draws the same rows, so that the columns of a task are resampled alike. Where
    all rows score the same, the interval has no width: resampling cannot see what it never met.
    """
    (column,) = sums(rows)
    drawn = np.concatenate([column.scores(weights) for weights in resamples(len(rows), seed)])
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    return Score(mean=column.score(), low=float(low), high=float(high))


def resamples(rows: int, seed: int, draws: int = RESAMPLES) -> Iterator[Floats]:
    """How often each row was drawn, with replacement: `draws` lines of [_, rows], in batches."""
    rng = np.random.default_rng(seed)
    batch = max(1, CELLS // rows)
    for first in range(0, draws, batch):
        size = min(batch, draws - first)
        drawn = rng.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows)
        yield counts.reshape(size, rows).astype(np.float64)
