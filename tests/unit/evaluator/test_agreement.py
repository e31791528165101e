"""Agreement beyond chance, beside scikit-learn."""

import random

import pytest
from sklearn.metrics import cohen_kappa_score

from manylora_evaluator.judge.agreement import agreement


def pairs(rows: int, agreeing: float, seed: int = 0) -> list[tuple[bool, bool]]:
    coins = random.Random(seed)
    drawn: list[tuple[bool, bool]] = []
    for _ in range(rows):
        judge = coins.random() < 0.6
        drawn.append((judge, judge if coins.random() < agreeing else coins.random() < 0.6))
    return drawn


@pytest.mark.parametrize("agreeing", [0, 0.3, 0.9, 1])
def test_kappa_is_scikit_learns(agreeing: float) -> None:
    drawn = pairs(80, agreeing)

    found = agreement("judge", "labels", drawn, seed=0)

    judge, other = zip(*drawn, strict=True)
    assert found.kappa == pytest.approx(float(cohen_kappa_score(judge, other)))
    assert found.accuracy == pytest.approx(sum(a == b for a, b in drawn) / 80)
    assert (found.judge_passed, found.other_passed) == (sum(judge), sum(other))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        found = agreement("judge", "labels", pairs(120, 0.5, seed), seed)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.5 <= found.high

    assert 88 <= covered <= 100


@pytest.mark.parametrize("word", [True, False])
def test_a_judge_and_labels_that_never_change_have_no_kappa(word: bool) -> None:
    found = agreement("judge", "labels", [(word, word)] * 10, seed=0)

    assert (found.accuracy, found.kappa, found.low, found.high) == (1, None, None, None)


def test_a_judge_that_always_passes_is_no_better_than_chance() -> None:
    found = agreement("judge", "labels", [(True, True)] * 9 + [(True, False)], seed=0)

    assert (found.accuracy, found.kappa) == (0.9, 0)
