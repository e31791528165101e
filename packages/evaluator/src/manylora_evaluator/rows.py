"""Held-out rows: what is asked and what is expected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from manylora_evaluator.errors import RowsError
from manylora_evaluator.scorers import SCORERS, ScorerName


class Message(BaseModel, frozen=True, extra="forbid"):
    """One message of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Row:
    """One held-out example."""

    messages: tuple[Message, ...]
    """The prompt, without the answer."""
    expected: str
    columns: Mapping[str, Any]
    """The row the example was made from."""


class _Line(BaseModel, frozen=True):
    messages: tuple[Message, ...] = Field(min_length=1)
    expected: str = Field(min_length=1)
    row: dict[str, Any] = Field(default_factory=dict)


def load_rows(path: Path, scorers: Sequence[ScorerName], limit: int | None = None) -> list[Row]:
    """Reads the first `limit` rows of the JSON-lines file `path`; None: all.

    A line is `{"messages": [{"role", "content"}, ...], "expected": TEXT, "row": {...}}`, as a
    training run writes them.

    Raises:
        RowsError: for the first line that is malformed, or whose `expected` a scorer cannot use.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(path, f"cannot be read: {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if len(rows) == limit:
            break
        if line.strip():
            rows.append(_parse(path, number, line, scorers))
    if not rows:
        raise RowsError(path, "holds no rows")
    return rows


def _parse(path: Path, number: int, line: str, scorers: Sequence[ScorerName]) -> Row:
    try:
        parsed = _Line.model_validate_json(line)
    except ValidationError as error:
        problems = (
            f"{'.'.join(str(part) for part in problem['loc']) or 'row'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise RowsError(path, "; ".join(problems), number) from error
    for name in scorers:
        problem = SCORERS[name].unfit(parsed.expected)
        if problem is not None:
            raise RowsError(path, f"expected: {problem}, which {name} needs", number)
    return Row(parsed.messages, parsed.expected, parsed.row)
