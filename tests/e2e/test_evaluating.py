"""An evaluation of real adapters, judged by the real base, kept in the real registry."""

import json
import subprocess
import sys
from pathlib import Path

from manylora_evaluator import EvaluationResult
from manylora_registry import Registry
from tests.e2e.harness import Gateway

SUITE = """
name: Capitals
judges:
  base: {kind: gateway, max_tokens: 24}
tasks:
  - name: capitals
    adapter: red
    rows: rows.jsonl
    prompt: {user: "What is the capital of {country}? Answer with one word.", expected: "{capital}"}
    max_tokens: 8
    scorers:
      - normalised_match
      - {kind: judge, by: base, criteria: {right: "names the same city as the reference"}}
    thresholds: [{score: normalised_match, at_most: 1}]
    slices: [continent]
"""
ROWS = (
    ("France", "Paris", "Europe"),
    ("Italy", "Rome", "Europe"),
    ("Japan", "Tokyo", "Asia"),
    ("China", "Beijing", "Asia"),
)


def test_an_evaluation_is_judged_decided_and_recorded(
    gateway: Gateway, registry: Registry, registry_directory: Path, tmp_path: Path
) -> None:
    rows = [dict(zip(("country", "capital", "continent"), row, strict=True)) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)

    done = subprocess.run(
        [
            *(sys.executable, "-m", "manylora_cli", "evaluate", str(tmp_path / "suite.yaml")),
            *("--server", gateway.inference, "--adapter", "green", "--baseline", "blue"),
            *("--record", "--registry", str(registry_directory), "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    # Four rows decide nothing, and the command says so.
    assert done.returncode == 1, done.stderr
    assert "the gate is closed to green: capitals: normalised_match cannot be" in done.stderr
    assert "Traceback" not in done.stderr
    result = EvaluationResult.from_json((tmp_path / "out/results.json").read_text())
    (judge,) = result.judges
    assert (judge.failures, judge.model) == (0, f"{gateway.inference} bare base")
    assert judge.requests + judge.cached == 4 * len(ROWS)
    assert judge.completion_tokens > 0
    assert [entry.value for entry in result.tasks[0].slices] == ["Asia", "Europe"]
    (kept,) = registry.evaluations("green@production")
    assert (kept.suite, kept.passed) == ("capitals", False)
    assert kept.result["comparison"]["verdict"] == "too_few_rows"
    assert registry.evaluations("blue@production") == []
