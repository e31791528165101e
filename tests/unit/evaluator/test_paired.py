"""Tests between versions, beside scipy; and that so many rows are enough."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator
from scipy.stats import binomtest, permutation_test
from scipy.stats import bootstrap as scipys_bootstrap

from manylora_evaluator.paired import holm, mcnemar, needed_rows, paired_test
from manylora_evaluator.scorers.tally import Tallies, Tally
from manylora_evaluator.suite import Decision


def shares(values: object) -> list[Tallies]:
    return [(Tally(float(value), 1),) for value in np.asarray(values)]


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int) -> None:
    theirs = binomtest(better, better + worse).pvalue if better + worse else 1.0

    assert mcnemar(better, worse) == pytest.approx(theirs)


def test_right_and_wrong_are_tested_by_mcnemar() -> None:
    test = paired_test(shares([1] * 4 + [0] * 20 + [1] * 6), shares([0] * 4 + [1] * 26), seed=0)

    assert (test.method, test.better, test.worse, test.rows) == ("mcnemar", 20, 4, 30)
    assert test.p_value == pytest.approx(binomtest(20, 24).pvalue)
    assert test.difference == pytest.approx(16 / 30)


def test_shares_are_tested_by_scipys_permutation_test() -> None:
    draw = np.random.default_rng(0)
    old = draw.uniform(0, 0.8, 40)
    new = np.clip(old + draw.normal(0.04, 0.1, 40), 0, 1)

    test = paired_test(shares(old), shares(new), seed=0)
    theirs = permutation_test(
        (old, new),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=1,
    )

    assert test.method == "permutation"
    assert test.p_value == pytest.approx(float(theirs.pvalue), abs=0.01)


def test_the_interval_of_the_difference_is_scipys() -> None:
    draw = np.random.default_rng(1)
    old, new = draw.uniform(0, 1, 60), draw.uniform(0, 1, 60)

    test = paired_test(shares(old), shares(new), seed=0)
    theirs = scipys_bootstrap((new - old,), np.mean, method="percentile", rng=1).confidence_interval

    assert (test.low, test.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_a_ratio_of_sums_is_permuted_row_by_row_with_its_weights() -> None:
    # One heavy row decides the difference, and either version could have had it.
    old = [(Tally(0, 100),), *shares([1, 1, 1])]
    new = [(Tally(100, 100),), *shares([1, 1, 1])]

    assert paired_test(old, new, seed=0).p_value == 1
    assert paired_test([(Tally(0, 2),)], [(Tally(1, 2),)], seed=0).method == "permutation"


def test_rounding_is_no_gain() -> None:
    test = paired_test(shares([0.3, 0.1 + 0.2]), shares([0.1 + 0.2, 0.3]), seed=0)

    assert (test.better, test.worse) == (0, 0)


def test_no_shuffle_as_far_apart_is_no_proof() -> None:
    test = paired_test(shares([0.1] * 40), shares([0.9] * 40), seed=0)

    assert test.p_value == pytest.approx(1 / 10_001)


def test_equal_versions_are_seldom_told_apart() -> None:
    draw = np.random.default_rng(0)

    significant = sum(
        paired_test(shares(draw.beta(2, 2, 40)), shares(draw.beta(2, 2, 40)), seed).p_value < 0.05
        for seed in range(100)
    )

    assert significant <= 11


def difference(draw: Generator, rows: int, gain: float) -> tuple[list[Tallies], list[Tallies]]:
    """Two versions that differ on 30 % of the rows."""
    kind = draw.choice(3, rows, p=[0.7, 0.15 + gain / 2, 0.15 - gain / 2])
    return shares(kind == 2), shares(kind == 1)


def test_needed_rows_are_enough_and_not_far_too_many() -> None:
    decision = Decision(difference=0.15, power=0.8)
    draw = np.random.default_rng(0)
    old, new = difference(draw, 4_000, 0.15)
    needed = needed_rows(paired_test(old, new, seed=0).deviation, decision)

    def power(rows: int) -> float:
        tests = (difference(draw, rows, 0.15) for _ in range(400))
        wins = (
            mcnemar(
                sum(a[0].hits < b[0].hits for a, b in zip(old, new, strict=True)),
                sum(a[0].hits > b[0].hits for a, b in zip(old, new, strict=True)),
            )
            for old, new in tests
        )
        return sum(p < decision.alpha for p in wins) / 400

    # McNemar's exact test keeps a little below the normal approximation.
    assert power(needed) > 0.7
    assert power(needed // 2) < 0.6


def test_more_scores_need_more_rows() -> None:
    # Of four scores one differs; Holm's method then asks 0.05 / 4 of it.
    decision, draw = Decision(difference=0.15, power=0.8), np.random.default_rng(0)
    needed = needed_rows(math.sqrt(0.3 - 0.15**2), decision, scores=4)

    def noticed() -> bool:
        gains = (0.15, 0.0, 0.0, 0.0)
        p_values = [
            mcnemar(*map(int, draw.multinomial(needed, [0.15 + g / 2, 0.15 - g / 2, 0.7])[:2]))
            for g in gains
        ]
        return holm(p_values)[0] < decision.alpha

    assert 0.7 < sum(noticed() for _ in range(400)) / 400 < 0.9


def test_a_few_rows_without_a_difference_prove_nothing() -> None:
    alike = paired_test(shares([1] * 30), shares([1] * 30), seed=0)

    assert alike.p_value == 1
    assert needed_rows(alike.deviation, Decision(difference=0.05)) > 50
    assert needed_rows(alike.deviation, Decision(difference=0.5, rows=20)) == 20


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5], [0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_a_chance_of_error_however_small_needs_some_number_of_rows() -> None:
    needed = [needed_rows(0.5, Decision(alpha=alpha)) for alpha in (0.05, 1e-9, 1e-30)]

    assert needed == sorted(set(needed))
