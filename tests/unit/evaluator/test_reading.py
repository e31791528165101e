"""Suites and rows: every mistake is named with its place."""

import json
import math
from datetime import date, time
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manylora_evaluator import FixtureError, RowsError, SuiteError
from manylora_evaluator.row_settings import HeldOutRows, JsonlRows, ParquetRows, Prompt
from manylora_evaluator.rows import load_rows
from manylora_evaluator.scoring import prepare, prepare_all
from manylora_evaluator.suite import Task, load_suite
from manylora_registry.errors import ConfigError

GOOD = {"messages": [{"role": "user", "content": "recieve"}], "expected": "receive"}


def task_of(path: Path, *scorers: object, **settings: object) -> Task:
    return Task.model_validate(
        {"name": "a", "adapter": "a", "rows": str(path), "scorers": list(scorers)} | settings
    )


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_malformed_references_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "name: s\n"
        "tasks: [{name: a, adapter: Spelling, rows: a.jsonl, scorers: [exact_match]}]\n"
        "judges: {good: {kind: gateway}, bad: {kind: gateway, adapter: spelling@0}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    message = str(caught.value)
    assert "tasks.0.adapter: 'Spelling' is not an adapter name" in message
    assert "judges.bad.gateway.adapter: '0' selects no version" in message
    assert "good" not in message


def test_rows_lie_beside_the_suite(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "suite.yaml"
    path.write_text(
        "name: s\ntasks: [{name: a, adapter: a, rows: ../a.jsonl, scorers: [exact_match]}]\n"
    )

    (task,) = load_suite(path).tasks

    assert task.rows.file.resolve() == tmp_path / "a.jsonl"


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


@pytest.mark.parametrize(
    ("bounds", "complaint"),
    [
        ("at_least: 80", "less than or equal to 1"),
        ("at_least: .nan", "finite number"),
        ("at_least: 0.5, at_most: 0.2", "no score is"),
    ],
)
def test_a_threshold_that_no_score_or_every_score_keeps_is_refused(
    bounds: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "name: s\ntasks:\n  - {name: a, adapter: a, rows: a.jsonl, scorers: [exact_match],\n"
        f"     thresholds: [{{score: exact_match, {bounds}}}]}}\n"
    )

    with pytest.raises(ConfigError, match=f"line 4: .*thresholds.0.*{complaint}"):
        load_suite(path)


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

    rows = load_rows(JsonlRows(kind="jsonl", path=path), limit=3)

    assert [row.expected for row in rows] == ["0", "1", "2"]
    assert rows[2].columns == {"n": 2}
    assert rows[0].messages[0].content == "recieve"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        (
            json.dumps(GOOD)[:-1] + ', "expected": "{}"}',
            "the key 'expected' stands in an object tw",
        ),
        ("[]", "must be a JSON object"),
        (json.dumps({"expected": "x"}), "messages: Field required"),
        (json.dumps(GOOD | {"messages": []}), "messages: "),
        (json.dumps(GOOD | {"messages": [{"role": "robot", "content": "x"}]}), "messages.0.role: "),
        (json.dumps(GOOD | {"expected": ""}), "expected: is not a JSON object"),
        (json.dumps(GOOD | {"expected": 1}), "expected: "),
        (json.dumps(GOOD | {"row": {"half": "\ud800"}}), "half a surrogate pair"),
        (json.dumps(GOOD), "expected: is not a JSON object, which json_field_f1 needs"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(
    line: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | {"expected": "{}"}) + "\n" + line + "\n")

    with pytest.raises(RowsError) as raised:
        prepare(task_of(path, "json_field_f1"), None)

    assert str(raised.value).startswith(f"{path} line 2: ")
    assert complaint in str(raised.value)
    assert (raised.value.path, raised.value.line) == (path, 2)


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_a_file_without_readable_rows_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(RowsError, match=r"rows\.jsonl( line 1)?: "):
        load_rows(JsonlRows(kind="jsonl", path=path))


def test_held_out_rows_of_a_run_are_found_by_task(tmp_path: Path) -> None:
    (tmp_path / "run" / "held_out").mkdir(parents=True)
    write_lines(tmp_path / "run" / "held_out" / "spelling.jsonl", GOOD)

    (row,) = load_rows(HeldOutRows(kind="held_out", run=tmp_path / "run", task="spelling"))

    assert row.expected == "receive"


def test_a_prompt_is_written_from_columns(tmp_path: Path) -> None:
    columns = {"word": "recieve", "right": "receive", "tags": ["ie", "ei"]}
    prompt = Prompt(system="Tags: {tags}", user="Correct {{{word}}}", expected="{right}")

    plain, held_out = load_rows(
        JsonlRows(
            kind="jsonl", path=write_lines(tmp_path / "r.jsonl", columns, GOOD | {"row": columns})
        ),
        prompt,
    )

    assert [message.content for message in plain.messages] == [
        'Tags: ["ie", "ei"]',
        "Correct {recieve}",
    ]
    assert (plain.expected, plain.columns) == ("receive", columns)
    assert (held_out.messages, held_out.expected) == (plain.messages, plain.expected)


def test_columns_make_one_json_object(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", {"q": "x", "b": [1], "a": None})

    (row,) = load_rows(
        JsonlRows(kind="jsonl", path=path), Prompt(user="{q}", expected_json=("b", "a"))
    )

    assert row.expected == '{"a": null, "b": [1]}'


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"q": "x"}, "has no column 'answer'"),
        ({"q": "x", "answer": None}, "column 'answer' is nul"),
        ({"q": "x", "answer": [math.nan]}, "column 'answer' holds NaN or infinity"),
    ],
)
def test_a_column_that_says_nothing_is_named(
    columns: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "r.jsonl", columns)

    with pytest.raises(RowsError, match=f"line 1: {complaint}"):
        load_rows(JsonlRows(kind="jsonl", path=path), Prompt(user="{q}", expected="{answer}"))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for text in (json.dumps(GOOD), "\r\n" + json.dumps(GOOD)):
        path.write_text(text, encoding="utf-8-sig")

        assert len(load_rows(JsonlRows(kind="jsonl", path=path))) == 1


def test_parquet_rows_are_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"q": ["a", "b", "c"], "n": [1, 2, 3]}), path)

    rows = load_rows(ParquetRows(kind="parquet", path=path), Prompt(user="{q}", expected="{n}"), 2)

    assert [(row.messages[0].content, row.expected) for row in rows] == [("a", "1"), ("b", "2")]
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(RowsError, match="cannot be read as Parquet"):
        load_rows(ParquetRows(kind="parquet", path=path), Prompt(user="{q}"))


def test_parquet_values_that_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    day, price = date(2024, 2, 29), Decimal("1.50")
    pq.write_table(pa.table({"day": [day], "price": [price], "raw": [b"\xff"]}), path)
    source = ParquetRows(kind="parquet", path=path)

    (row,) = load_rows(source, Prompt(user="{day}", expected="{price}"))

    assert (row.messages[0].content, row.expected) == ("2024-02-29", "1.50")
    deep = {
        "raw": [b"\xff"],
        "in": [{"raw": b"\xff"}],
        "by_day": pa.array([[(day, 1)]], pa.map_(pa.date32(), pa.int32())),
    }
    pq.write_table(pa.table(deep), path)
    for name in deep:
        with pytest.raises(RowsError, match=f"column '{name}' holds bytes or keys"):
            load_rows(source, Prompt(user=f"{{{name}}}"))
    pq.write_table(pa.table({"price": [Decimal("0E-8")]}), path)
    (row,) = load_rows(source, Prompt(user="{price}", expected_json=("price",)))
    assert (row.messages[0].content, row.expected) == ("0.00000000", '{"price": "0.00000000"}')
    pq.write_table(pa.table({"at": pa.array([2**45]).view(pa.timestamp("s"))}), path)
    with pytest.raises(RowsError, match="cannot be read as Parquet"):
        load_rows(source, Prompt(user="{at}"))


def test_parquet_values_are_asked_as_training_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    narrow, text = pa.float32(), pa.string()
    columns = {
        "a": pa.array([0.1], narrow),
        "b": pa.array([[0.1]], pa.list_(narrow)),
        "c": pa.array([{"x": 0.1}], pa.struct({"x": narrow})),
        "d": pa.array([[("x", 0.1)]], pa.map_(text, narrow)),
        "e": pa.array([[0.1, 2.5]], pa.list_(narrow, 2)),
        "f": pa.array([time(9, 30)]),
    }
    pq.write_table(pa.table(columns), path)

    (row,) = load_rows(
        ParquetRows(kind="parquet", path=path),
        Prompt(user="{a} {b} {c} {d} {e} {f}", expected="{a}"),
    )

    assert row.messages[0].content == '0.1 [0.1] {"x": 0.1} {"x": 0.1} [0.1, 2.5] 09:30:00'


def test_a_mistake_in_a_message_is_no_lack_of_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", {"messages": [{"role": "tool", "content": "a"}]})

    with pytest.raises(RowsError, match=r"messages\.0\.role: ") as raised:
        load_rows(JsonlRows(kind="jsonl", path=path))

    assert "at least 1 item" not in str(raised.value)


def test_a_row_is_known_by_what_it_asks_and_expects(tmp_path: Path) -> None:
    other = GOOD | {"expected": "relieve"}
    first = load_rows(
        JsonlRows(kind="jsonl", path=write_lines(tmp_path / "a.jsonl", GOOD, other, GOOD))
    )
    second = load_rows(JsonlRows(kind="jsonl", path=write_lines(tmp_path / "b.jsonl", other, GOOD)))

    assert len({row.id for row in first}) == 3
    assert [second[1].id, second[0].id] == [first[0].id, first[1].id]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"thresholds": [{"score": "rouge_l", "at_least": 1}]}, "has no score rouge_l; it has exa"),
        ({"compare": ["guess"]}, "has no score guess"),
        ({"slices": ["colour"]}, "is to be sliced by colour, which none of the rows"),
    ],
)
def test_a_suite_that_asks_for_what_is_not_there_is_refused(
    change: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(SuiteError, match=complaint):
        prepare(task_of(write_lines(tmp_path / "r.jsonl", GOOD), "exact_match", **change), None)


def test_what_is_wrong_with_several_tasks_is_told_at_once(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "r.jsonl", GOOD)
    good = task_of(rows, "exact_match")
    names = task_of(rows, "exact_match", compare=["guess"], slices=["colour"])
    number = task_of(rows, "numeric")

    with pytest.raises(SuiteError) as refused:
        prepare_all([names, good, number, task_of(tmp_path / "none.jsonl", "rouge_l")], None)

    for said in (
        "has no score guess",
        "sliced by colour",
        "r.jsonl line 1: expected: is not a number",
        "none.jsonl: cannot be read",
    ):
        assert said in str(refused.value)
    with pytest.raises(RowsError, match="is not a number"):
        prepare_all([good, number], None)


def test_a_fixture_that_fails_is_named(tmp_path: Path) -> None:
    fixture = tmp_path / "fixture.sql"
    fixture.write_text("CREATE TABLE t (a); INSERT INTO nowhere VALUES (1);")
    rows = write_lines(tmp_path / "r.jsonl", GOOD)

    with pytest.raises(FixtureError, match=r"fixture\.sql makes no database: no such table"):
        prepare(task_of(rows, {"kind": "sql", "fixture": str(fixture)}), None)


@pytest.mark.parametrize(
    ("scorer", "complaint"),
    [
        ("{kind: regex, pattern: '('}", "is not a regular expression"),
        ("{kind: regex, pattern: a, group_is_expected: true}", "needs a group"),
        ("{kind: json_schema, schema: {type: thing}}", "is not a JSON Schema"),
        ("{kind: numeric, relative: 2}", "less than 1"),
        ("{kind: judge, by: x, criteria: {}}", "at least 1"),
    ],
)
def test_a_scorer_that_cannot_work_is_refused_with_its_line(
    scorer: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"name: s\ntasks:\n  - {{name: a, adapter: a, rows: a.jsonl, scorers: [{scorer}]}}\n"
    )

    with pytest.raises(ConfigError, match=complaint) as raised:
        load_suite(path)
    assert raised.value.problems[0].line == 3
