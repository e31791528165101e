"""What `compare` and `gate` decide, from evaluations of a scripted gateway."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from pydantic import TypeAdapter

import manylora.inference.v1.inference_pb2 as pb
from manylora_evaluator import (
    Comparison,
    Decision,
    EvaluationFailedError,
    EvaluationResult,
    Gate,
    ResultsError,
    compare,
    evaluate,
    gate,
)
from manylora_evaluator.paired import needed_rows
from manylora_evaluator.results import Score
from manylora_evaluator.scoring import check
from manylora_evaluator.suite import Threshold
from tests.unit.client.scripted import Answer, Failure, Reply, ScriptedServer

Evaluate = Callable[..., EvaluationResult]

ROWS = 120


@pytest.fixture
def evaluated(serve: Callable[..., ScriptedServer], tmp_path: Path) -> Evaluate:
    """Evaluates versions of `spelling` that answer as many rows right as stated, from the first."""

    def run(
        right: dict[str, int | range],
        *,
        rows: int = ROWS,
        times: int = 1,
        expected: Sequence[str] = ("yes",),
        task: str = "",
        baseline: str | None = None,
        scorers: str = "[exact_match]",
    ) -> EvaluationResult:
        known = {
            reference: count if isinstance(count, range) else range(count)
            for reference, count in right.items()
        }

        def answer(request: pb.GenerateRequest) -> Reply:
            number = request.chat.messages[-1].content
            name, _, selector = request.adapter.partition("@")
            version = {"": 1, "1": 1, "2": 2}.get(selector) or digests[selector]
            if not name:
                return Answer("base")
            hit = int(number) in known[f"spelling@{version}"]
            return Answer("yes" if hit else "no", version=version)

        digests = {versioned(number): number for number in (1, 2)}
        write_rows(tmp_path / "rows.jsonl", rows, times, expected)
        suite = tmp_path / "suite.yaml"
        suite.write_text(
            "name: s\ntasks:\n  - {name: spelling, adapter: spelling@1, rows: rows.jsonl, "
            f"scorers: {scorers}, {task}}}\n"
        )
        return evaluate(
            suite,
            serve(answer).target,
            [name for name in right if name != baseline],
            baseline=baseline,
        )

    return run


def versioned(number: int) -> str:
    from tests.unit.client.scripted import version

    return version("spelling", number).digest


def write_rows(path: Path, rows: int, times: int = 1, expected: Sequence[str] = ("yes",)) -> None:
    lines = [
        {
            "messages": [{"role": "user", "content": str(n)}],
            "expected": one,
            "row": {"parity": ["even", "odd"][n % 2]} if n else {},
        }
        for n in range(rows)
        for one in expected
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) * times)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (60, 90, "better"),
        (90, 60, "worse"),
        (60, 60, "not_distinguishable"),
        (range(60), range(5, 66), "too_few_rows"),
    ],
)
def test_a_comparison_ends_in_one_of_four_ways(
    first: int | range, second: int | range, verdict: str, evaluated: Evaluate
) -> None:
    result = evaluated({"spelling@1": first, "spelling@2": second})

    decided = compare(result, "spelling@2", "spelling@1")

    assert decided.verdict == verdict
    assert decided.not_worse == (verdict in ("better", "not_distinguishable"))
    assert TypeAdapter(Comparison).validate_json(decided.to_json()) == decided


def test_rows_written_many_times_prove_no_more_than_once(
    evaluated: Evaluate, tmp_path: Path
) -> None:
    result = evaluated({"spelling@1": 0, "spelling@2": 10}, rows=10, times=10)

    decided = gate(result, "spelling@2", "spelling@1")

    assert not decided.passed
    assert decided.comparison is not None
    assert decided.comparison.scores[0].test.rows == 10
    once = evaluated({"spelling@1": 0, "spelling@2": 10}, rows=10)
    assert result.score("spelling", "spelling@2", "exact_match").low == pytest.approx(
        once.score("spelling", "spelling@2", "exact_match").low
    )


def test_rows_of_one_prompt_are_one_whatever_they_expect(
    evaluated: Evaluate, tmp_path: Path
) -> None:
    """One answer that changed is right for one of the rows and wrong for nine."""
    others = [f"other {n}" for n in range(9)]
    result = evaluated({"spelling@1": 10, "spelling@2": 0}, rows=10, expected=["yes", *others])

    (score,) = compare(result, "spelling@2", "spelling@1").scores

    assert score.test.rows == 10
    assert (score.test.baseline, score.test.candidate) == (pytest.approx(0.1), 0)


def test_too_few_rows_says_how_many_are_needed(evaluated: Evaluate) -> None:
    result = evaluated({"spelling@1": 0, "spelling@2": 10}, rows=10)

    (score,) = compare(result, "spelling@2", "spelling@1").scores

    assert score.verdict == "too_few_rows", "not even ten of ten decide"
    assert f"not enough rows, {score.needed_rows} are needed" in score.reason
    assert score.needed_rows > 10


def test_a_wider_difference_that_matters_needs_fewer_rows(evaluated: Evaluate) -> None:
    result = evaluated({"spelling@1": range(60), "spelling@2": range(5, 66)})

    decided = compare(
        result, "spelling@2", "spelling@1", decision=Decision(difference=0.2, rows=20)
    )

    assert decided.verdict == "not_distinguishable"


def test_regressions_are_listed_row_by_row(evaluated: Evaluate) -> None:
    result = evaluated({"spelling@1": range(60), "spelling@2": range(3, 90)})

    (score,) = compare(result, "spelling@2", "spelling@1").scores

    assert [(lost.prompt, lost.baseline, lost.candidate) for lost in score.regressions] == [
        (str(n), "yes", "no") for n in range(3)
    ]
    assert (score.test.better, score.test.worse) == (30, 3)


def test_of_regressions_the_largest_loss_comes_first(evaluated: Evaluate) -> None:
    result = evaluated(
        {"spelling@1": 2, "spelling@2": 0}, expected=["yes yes", "yes"], scorers="[rouge_l]"
    )

    (score,) = compare(result, "spelling@2", "spelling@1").scores

    assert [lost.expected for lost in score.regressions] == ["yes", "yes", "yes yes", "yes yes"]


def test_versions_are_known_by_number_and_digest(evaluated: Evaluate) -> None:
    result = evaluated({"spelling@1": 60, "spelling@2": 90})

    assert compare(result, versioned(2), f"spelling@{versioned(1)}").verdict == "better"
    assert compare(result, "spelling@1", "").verdict == "better", "than the bare base"


def test_versions_evaluated_apart_are_paired_by_row(evaluated: Evaluate) -> None:
    first = evaluated({"spelling@1": 60})
    both = evaluated({"spelling@1": 60, "spelling@2": 90})
    (task,) = both.tasks
    shuffled = replace(task, rows=tuple(reversed(task.rows)))
    second = replace(both, tasks=(shuffled,))

    apart = compare([first, second], "spelling@2", "spelling@1")

    assert (
        apart.scores[0].test.p_value
        == compare(both, "spelling@2", "spelling@1").scores[0].test.p_value
    )


def test_answers_of_another_length_are_no_fair_comparison(evaluated: Evaluate) -> None:
    first = evaluated({"spelling@1": 60}, task="max_tokens: 24")
    alike = evaluated({"spelling@1": 60, "spelling@2": 90}, task="max_tokens: 24")
    longer = evaluated({"spelling@1": 60, "spelling@2": 90}, task="max_tokens: 64")

    (fair,) = compare([alike, first], "spelling@2", "spelling@1").scores
    (told,) = compare([longer, first], "spelling@2", "spelling@1").scores

    assert told.reason == (
        f"{fair.reason}; but they were not asked alike: at most 64 tokens an answer, and the "
        "baseline 24"
    )


def test_versions_without_a_row_in_common_are_refused(evaluated: Evaluate) -> None:
    with pytest.raises(ResultsError, match="no task has answers of both spelling@3 and spelling@1"):
        compare(evaluated({"spelling@1": 60}), "spelling@3", "spelling@1")


@pytest.mark.parametrize(
    ("right", "thresholds", "reasons"),
    [
        (90, "[{score: exact_match, at_least: 0.7}]", []),
        (80, "[{score: exact_match, at_least: 0.7}]", ["exact_match 0.667 is below 0.700"]),
        (90, "[{score: exact_match, at_least: 0.7, bound: low}]", ["low exact_match"]),
        (80, "[{score: exact_match, at_most: 0.5}]", ["exact_match 0.667 is above 0.500"]),
    ],
)
def test_thresholds_open_and_close_the_gate(
    right: int, thresholds: str, reasons: Sequence[str], evaluated: Evaluate
) -> None:
    result = evaluated({"spelling@1": right}, task=f"thresholds: {thresholds}")

    decided = gate(result, "spelling@1")

    assert decided.passed == (not reasons)
    assert len(decided.reasons) == len(reasons)
    assert all(part in given for part, given in zip(reasons, decided.reasons, strict=True))
    assert result.gates == (decided,)
    assert TypeAdapter(Gate).validate_json(decided.to_json()) == decided


@pytest.mark.parametrize(("right", "passed"), [(90, True), (60, True), (30, False)])
def test_a_worse_version_is_stopped_by_its_baseline(
    right: int, passed: bool, evaluated: Evaluate
) -> None:
    result = evaluated({"spelling@1": 60, "spelling@2": right}, baseline="spelling@1")

    (decided,) = result.gates

    assert (decided.candidate, decided.passed) == ("spelling@2", passed)
    assert passed or "exact_match is worse: 0.500 -> 0.250" in decided.reasons[0]


def test_nobody_passes_with_failed_requests(
    serve: Callable[..., ScriptedServer], write_suite: Callable[..., Path]
) -> None:
    def fail(request: pb.GenerateRequest) -> Reply:
        if request.sampling.max_tokens > 1 and "1" in request.chat.messages[-1].content:
            return Failure(grpc.StatusCode.INTERNAL, "incident 123")
        return Answer("yes")

    with pytest.raises(EvaluationFailedError) as raised:
        evaluate(write_suite([("0", "yes"), ("1", "yes")]), serve(fail).target)

    assert gate(raised.value.result, "spelling").reasons == ("spelling: 1 of 2 requests failed",)


def test_a_baseline_that_was_not_heard_is_not_beaten(
    serve: Callable[..., ScriptedServer], write_suite: Callable[..., Path]
) -> None:
    def answer(request: pb.GenerateRequest) -> Reply:
        early = int(request.chat.messages[-1].content) < ROWS // 2
        if request.adapter in ("spelling@2", f"spelling@{versioned(2)}"):
            return Answer("yes" if early else "no", version=2)
        if request.sampling.max_tokens > 1 and early:
            return Failure(grpc.StatusCode.INTERNAL, "incident 123")
        return Answer("yes" if request.sampling.max_tokens == 1 else "no", version=1)

    suite = write_suite([(str(n), "yes") for n in range(ROWS)])
    with pytest.raises(EvaluationFailedError) as raised:
        evaluate(suite, serve(answer).target, ["spelling@2"], baseline="spelling@1", only=True)

    (decided,) = raised.value.result.gates
    assert decided.comparison is not None
    assert decided.reasons == ("spelling: 60 of 120 requests of the baseline failed",)


def test_slices_are_scored_apart(evaluated: Evaluate) -> None:
    result = evaluated({"spelling@1": range(0, ROWS, 2)}, task="slices: [parity]")

    slices = {entry.value: entry for entry in result.tasks[0].slices}

    assert {value: entry.rows for value, entry in slices.items()} == {
        "(none)": 1,
        "even": ROWS // 2 - 1,
        "odd": ROWS // 2,
    }
    assert slices["even"].scores[1]["exact_match"].mean == 1
    assert slices["odd"].scores[1]["exact_match"].mean == 0
    assert result.tasks[0].rows[3].slices == {"parity": "odd"}


@pytest.mark.parametrize(("right", "verdict"), [(67, "better"), (66, "too_few_rows")])
def test_several_scores_share_one_chance_of_error(
    right: int, verdict: str, evaluated: Evaluate
) -> None:
    result = evaluated(
        {"spelling@1": 60, "spelling@2": right},
        scorers="[exact_match, {kind: regex, pattern: 'yes'}]",
        task="compare: [exact_match, regex]",
    )

    decided = compare(result, "spelling@2", "spelling@1")

    test = decided.scores[0].test
    assert [(score.adjusted_p, score.needed_rows) for score in decided.scores] == [
        (pytest.approx(2 * test.p_value), needed_rows(test.deviation, Decision(), scores=2))
    ] * 2
    assert test.p_value < 0.05, "which alone were enough"
    assert decided.verdict == verdict


def test_one_score_that_cannot_be_told_leaves_the_whole_undecided(evaluated: Evaluate) -> None:
    result = evaluated(
        {"spelling@1": 60, "spelling@2": 90},
        scorers="[exact_match, {kind: regex, pattern: 'yes|no'}]",
        task="compare: [exact_match, regex]",
    )
    assert compare(result, "spelling@2", "spelling@1").verdict == "better"

    finer = compare(result, "spelling@2", "spelling@1", decision=Decision(difference=0.01))

    assert [score.verdict for score in finer.scores] == ["better", "too_few_rows"]
    assert finer.verdict == "too_few_rows"


def test_a_score_exactly_at_its_bound_keeps_it() -> None:
    mean = (0.1 + 0.7) / 2
    assert mean < 0.4, "as floating-point numbers are added"

    for bound, value in (({"at_least": 0.4}, mean), ({"at_most": mean}, 0.4)):
        threshold = Threshold.model_validate({"score": "macro_f1"} | bound)
        assert check(threshold, Score(value, value, value)).passed
    below = Threshold(score="macro_f1", at_least=0.4)
    assert not check(below, Score(0.39999, 0.3, 0.5)).passed
