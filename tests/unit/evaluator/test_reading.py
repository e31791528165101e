"""Suites and rows: every mistake is named with its place."""

import json
from pathlib import Path

import pytest

from manylora_evaluator import RowsError
from manylora_evaluator.rows import load_rows
from manylora_evaluator.suite import load_suite
from manylora_registry.errors import ConfigError

GOOD = {"messages": [{"role": "user", "content": "recieve"}], "expected": "receive"}


def test_rows_lie_beside_the_suite(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "suite.yaml"
    path.write_text(
        "name: s\ntasks: [{name: a, adapter: a, rows: ../a.jsonl, scorers: [exact_match]}]\n"
    )

    (task,) = load_suite(path).tasks

    assert task.rows.resolve() == tmp_path / "a.jsonl"


def test_every_mistake_of_a_suite_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "concurrency: 0\n"
        "colour: blue\n"
        "tasks:\n"
        "  - {name: a, adapter: a, rows: a.jsonl, scorers: [exact_match, guess]}\n"
        "  - {name: b, adapter: '', rows: b.jsonl, limit: 0, scorers: []}\n"
    )

    with pytest.raises(ConfigError) as raised:
        load_suite(path)

    assert {problem.path for problem in raised.value.problems} == {
        "name",
        "concurrency",
        "colour",
        "tasks.0.scorers.1",
        "tasks.1.adapter",
        "tasks.1.limit",
        "tasks.1.scorers",
    }


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    task = "{name: a, adapter: a, rows: a.jsonl, scorers: [exact_match]}"
    path.write_text(f"name: s\ntasks: [{task}, {task}]\n")

    with pytest.raises(ConfigError, match="two tasks have the same name: a"):
        load_suite(path)


def test_rows_are_read_in_order_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(GOOD | {"expected": str(n), "row": {"n": n}}) for n in range(3)]
    path.write_text(lines[0] + "\n\n" + lines[1] + "\r\n" + lines[2] + "\nnot read")

    rows = load_rows(path, ["exact_match"], limit=3)

    assert [row.expected for row in rows] == ["0", "1", "2"]
    assert rows[2].columns == {"n": 2}
    assert rows[0].messages[0].content == "recieve"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Invalid JSON"),
        ("[]", "row: "),
        (json.dumps({"expected": "x"}), "messages: Field required"),
        (json.dumps(GOOD | {"messages": []}), "messages: "),
        (json.dumps(GOOD | {"messages": [{"role": "robot", "content": "x"}]}), "messages.0.role: "),
        (json.dumps(GOOD | {"expected": ""}), "expected: "),
        (json.dumps(GOOD), "expected: is not a JSON object, which json_field_f1 needs"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(
    line: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | {"expected": "{}"}) + "\n" + line + "\n")

    with pytest.raises(RowsError) as raised:
        load_rows(path, ["json_field_f1"])

    assert str(raised.value).startswith(f"{path} line 2: ")
    assert complaint in str(raised.value)
    assert (raised.value.path, raised.value.line) == (path, 2)


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_a_file_without_readable_rows_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(RowsError, match=r"rows\.jsonl: "):
        load_rows(path, ["exact_match"])
