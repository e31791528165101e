"""Answers that are SQL queries, run against a fixture database."""

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from manylora_evaluator.errors import FixtureError
from manylora_evaluator.rows import Row
from manylora_evaluator.scorer_settings import SqlSettings
from manylora_evaluator.scorers.tally import Tallies, one

LARGEST_VALUE = 1024 * 1024
"""Bytes of the longest text a query may make, so that none fills the memory …"""
LARGEST_RESULT = 16 * 1024 * 1024
"""… and of all text in its result."""
DIGITS = 9
"""Significant digits to which real numbers are compared."""
STEPS = 1_000
"""Instructions of SQLite's machine between two looks at the clock."""

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_REFUSED = {"load_extension", "printf", "format", "json_patch"}
"""Functions; the formatting ones pad to any width without a look at the clock, and the last looks
for each key of one object among those of the other."""
_SEARCHES = {"instr": 2, "replace": 3, "trim": 2, "ltrim": 2, "rtrim": 2}
"""Functions that look for one text at each place of another, with how many arguments they have."""
LONGEST_SEARCH = 1 << 26
"""Comparisons that one of them may come to, some tenths of a second."""
_FENCE = re.compile(r"```(?:sql(?:ite)?)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

Result = list[tuple[Hashable, ...]]


class Sql:
    """The answer's query returns what the expected query returns.

    The fixture is a script run once into a database in memory. Queries may only read it: an
    authorizer refuses every other action (writing, attaching files, pragmas, `printf`) when a
    statement is prepared. Time, result rows, the size of values and searches of one long text for
    another are bounded. Names of columns do not count, their order does. The answer may stand in
    a Markdown fence. `SCORE.runs` is the share of answers that are one permitted query without an
    error.
    """

    def __init__(self, settings: SqlSettings) -> None:
        self._settings = settings
        self._database = _build(settings)
        self._deadline = math.inf
        plain = sqlite3.connect(":memory:")
        for name, arguments in _SEARCHES.items():
            bounded = self._bounded(plain, name, arguments)
            self._database.create_function(name, arguments, bounded, deterministic=True)
        self._expected: dict[str, Result | str] = {}
        self.names = (settings.name, f"{settings.name}.runs")

    def unfit(self, row: Row) -> str | None:
        """A query that runs is needed."""
        result = self._expectation(row.expected)
        return f"is no query of the fixture: {result}" if isinstance(result, str) else None

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """1 for equal results, else 0; and whether the query ran."""
        wanted, given = self._expectation(row.expected), self._run(query_in(output))
        same = not isinstance(given, str) and (
            given == wanted if self._ordered(row.expected) else _counted(given) == _counted(wanted)
        )
        return {self.names[0]: one(same), self.names[1]: one(not isinstance(given, str))}

    def _expectation(self, query: str) -> Result | str:
        if query not in self._expected:
            self._expected[query] = self._run(query_in(query))
        return self._expected[query]

    def _ordered(self, query: str) -> bool:
        if self._settings.order == "as_expected":
            return re.search(r"\border\s+by\b", query, re.IGNORECASE) is not None
        return self._settings.order == "always"

    def _run(self, query: str) -> Result | str:
        """The rows `query` returns, or why there are none."""
        self._deadline = time.monotonic() + self._settings.timeout_s
        self._database.set_progress_handler(lambda: time.monotonic() > self._deadline, STEPS)
        try:
            cursor = self._database.execute(query)
            if cursor.description is None:
                return "returns no rows"
            return self._fetch(cursor)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            return str(error) or type(error).__name__

    def _bounded(self, plain: sqlite3.Connection, name: str, arguments: int) -> Callable[..., Any]:
        """SQLite's own function, for texts short enough and as long as there is time."""
        query = f"SELECT {name}({', '.join('?' * arguments)})"

        def call(*values: Any) -> Any:
            text, sought = (len(str(value)) for value in values[:2])
            if text * sought > LONGEST_SEARCH or time.monotonic() > self._deadline:
                raise OverflowError
            return plain.execute(query, values).fetchone()[0]

        return call

    def _fetch(self, cursor: sqlite3.Cursor) -> Result | str:
        rows: Result = []
        size = 0
        for row in cursor:
            size += sum(len(value) for value in row if isinstance(value, str | bytes))
            if len(rows) == self._settings.most_rows or size > LARGEST_RESULT:
                cursor.close()
                return f"returns more than {self._settings.most_rows} rows, or too much text"
            rows.append(tuple(map(_comparable, row)))
        return rows


def query_in(answer: str) -> str:
    """The query in `answer`: the first Markdown fence in it, else all of it."""
    fence = _FENCE.search(answer)
    return (fence.group(1) if fence else answer).strip()


def _build(settings: SqlSettings) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(settings.fixture.read_text(encoding="utf-8"))
        database.commit()
    except (OSError, UnicodeDecodeError, sqlite3.Error) as error:
        database.close()
        raise FixtureError(f"{settings.fixture} makes no database: {error}") from error
    database.text_factory = _decode
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
    database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.set_authorizer(_authorize)
    return database


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _authorize(action: int, *about: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and _REFUSED & set(about):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _counted(result: Result | str) -> Counter[tuple[Hashable, ...]] | str:
    return result if isinstance(result, str) else Counter(result)


def _comparable(value: Any) -> Hashable:
    if isinstance(value, float):
        # 2 and 2.0 are equal to SQL, and hash alike; sums differ in the last digits by order.
        return float(f"{value:.{DIGITS}g}")
    return value
