"""Held-out rows: what is asked and what is expected."""

import codecs
import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast
from uuid import UUID

from pydantic import BaseModel, Field, ValidationError

from manylora_evaluator.errors import RowsError
from manylora_evaluator.row_settings import ParquetRows, Prompt, RowSource, placeholders
from manylora_registry.config import own_mistakes
from manylora_registry.json_objects import distinct

LONGEST_LINE = 16 * 1024 * 1024
"""Bytes; a longer line is a file without line ends, not a row."""


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
    """Empty where nothing is expected but what the scorers say."""
    columns: Mapping[str, Any]
    """The row the example was made from."""
    number: int = 1
    """Of its line, or of its row in a table; 1 is the first."""
    id: str = ""
    """The same for equal prompts and expectations in every evaluation, unique in its file."""


class _Line(BaseModel, frozen=True):
    messages: tuple[Message, ...] = Field(min_length=1)
    expected: str = ""
    row: dict[str, Any] = Field(default_factory=dict)


def load_rows(
    source: RowSource, prompt: Prompt | None = None, limit: int | None = None
) -> list[Row]:
    """Reads the first `limit` rows of `source`; None: all.

    Without a `prompt` a row is `{"messages": [{"role", "content"}, ...], "expected": TEXT,
    "row": {...}}`, as a training run writes them. With one, it is a mapping of columns, or a row
    of the first kind whose `row` holds them.

    Raises:
        RowsError: for the first row that is malformed.
    """
    path = source.file
    table = _parquet(path) if isinstance(source, ParquetRows) else json_lines(path)
    seen: Counter[str] = Counter()
    rows: list[Row] = []
    for number, columns in islice(table, limit):
        line = _carried(path, number, columns) if prompt is None else None
        line = line or _written(path, number, columns, cast("Prompt", prompt))
        identity = _digest(line)
        seen[identity] += 1
        if seen[identity] > 1:
            identity = f"{identity}-{seen[identity]}"
        rows.append(Row(line.messages, line.expected, line.row, number, identity))
    if not rows:
        raise RowsError(path, "holds no rows")
    return rows


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The JSON objects in the lines of a file, each with its line's number; 1 is the first.

    Raises:
        RowsError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise RowsError(path, f"is longer than {LONGEST_LINE >> 20} MiB", number)
                if number == 1:
                    # Editors on Windows write a byte order mark.
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, _columns(path, number, line)
    except OSError as error:
        raise RowsError(path, f"cannot be read: {error.strerror}") from error


def _columns(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        value: Any = json.loads(line.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise RowsError(path, f"is not JSON: {error}", number) from error
    if not isinstance(value, dict):
        raise RowsError(path, "must be a JSON object", number)
    # JSON can escape what no text may hold, and nothing of such a row could be sent or written.
    if b"\\u" in line and not _is_text(json.dumps(value, ensure_ascii=False)):
        raise RowsError(path, "holds half a surrogate pair, which is not text", number)
    return cast("Mapping[str, Any]", value)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        # Without stubs; an extra, so that the evaluator itself stays small.
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise RowsError(
            path, "needs pyarrow: install the extra manylora-evaluator[parquet]"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in cast("Iterator[Any]", file.iter_batches(batch_size=256)):
                for columns in _decoded(arrow, batch):
                    number += 1
                    yield number, columns
    except (OSError, ValueError, OverflowError, KeyError, NotImplementedError) as error:
        raise RowsError(path, f"cannot be read as Parquet: {error}") from error


def _decoded(arrow: Any, batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch as training reads them.

    Maps are objects, and narrow floats the numbers they were written from: 0.1 and not
    0.10000000149011612.
    """
    for place, kind in enumerate(batch.schema.types):
        column = batch.column(place)
        # Text is the shortest that gives the same narrow float.
        for leaf in (arrow.float32(), arrow.string(), arrow.float64()):
            if (wanted := _with_floats_as(arrow, kind, leaf)) != kind:
                column = column.cast(wanted)
        batch = batch.set_column(place, batch.schema.names[place], column)
    return cast("list[dict[str, Any]]", batch.to_pylist(maps_as_pydicts="strict"))


def _with_floats_as(arrow: Any, kind: Any, leaf: Any) -> Any:
    """A type with `leaf` in the place of its narrow floats, however deep they lie."""
    types = arrow.types
    if types.is_float32(kind) or types.is_float16(kind):
        return leaf
    if types.is_struct(kind):
        return arrow.struct([f.with_type(_with_floats_as(arrow, f.type, leaf)) for f in kind])
    if types.is_map(kind):
        item = kind.item_field.with_type(_with_floats_as(arrow, kind.item_type, leaf))
        return arrow.map_(kind.key_field, item, kind.keys_sorted)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        entry = kind.value_field.with_type(_with_floats_as(arrow, kind.value_type, leaf))
        if types.is_fixed_size_list(kind):
            return arrow.list_(entry, kind.list_size)
        return arrow.large_list(entry) if types.is_large_list(kind) else arrow.list_(entry)
    return kind


def _carried(path: Path, number: int, columns: Mapping[str, Any]) -> _Line:
    """A row that carries its messages."""
    try:
        return _Line.model_validate(columns)
    except ValidationError as error:
        raise RowsError(path, mistakes(error), number) from error


def mistakes(error: ValidationError) -> str:
    """What is wrong with a row, on one line, each with its field."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        for problem in own_mistakes(error)
    )


def _written(path: Path, number: int, columns: Mapping[str, Any], prompt: Prompt) -> _Line:
    """A row whose messages are written from its columns."""
    inner = columns.get("row")
    if "messages" in columns and isinstance(inner, dict):
        columns = cast("Mapping[str, Any]", inner)

    def fill(template: str) -> str:
        return template.format_map({name: written(name) for name in placeholders(template)})

    def written(name: str) -> str:
        if value(name) is None:
            raise RowsError(path, f"column {name!r} is null, which no text can stand for", number)
        return text_of(value(name))

    def value(name: str) -> Any:
        if name not in columns:
            raise RowsError(path, f"has no column {name!r}", number)
        try:
            json.dumps(columns[name], allow_nan=False, default=_form)
        except TypeError as error:
            problem = f"column {name!r} holds bytes or keys that no text can stand for"
            raise RowsError(path, problem, number) from error
        except ValueError as error:
            raise RowsError(path, f"column {name!r} holds NaN or infinity", number) from error
        return columns[name]

    messages = (
        *([] if prompt.system is None else [Message(role="system", content=fill(prompt.system))]),
        Message(role="user", content=fill(prompt.user)),
    )
    if prompt.expected_json is not None:
        expected = _json({name: value(name) for name in prompt.expected_json})
    else:
        expected = fill(prompt.expected or "")
    return _Line(messages=messages, expected=expected, row=dict(columns))


def text_of(value: Any) -> str:
    """A column's value as text: text, dates, times and decimals as they stand, else JSON."""
    as_it_stands = isinstance(value, str | date | time | Decimal | UUID)
    return _as_text(value) if as_it_stands else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_as_text)


def _form(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("bytes have no form in JSON")
    return _as_text(value)


def _as_text(value: Any) -> str:
    # Digits as a database shows them: str would write 0E-8 for 0.00000000.
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _digest(line: _Line) -> str:
    content = [[message.role, message.content] for message in line.messages]
    return hashlib.sha256(json.dumps([content, line.expected]).encode()).hexdigest()[:16]
