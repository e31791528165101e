"""Queries as answers: the right rows in whatever words, and nothing but reading."""

import sqlite3
import time
from pathlib import Path

import pytest

from manylora_evaluator.scorers.tally import Tally
from tests.unit.evaluator.scorer_cases import fixture, row, scorer, tally

SCRIPT = """
CREATE TABLE visit (id INTEGER PRIMARY KEY, patient TEXT, fee REAL, note BLOB);
INSERT INTO visit VALUES (1, 'Ada', 0.1, NULL), (2, 'Bo', 0.2, x'00ff'), (3, 'Ada', 0.3, NULL);
"""
ALL = "SELECT patient, fee FROM visit"


@pytest.mark.parametrize(
    ("output", "expected", "hit"),
    [
        pytest.param("select v.patient, v.fee from visit v", ALL, 1, id="other words"),
        pytest.param(f"```sql\n{ALL};\n```\nThat is it.", ALL, 1, id="in a fence"),
        pytest.param(f"{ALL} ORDER BY fee DESC", ALL, 1, id="order is nothing"),
        pytest.param(f"{ALL} ORDER BY fee", f"{ALL} ORDER BY fee DESC", 0, id="unless asked for"),
        pytest.param("SELECT fee, patient FROM visit", ALL, 0, id="columns are in order"),
        pytest.param("SELECT DISTINCT patient FROM visit", "SELECT patient FROM visit", 0, id="n"),
        pytest.param("SELECT 0.1 + 0.2", "SELECT sum(fee) FROM visit WHERE id < 3", 1, id="sums"),
        pytest.param("SELECT 2.0", "SELECT 2", 1, id="2 is 2.0"),
        pytest.param("SELECT '2'", "SELECT 2", 0, id="text is no number"),
        pytest.param("SELECT x'00ff'", "SELECT note FROM visit WHERE id = 2", 1, id="bytes"),
        pytest.param("SELECT NULL", "SELECT note FROM visit WHERE id = 1", 1, id="null"),
        pytest.param("SELECT x FROM visit", ALL, 0, id="an error"),
        pytest.param("", ALL, 0, id="nothing"),
        pytest.param("I do not know.", ALL, 0, id="no query"),
    ],
)
def test_results_are_compared(output: str, expected: str, hit: float, tmp_path: Path) -> None:
    assert tally(fixture(tmp_path, SCRIPT), output, expected) == Tally(hit, 1)


@pytest.mark.parametrize(("order", "hit"), [("always", 0), ("never", 1)])
def test_order_may_be_settled(order: str, hit: float, tmp_path: Path) -> None:
    settings = fixture(tmp_path, SCRIPT) | {"order": order}

    assert tally(settings, f"{ALL} ORDER BY fee DESC", f"{ALL} ORDER BY fee") == Tally(hit, 1)


@pytest.mark.parametrize(
    "attack",
    [
        "DELETE FROM visit",
        "DELETE FROM visit RETURNING patient, fee",
        "UPDATE visit SET fee = 0 RETURNING patient, fee",
        "DROP TABLE visit",
        "CREATE TABLE more (a)",
        "ATTACH DATABASE '{file}' AS other",
        "VACUUM INTO '{file}'",
        "PRAGMA query_only = 0",
        "PRAGMA table_info(visit)",
        "SELECT load_extension('{file}')",
        "SELECT 1; DELETE FROM visit",
        "BEGIN IMMEDIATE",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "SELECT zeroblob(1000000000)",
        "SELECT printf('%.*c', 900000000, 'x')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 90) "
        "SELECT hex(zeroblob(400000)) FROM n",
        "SELECT group_concat(hex(zeroblob(1000000))) FROM visit, visit, visit",
        "SELECT instr(hex(zeroblob(500000)), hex(zeroblob(250000)) || '1')",
        "SELECT replace(hex(zeroblob(500000)), hex(zeroblob(250000)) || '1', '')",
        "SELECT trim(hex(zeroblob(500000)), substr(replace(hex(zeroblob(30000)), '0', '1'), 2)"
        " || '0')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
        "sum(instr(hex(zeroblob(5000)) || i, hex(zeroblob(2500)) || '1')) FROM n",
        "SELECT json_patch(1, 2)",
    ],
)
def test_an_answer_can_only_read_and_not_for_ever(attack: str, tmp_path: Path) -> None:
    file = tmp_path / "stolen"
    made = scorer(fixture(tmp_path, SCRIPT) | {"timeout_s": 0.1, "most_rows": 100}, ALL)

    begun = time.monotonic()
    shares = made.score(attack.format(file=file), row(ALL))
    assert time.monotonic() - begun < 5

    assert shares == {"sql": (Tally(0, 1),), "sql.runs": (Tally(0, 1),)}
    assert not file.exists()
    assert made.score(ALL, row(ALL))["sql"] == (Tally(1, 1),), "the database is as it was"


@pytest.mark.parametrize(
    "query",
    [
        "SELECT instr('aXbX', 'X'), instr('a', 'b'), instr(x'0102', x'02'), instr(NULL, 'a')",
        "SELECT replace('a-b-c', '-', '+'), replace(3.50, '.', ','), replace('a', '', 'b')",
        "SELECT trim('xxaxx', 'x'), ltrim('xxaxx', 'x'), rtrim('xxaxx', 'x'), trim(' a ')",
        "SELECT patient FROM visit WHERE instr(patient, 'd') ORDER BY replace(patient, 'A', 'z')",
    ],
)
def test_searches_are_sqlites_own(query: str, tmp_path: Path) -> None:
    plain = sqlite3.connect(":memory:")
    plain.executescript(SCRIPT)
    rows = ", ".join(f"({', '.join(map(_literal, row))})" for row in plain.execute(query))

    assert tally(fixture(tmp_path, SCRIPT), query, f"VALUES {rows}") == Tally(1, 1)


def _literal(value: str | int | None) -> str:
    return "NULL" if value is None else repr(value)


def test_an_expected_query_that_fails_is_unfit(tmp_path: Path) -> None:
    made = scorer(fixture(tmp_path, SCRIPT), ALL)

    assert made.unfit(row(ALL)) is None
    assert "no such column: x" in str(made.unfit(row("SELECT x FROM visit")))
