"""Confidence intervals of scores: Wilson's, or by resampling the rows (percentile bootstrap)."""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from manylora_evaluator.results import Score
from manylora_evaluator.scorers.tally import Tallies, Tally

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES = 2_000
TAIL = 0.025
"""Share of the resamples on either side of the 95 % interval."""
ROUNDING = 1e-9
"""Scores no further apart than this are one."""
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

    @property
    def right_or_wrong(self) -> bool:
        """Whether each row is simply right or wrong."""
        one_each = self.hits.shape[1] == 1 and bool((self.of == 1).all())
        return one_each and bool(np.isin(self.hits, (0.0, 1.0)).all())

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


def by_prompt(prompts: Sequence[Hashable], rows: Sequence[Tallies]) -> list[Tallies]:
    """The tallies of `rows`, of those that ask the same together.

    Their answers are one: what is to be resampled or swapped by chance is a prompt, and ten rows
    of one prove no more than one.
    """
    gathered: dict[Hashable, list[Tally]] = {}
    for prompt, tallies in zip(prompts, rows, strict=True):
        gathered.setdefault(prompt, []).extend(tallies)
    return [tuple(tallies) for tallies in gathered.values()]


def estimate(rows: Sequence[Tallies], seed: int) -> Score:
    """The score of `rows` with the ends of its 95 % confidence interval.

    Scores of right and wrong get Wilson's interval (1927), all others a percentile bootstrap
    (Efron 1979) of the rows; the same seed draws the same rows, so that the columns of a task are
    resampled alike. Where all rows score the same a bootstrap has no width, as it cannot see what
    it never met: Wilson's interval for so many rows stands in, the widest a share can need.
    """
    (column,) = sums(rows)
    score = column.score()
    if not column.right_or_wrong:
        drawn = np.concatenate([column.scores(weights) for weights in resamples(len(rows), seed)])
        low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
        if high - low > ROUNDING:
            return Score(score, float(low), float(high))
    weighed = int((column.of > 0).any(axis=1).sum())
    return Score(score, *wilson(score, weighed))


def wilson(share: float, rows: int) -> tuple[float, float]:
    """The ends of Wilson's 95 % interval for a `share` of so many rows; without any the share."""
    if rows == 0:
        return share, share
    z = NormalDist().inv_cdf(1 - TAIL)
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    spread = z / (1 + z * z / rows)
    spread *= math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def resamples(rows: int, seed: int, draws: int = RESAMPLES) -> Iterator[Floats]:
    """How often each row was drawn, with replacement: `draws` lines of [_, rows], in batches."""
    rng = np.random.default_rng(seed)
    batch = max(1, CELLS // rows)
    for first in range(0, draws, batch):
        size = min(batch, draws - first)
        drawn = rng.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows)
        yield counts.reshape(size, rows).astype(np.float64)
