"""Keeps what an evaluation found on the versions it evaluated."""

import re
from collections.abc import Mapping
from dataclasses import asdict
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
    """Records every evaluated adapter version but the baseline; returns their gates.

    A version passed when its gate is open. Kept are the scores with their intervals, the gate's
    reasons and comparison, and what the judges cost; rows and answers stay in results.json.

    Raises:
        ResultsError: the suite's name has no letter or digit to name the record by.
    """
    suite = record_name(result.suite)
    baselines = {entry.comparison.baseline for entry in result.gates if entry.comparison}
    columns = {
        column.adapter: column
        for task in result.tasks
        for column in task.columns
        if column.version is not None and column.adapter not in baselines
    }
    known = {entry.candidate: entry for entry in result.gates}
    kept: list[Gate] = []
    for adapter, column in columns.items():
        decided = known.get(adapter) or gate(result, adapter)
        version = column.version
        assert version is not None, "the bare base was left out above"
        records.record_evaluation(
            f"{version.name}@{version.digest}",
            suite,
            _payload(result, adapter, version, decided),
            decided.passed,
        )
        kept.append(decided)
    return kept


def record_name(suite: str) -> str:
    """The suite's title as a registry names suites: lower case, with dashes.

    Raises:
        ResultsError: nothing is left of it.
    """
    name = re.sub(r"[^a-z0-9._]+", "-", suite.lower()).strip("-._")[:LONGEST_NAME]
    if not name:
        raise ResultsError(f"suite {suite!r} cannot name a record: it has no letter or digit")
    return name


def _payload(
    result: EvaluationResult, adapter: str, version: Version, decided: Gate
) -> dict[str, Any]:
    compared = decided.comparison
    return {
        "started_at": result.started_at.isoformat(),
        "reference": adapter,
        "number": version.number,
        "seed": result.seed,
        "tasks": {
            task.task: _column(column, len(task.rows))
            for task in result.tasks
            for column in task.columns
            if column.adapter == adapter
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
