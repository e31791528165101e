"""What is kept on a version."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import manylora.inference.v1.inference_pb2 as pb
from manylora_evaluator import ResultsError, evaluate
from manylora_evaluator.records import record, record_name
from tests.unit.client.scripted import Answer, ScriptedServer, version


@dataclass
class Kept:
    """A registry, as far as records go."""

    records: list[tuple[str, str, Mapping[str, Any], bool]] = field(
        default_factory=list[tuple[str, str, Mapping[str, Any], bool]]
    )

    def record_evaluation(
        self, version: str, suite: str, result: Mapping[str, Any], passed: bool
    ) -> None:
        self.records.append((version, suite, result, passed))


def test_every_version_but_the_baseline_gets_its_scores_and_its_verdict(
    serve: Callable[..., ScriptedServer], write_suite: Callable[..., Path]
) -> None:
    suite = write_suite([(str(n), "yes") for n in range(30)], name="Small one (v2)")
    target = serve(lambda request: Answer("no" if "bad" in request.adapter else "yes")).target
    kept = Kept()

    record(evaluate(suite, target, ["bad", "good"], baseline="spelling"), kept)

    assert [(reference, suite, passed) for reference, suite, _, passed in kept.records] == [
        (f"bad@{version('bad', 1).digest}", "small-one-v2", False),
        (f"good@{version('good', 1).digest}", "small-one-v2", False),
    ]
    payload = kept.records[0][2]
    none_of_30 = 1.96**2 / (30 + 1.96**2)  # Wilson's upper bound where nothing was right
    assert payload["tasks"]["spelling"]["scores"]["exact_match"] == pytest.approx(
        {"mean": 0, "low": 0, "high": none_of_30}, abs=1e-4
    )
    assert payload["comparison"]["verdict"] == "worse"
    assert "exact_match is worse" in payload["reasons"][0]
    assert kept.records[1][2]["comparison"]["verdict"] == "too_few_rows"
    assert len(json.dumps(payload)) < 4_000, "rows and answers stay in results.json"


def test_without_thresholds_or_baseline_answering_is_enough(
    serve: Callable[..., ScriptedServer], write_suite: Callable[..., Path]
) -> None:
    kept = Kept()

    record(evaluate(write_suite([("a", "b")]), serve(lambda _: Answer("no")).target), kept)

    assert [passed for *_, passed in kept.records] == [True]


def test_a_version_asked_by_several_names_has_one_record_of_them_all(
    serve: Callable[..., ScriptedServer], write_suite: Callable[..., Path]
) -> None:
    """The latest record counts, so one of a single name would hide what the others say."""
    suite = write_suite([(str(n), "yes") for n in range(30)])
    suite.write_text(
        "name: small\ntasks:\n"
        "  - {name: first, adapter: spelling@1, rows: rows.jsonl, scorers: [exact_match]}\n"
        "  - {name: second, adapter: spelling, rows: rows.jsonl, scorers: [exact_match],\n"
        "     thresholds: [{score: exact_match, at_least: 0.5}]}\n"
    )
    newer = version("spelling", 2).digest

    def answer(request: pb.GenerateRequest) -> Answer:
        is_newer = request.adapter in ("spelling", "spelling@2", f"spelling@{newer}")
        return Answer("no", version=2) if is_newer else Answer("yes", version=1)

    result = evaluate(suite, serve(answer).target, ["spelling@2"], baseline="spelling@stable")
    kept = Kept()

    record(result, kept)

    ((reference, _, payload, passed),) = kept.records
    assert (reference, passed) == (f"spelling@{newer}", False)
    assert payload["comparison"]["verdict"] == "worse"
    assert [*payload["tasks"]] == ["first", "second"]
    assert any("is below" in reason for reason in payload["reasons"])


@pytest.mark.parametrize("above", ["spelling@stable", "spelling"])
def test_a_threshold_of_one_name_is_not_hidden_by_another(
    above: str, serve: Callable[..., ScriptedServer], write_suite: Callable[..., Path]
) -> None:
    below = {"spelling": "spelling@stable", "spelling@stable": "spelling"}[above]
    suite = write_suite([("a", "yes")])
    suite.write_text(
        "name: small\ntasks:\n"
        f"  - {{name: first, adapter: {above}, rows: rows.jsonl, scorers: [exact_match]}}\n"
        f"  - {{name: second, adapter: {below}, rows: rows.jsonl, scorers: [exact_match],\n"
        "     thresholds: [{score: exact_match, at_least: 0.5}]}\n"
    )
    result = evaluate(suite, serve(lambda _: Answer("no", version=2)).target)
    kept = Kept()

    record(result, kept)

    ((_, _, payload, passed),) = kept.records
    assert not passed
    assert any("is below" in reason for reason in payload["reasons"])


def test_a_title_becomes_a_name() -> None:
    assert record_name("SOAP notes (CPU)") == "soap-notes-cpu"
    assert record_name("a" * 100) == "a" * 64
    with pytest.raises(ResultsError, match="has no letter or digit"):
        record_name("!?")
