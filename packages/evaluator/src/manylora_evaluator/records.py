"""Keeps what an evaluation found on the versions it evaluated."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from manylora_evaluator.errors import ResultsError
from manylora_evaluator.gates import gate
from manylora_evaluator.results import Column, EvaluationResult, Version
from manylora_evaluator.verdicts import Gate

LONGEST_NAME = 64
LONGEST_REASON = 300
MOST_REASONS = 20


class EvaluationRecords(Protocol):
    """Where results are kept: a registry."""

    def record_evaluation(
        self, version: str, suite: str, result: Mapping[str, Any], passed: bool
    ) -> object:
        """Keeps `result` on the version that the reference `version` means."""
        ...


def record(result: EvaluationResult, records: EvaluationRecords) -> list[Gate]:
    """Records every evaluated adapter version but the baseline, once; returns their gates.

    A version passed when its gate is open, under every name it was asked by: the latest record
    counts, and one of some of a version's names would hide the others. Kept are the scores with
    their intervals, the gate's reasons and comparison, and what the judges cost; rows and answers
    stay in results.json.

    Raises:
        ResultsError: the suite's name has no letter or digit to name the record by.
    """
    suite = record_name(result.suite)
    baselines = {entry.comparison.baseline for entry in result.gates if entry.comparison}
    columns = [column for task in result.tasks for column in task.columns]
    left_out = {column.version for column in columns if column.adapter in baselines}
    asked_by: dict[Version, list[str]] = {}
    for column in columns:
        if column.version is not None and column.version not in left_out:
            asked_by.setdefault(column.version, []).append(column.adapter)
    kept: list[Gate] = []
    for version, references in asked_by.items():
        decided = _decided(result, [*dict.fromkeys(references)])
        records.record_evaluation(
            f"{version.name}@{version.digest}",
            suite,
            _payload(result, version, decided),
            decided.passed,
        )
        kept.append(decided)
    return kept


def _decided(result: EvaluationResult, references: Sequence[str]) -> Gate:
    """The gate of a version that was asked by these `references`: open where each of theirs is."""
    known = {entry.candidate: entry for entry in result.gates}
    gates = [known.get(reference) or gate(result, reference) for reference in references]
    # What was set beside a baseline says most.
    chief = next((entry for entry in gates if entry.comparison), gates[0])
    reasons = dict.fromkeys(reason for entry in (chief, *gates) for reason in entry.reasons)
    return replace(chief, passed=not reasons, reasons=tuple(reasons))


def record_name(suite: str) -> str:
    """The suite's title as a registry names suites: lower case, with dashes.

    Raises:
        ResultsError: nothing is left of it.
    """
    name = re.sub(r"[^a-z0-9._]+", "-", suite.lower()).strip("-._")[:LONGEST_NAME]
    if not name:
        raise ResultsError(f"suite {suite!r} cannot name a record: it has no letter or digit")
    return name


def _payload(result: EvaluationResult, version: Version, decided: Gate) -> dict[str, Any]:
    compared = decided.comparison
    return {
        "started_at": result.started_at.isoformat(),
        "reference": decided.candidate,
        "number": version.number,
        "seed": result.seed,
        "tasks": {
            task.task: _column(column, len(task.rows))
            for task in result.tasks
            for column in task.columns
            if column.version == version
        },
        "reasons": [reason[:LONGEST_REASON] for reason in decided.reasons[:MOST_REASONS]],
        "comparison": None
        if compared is None
        else {
            "baseline": compared.baseline,
            "verdict": compared.verdict,
            "scores": [
                {"task": entry.task, "score": entry.score, "verdict": entry.verdict}
                | asdict(entry.test)
                | {"adjusted_p": entry.adjusted_p, "regressions": len(entry.regressions)}
                for entry in compared.scores
            ],
        },
        "judges": [asdict(judge) for judge in result.judges],
    }


def _column(column: Column, rows: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "failures": column.failures,
        "latency_p50": column.latency_p50,
        "latency_p95": column.latency_p95,
        "scores": {name: asdict(score) for name, score in column.scores.items()},
    }
