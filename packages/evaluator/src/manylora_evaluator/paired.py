"""Tests of the difference between two versions on the same rows, and how many rows they need."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from manylora_evaluator.bootstrap import CELLS, TAIL, Floats, Sums, ratios, resamples, sums
from manylora_evaluator.scorers.tally import Tallies
from manylora_evaluator.suite import Decision
from manylora_evaluator.verdicts import PairedTest

PERMUTATIONS = 10_000
SLACK = 1e-12
"""Rounding by which two differences may differ and be one."""


def paired_test(baseline: Sequence[Tallies], candidate: Sequence[Tallies], seed: int) -> PairedTest:
    """Tests whether `candidate` scores otherwise than `baseline` on the same rows.

    Scores of right and wrong get McNemar's exact test (1947): of the rows on which the two differ,
    half would favour either by chance. Any other score gets a permutation test: under the null
    hypothesis the two answers to a row are exchangeable, so they are swapped at random. Both are
    two-sided.
    """
    old, new = sums(baseline, candidate)
    difference = new.score() - old.score()
    drawn = np.concatenate(
        [new.scores(weights) - old.scores(weights) for weights in resamples(old.rows, seed)]
    )
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    gains = ratios(new.hits, new.of) - ratios(old.hits, old.of)
    better, worse = int((gains > SLACK).sum()), int((gains < -SLACK).sum())
    method: Literal["mcnemar", "permutation"] = "permutation"
    if old.right_or_wrong and new.right_or_wrong:
        method, p_value = "mcnemar", mcnemar(better, worse)
    else:
        p_value = _permutation(old, new, seed)
    return PairedTest(
        rows=old.rows,
        baseline=old.score(),
        candidate=new.score(),
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=p_value,
        method=method,
        better=better,
        worse=worse,
        deviation=float(np.std(_influence(new) - _influence(old))),
    )


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p-value of so many rows gained and lost."""
    differ, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(differ, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differ)


def needed_rows(deviation: float, decision: Decision, scores: int = 1) -> int:
    """Rows with which a difference of `decision.difference` is noticed with `decision.power`.

    The normal approximation n = ((z of alpha / 2 + z of power) * deviation / difference)^2, alpha
    divided by the number of `scores` compared: what Holm's method leaves one of them alone. The
    deviation was measured on few rows: one row more, on which the two differ as far as they can,
    is counted with them, so that a sample without any difference is not taken for proof of none.
    """
    normal = NormalDist()
    # The lower tail, as 1 less a very small alpha is 1.
    z = normal.inv_cdf(decision.power) - normal.inv_cdf(decision.alpha / scores / 2)
    k = (z / decision.difference) ** 2
    # n >= k * (n * deviation^2 + 1) / (n + 1), solved for n.
    b = 1 - k * deviation**2
    return max(decision.rows, math.ceil((-b + math.sqrt(b * b + 4 * k)) / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """`p_values`, made larger so that all of them together err no more than one would."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _permutation(old: Sums, new: Sums, seed: int) -> float:
    observed = abs(new.score() - old.score())
    as_far = 0
    for swaps in _swaps(old.rows, seed):
        kept = 1 - swaps
        shuffled_new = _mixed(kept, new, swaps, old)
        shuffled_old = _mixed(kept, old, swaps, new)
        as_far += int((np.abs(shuffled_new - shuffled_old) >= observed - SLACK).sum())
    # The order observed is one of those that could have been drawn (Phipson and Smyth 2010).
    return (as_far + 1) / (PERMUTATIONS + 1)


def _swaps(rows: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    batch = max(1, CELLS // rows)
    for first in range(0, PERMUTATIONS, batch):
        size = min(batch, PERMUTATIONS - first)
        yield rng.integers(0, 2, (size, rows)).astype(np.float64)


def _mixed(kept: Floats, one: Sums, swapped: Floats, other: Sums) -> Floats:
    """The score of a version whose `swapped` rows are the other's."""
    both = Sums(np.concatenate([one.hits, other.hits]), np.concatenate([one.of, other.of]))
    return both.scores(np.concatenate([kept, swapped], axis=1))


def _influence(column: Sums) -> Floats:
    """Each row's pull on the score, to first order; its mean is 0 and its scale a row's own."""
    hits, of = column.hits.sum(axis=0), column.of.sum(axis=0)
    weighed = of > 0
    share = np.divide(hits, of, out=np.zeros_like(hits), where=weighed)
    pull = np.divide(
        column.hits - share * column.of, of, out=np.zeros_like(column.hits), where=weighed
    )
    return column.rows * pull.sum(axis=1) / max(1, int(weighed.sum()))
