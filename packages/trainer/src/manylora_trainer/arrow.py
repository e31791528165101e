"""Rows of Arrow batches as plain values, from whatever file or library the batches come."""

# pyarrow comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow

from manylora_trainer.files import why
from manylora_trainer.sources import Place, Row, bad_row

UNREADABLE = (ValueError, OverflowError, KeyError)
"""Of values Python has no form for: text that is not UTF-8, a date after the year 9999, a time
finer than a microsecond, a key that stands in a map twice."""


def rows_of(batch: Any, source: str, number: int, place: Place) -> Iterator[Row]:
    """The rows of a `pyarrow.RecordBatch`; malformed those that hold what Python has no form for.

    `number` rows stand before it in `source`; `place` is that of all its rows but for `row`.
    """
    for row, columns in enumerate(_decode(_with_short_floats(batch)), start=number + 1):
        after = {**place, "row": row}
        if isinstance(columns, dict):
            yield Row(row, columns, source, after)
        else:
            column, problem = columns
            yield bad_row(source, row, problem, after, column)


def _with_short_floats(batch: Any) -> Any:
    """Narrow floats as the numbers they were written from: 0.1 and not 0.10000000149011612."""
    for place, kind in enumerate(batch.schema.types):
        wide = _with_leaves_as(kind, pyarrow.types.is_float32, pyarrow.float64())
        if wide != kind:
            # Text is the shortest that gives the same narrow float.
            text = _with_leaves_as(kind, pyarrow.types.is_float32, pyarrow.string())
            column = batch.column(place).cast(text).cast(wide)
            batch = batch.set_column(place, batch.schema.names[place], column)
    return batch


def _is_time_of_nanoseconds(kind: Any) -> bool:
    return kind == pyarrow.time64("ns")


def _with_leaves_as(kind: Any, wanted: Callable[[Any], bool], leaf: Any) -> Any:
    """A type with `leaf` in the place of those that are wanted, however deep they lie."""
    types = pyarrow.types
    if wanted(kind):
        return leaf
    if types.is_struct(kind):
        return pyarrow.struct([f.with_type(_with_leaves_as(f.type, wanted, leaf)) for f in kind])
    if types.is_map(kind):
        item = kind.item_field.with_type(_with_leaves_as(kind.item_type, wanted, leaf))
        return pyarrow.map_(kind.key_field, item, kind.keys_sorted)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        entry = kind.value_field.with_type(_with_leaves_as(kind.value_type, wanted, leaf))
        if types.is_fixed_size_list(kind):
            return pyarrow.list_(entry, kind.list_size)
        return pyarrow.large_list(entry) if types.is_large_list(kind) else pyarrow.list_(entry)
    return kind


def _values(column: Any) -> list[Any]:
    """The values of a column, maps as objects.

    Raises:
        UNREADABLE: Python has no form for one of them.
    """
    # Python's times end at microseconds, and pyarrow cuts what is finer in silence.
    kind = _with_leaves_as(column.type, _is_time_of_nanoseconds, pyarrow.time64("us"))
    if kind != column.type:
        column = column.cast(kind)
    values = column.to_pylist(maps_as_pydicts="strict")
    if _with_leaves_as(kind, pyarrow.types.is_float16, pyarrow.float32()) == kind:
        return values
    return [_with_short_halves(value, kind) for value in values]


def _with_short_halves(value: Any, kind: Any) -> Any:
    """Floats of 16 bits as the numbers they were written from; pyarrow's text of them is longer."""
    types = pyarrow.types
    if value is None:
        return None
    if types.is_float16(kind):
        return float(str(np.float16(value)))
    if types.is_struct(kind):
        return {f.name: _with_short_halves(value[f.name], f.type) for f in kind}
    if types.is_map(kind):
        return {key: _with_short_halves(item, kind.item_type) for key, item in value.items()}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_with_short_halves(entry, kind.value_type) for entry in value]
    return value


def _decode(batch: Any) -> Iterator[dict[str, Any] | tuple[str, str]]:
    """The rows of a batch; for one that cannot be read a column and the reason."""
    names = batch.schema.names
    try:
        columns = [_values(column) for column in batch.columns]
    except UNREADABLE:
        for row in range(len(batch)):
            found: dict[str, Any] = {}
            for name in names:
                try:
                    # Taken and not sliced: a slice of lists is cast with all their entries.
                    (found[name],) = _values(batch.column(name).take(pyarrow.array([row])))
                except UnicodeDecodeError:
                    yield name, "not UTF-8"
                    break
                except UNREADABLE as error:
                    yield name, f"cannot be read: {why(error)}"
                    break
            else:
                yield found
    else:
        for row in zip(*columns, strict=True):
            yield dict(zip(names, row, strict=True))
