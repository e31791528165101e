"""When a canary's step passes and when it is broken."""

import math
from dataclasses import replace

import pytest

from deploy.stages.canary import Reading, did, judge, probes_due
from deploy.stages.gate_settings import Bounds, Canary
from deploy.stages.operator import Copies, Figures

CANARY = Canary(
    window_s=100,
    look_s=5,
    requests=50,
    copies=10,
    bounds=Bounds(
        errors=0.02,
        first_token_p95_s=1.0,
        first_token_ratio=2.0,
        tokens_ratio=1.5,
        different=0.5,
    ),
)
PRESENT = Figures(requests=500, tokens=5000, first_token_p95_s=0.3)
GOOD = Figures(requests=60, errors=0, tokens=600, first_token_p95_s=0.4)
COPIES = Copies(2, 10, same=9, different=1)


def verdict(seconds: float = 100, candidate: Figures = GOOD, copies: Copies | None = COPIES):
    return judge(CANARY, Reading(seconds, seconds, candidate, PRESENT, copies))


def test_a_step_passes_when_time_and_requests_are_enough() -> None:
    assert verdict().state == "passed"
    early = verdict(seconds=99)
    assert (early.state, early.reasons) == ("watch", ("99 of 100 s",))
    few = verdict(candidate=Figures(40, 0, 400, 0.4))
    assert (few.state, few.reasons) == ("watch", ("40 of 50 requests",))
    uncompared = verdict(copies=Copies(2, 10, same=3))
    assert (uncompared.state, uncompared.reasons) == ("watch", ("3 of 10 copies",))
    assert verdict(copies=None).state == "passed"
    assert verdict(copies=Copies(2, 10, same=5, different=5)).state == "passed"


@pytest.mark.parametrize(
    ("requests", "errors", "state"),
    [
        (3, 1, "watch"),  # one of fifty may fail
        (3, 2, "broken"),  # however few there were
        (60, 1, "passed"),
        (60, 2, "broken"),
        (200, 4, "passed"),
        (200, 5, "broken"),
    ],
)
def test_errors_are_told_at_once(requests: int, errors: int, state: str) -> None:
    assert verdict(candidate=Figures(requests, errors, 10 * requests, 0.4)).state == state


def test_as_many_errors_as_the_bound_says_may_be() -> None:
    canary = Canary(window_s=100, requests=100, bounds=Bounds(errors=0.29))

    kept, broken = (
        judge(canary, Reading(100, 100, Figures(100, errors, 1000, 0.4), PRESENT))
        for errors in (29, 30)
    )

    assert kept.state == "passed"
    assert broken.reasons == ("30 of 100 requests failed, 29 may",)


@pytest.mark.parametrize(
    ("candidate", "copies", "said"),
    [
        (Figures(60, 0, 600, 1.1), COPIES, "the first token takes 1.100 s (95th percentile), 1 s"),
        (Figures(60, 0, 600, 0.7), COPIES, "more than 2 times the present version's 0.300 s"),
        (Figures(60, 0, 960, 0.4), COPIES, "an answer has 16.0 tokens, more than 1.5 times"),
        (GOOD, Copies(2, 10, same=4, different=5, failed=1), "60% of 10 copies"),
    ],
)
def test_each_bound_is_told_apart(candidate: Figures, copies: Copies, said: str) -> None:
    found = verdict(seconds=10, candidate=candidate, copies=copies)
    assert found.state == "broken"
    assert len([reason for reason in found.reasons if said in reason]) == 1
    few = Figures(30, 0, candidate.tokens // 2, candidate.first_token_p95_s)
    assert verdict(seconds=10, candidate=few, copies=copies).state == "watch"


def test_a_version_without_requests_is_not_waited_for_for_ever() -> None:
    assert verdict(seconds=1000, candidate=Figures(5)).state == "watch"
    assert verdict(seconds=1001, candidate=Figures(5)).state == "broken"


def test_probes_may_be_answered_slowly_however_short_the_window_is() -> None:
    short = CANARY.model_copy(update={"window_s": 2})
    assert judge(short, Reading(299, 299, Figures(5), PRESENT)).state == "watch"
    assert judge(short, Reading(301, 301, Figures(5), PRESENT)).state == "broken"


def test_the_time_in_which_a_killed_script_watched_nothing_is_not_held_against_a_version() -> None:
    few = Reading(1001, 0, Figures(5), PRESENT, COPIES)
    assert judge(CANARY, few).state == "watch"
    assert judge(CANARY, Reading(1001, 0, GOOD, PRESENT, COPIES)).state == "passed"


def test_a_version_is_set_beside_a_present_one_that_did_something() -> None:
    lonely = Reading(100, 100, GOOD, Figures(), COPIES)
    assert judge(CANARY, lonely).state == "watch"
    assert probes_due(CANARY, lonely) == 1
    assert judge(CANARY, Reading(1001, 1001, GOOD, Figures(), COPIES)).state == "broken"
    alone = CANARY.model_copy(update={"bounds": Bounds(first_token_p95_s=1.0)})
    assert judge(alone, lonely).state == "passed"
    assert probes_due(alone, lonely) == 0


@pytest.mark.parametrize("seconds", [0.0, math.nan, math.inf])
def test_a_figure_that_is_none_keeps_no_bound(seconds: float) -> None:
    absolute = CANARY.model_copy(update={"bounds": Bounds(first_token_p95_s=1.0)})
    ratio = CANARY.model_copy(update={"bounds": Bounds(first_token_ratio=2.0)})
    unbounded = CANARY.model_copy(update={"bounds": Bounds()})
    unmeasured = Figures(60, 0, 600, seconds)
    for canary, candidate, present, state in (
        (absolute, unmeasured, PRESENT, "broken"),
        (ratio, unmeasured, PRESENT, "broken"),
        (ratio, GOOD, replace(PRESENT, first_token_p95_s=seconds), "broken"),
        (absolute, GOOD, replace(PRESENT, first_token_p95_s=seconds), "passed"),
        (unbounded, unmeasured, PRESENT, "passed"),
    ):
        assert judge(canary, Reading(100, 100, candidate, present)).state == state


def test_probes_are_paced_over_the_window() -> None:
    def due(seconds: float, requests: int, copies: Copies | None = COPIES) -> int:
        return probes_due(CANARY, Reading(seconds, seconds, Figures(requests), PRESENT, copies))

    assert due(0, 0) == 3
    assert due(45, 3) == 22
    assert due(45, 40) == 0
    assert due(200, 48) == 2
    assert due(200, 60) == 0
    assert due(45, 60, Copies(2, 10)) == 0
    assert due(200, 60, Copies(2, 10)) == 10


def test_a_window_counts_what_was_done_in_it() -> None:
    before = Figures(100, 3, 900, 0.5, {"UNAVAILABLE": 2, "DATA_LOSS": 1})
    now = Figures(160, 5, 1500, 0.2, {"UNAVAILABLE": 4, "DATA_LOSS": 1})
    assert did(now, before) == Figures(60, 2, 600, 0.2, {"UNAVAILABLE": 2})
