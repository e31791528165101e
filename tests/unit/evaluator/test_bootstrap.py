"""Confidence intervals."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from manylora_evaluator.bootstrap import CELLS, estimate, resamples
from manylora_evaluator.scorers.tally import Tally


def test_a_score_is_the_ratio_of_the_sums() -> None:
    score = estimate([(Tally(1, 1),), (Tally(0, 9),), (Tally(2, 2),)], seed=0)

    assert score.mean == pytest.approx(3 / 12)
    assert score.low <= score.mean <= score.high


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_interval_of_right_and_wrong_is_scipys_wilson(rows: int, share: float) -> None:
    right = round(share * rows)

    score = estimate([(Tally(1, 1),)] * right + [(Tally(0, 1),)] * (rows - right), seed=0)

    theirs = binomtest(right, rows).proportion_ci(method="wilson")
    assert (score.low, score.high) == pytest.approx((theirs.low, theirs.high))
    assert 0 <= score.low <= score.high <= 1


@pytest.mark.parametrize("truth", [0.7, 0.95])
@pytest.mark.parametrize("of", [1, 4])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(truth: float, of: int) -> None:
    coins = random.Random(0)
    covered = 0
    for seed in range(100):
        hits = [sum(coins.random() < truth for _ in range(of)) for _ in range(60)]
        score = estimate([(Tally(hit, of),) for hit in hits], seed)
        covered += score.low <= truth <= score.high
    assert 88 <= covered <= 100


def test_rows_that_all_score_the_same_prove_no_more_than_so_many_rows_can() -> None:
    few = estimate([(Tally(3, 3),)] * 5, seed=0)
    many = estimate([(Tally(3, 3),)] * 500, seed=0)

    assert (few.mean, few.high) == (1, 1)
    assert few.low < 0.6
    assert 0.99 < many.low < 1


def test_rows_of_other_weights_that_are_all_right_prove_no_more_than_so_many_rows_can() -> None:
    score = estimate([(Tally(3, 3),), (Tally(5, 5),)], seed=0)

    theirs = binomtest(2, 2).proportion_ci(method="wilson")
    assert (score.mean, score.low, score.high) == pytest.approx((1, theirs.low, theirs.high))


def test_the_seed_decides() -> None:
    rows = [(Tally(math.sqrt(index), 6),) for index in range(20)]

    assert estimate(rows, seed=1) == estimate(rows, seed=1)
    assert estimate(rows, seed=1) != estimate(rows, seed=2)


def test_rows_without_weight_score_nothing() -> None:
    score = estimate([(Tally(0, 0),), (Tally(0, 0),)], seed=0)

    assert (score.mean, score.low, score.high) == (0, 0, 0)


def test_groups_weigh_alike_however_many_their_rows() -> None:
    rows = [(Tally(1, 1, "many"),)] * 9 + [(Tally(0, 1, "few"), Tally(0, 0, "none"))]

    assert estimate(rows, seed=0).mean == pytest.approx(0.5)


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, 0.1, 80)

    score = estimate([(Tally(value, 1),) for value in values], seed=0)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=1)

    low, high = theirs.confidence_interval
    assert (score.low, score.high) == pytest.approx((low, high), abs=0.004)


def test_many_rows_are_resampled_in_batches() -> None:
    rows = 3_000

    batches = list(resamples(rows, seed=0, draws=CELLS // rows + 5))

    assert [len(batch) for batch in batches] == [CELLS // rows, 5]
    assert all((batch.sum(axis=1) == rows).all() for batch in batches)
