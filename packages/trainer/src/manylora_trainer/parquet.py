"""Rows of Parquet files."""

# pyarrow comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

from manylora_trainer.errors import SourceError
from manylora_trainer.files import find_files, open_seekable, why
from manylora_trainer.mix import Part
from manylora_trainer.sources import Place, Row, bad_row, runs

BATCH_ROWS = 1024
"""Rows decoded at once."""
UNREADABLE = (ValueError, OverflowError, KeyError)
"""Of values Python has no form for: text that is not UTF-8, a date after the year 9999, a time
finer than a microsecond, a key that stands in a map twice."""
BUFFER_BYTES = 4 * 1024 * 1024
"""Of a column read at once; without it a row group's whole column is."""


@dataclass(frozen=True)
class Groups:
    """Row groups `start:end` of one file; all from `start` on where there is no end."""

    file: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files, read one row group at a time.

    A place is the file and the number of its rows before the next one.
    """

    locations: Sequence[str]
    groups: Sequence[Groups] | None = None
    """Only these."""

    @property
    def name(self) -> str:
        """The paths."""
        return ", ".join(self.locations)

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows of all files."""
        groups = self.groups or [Groups(file) for file in find_files(self.locations)]
        first = 0 if after is None else int(after["file"])
        for index in range(first, len(groups)):
            yield from _rows(groups[index], index, 0 if after is None else int(after["row"]))
            after = None

    def divided(self, most: int) -> Sequence[Part]:
        """Several runs of files, or of row groups where there are few files."""
        units = [Groups(file) for file in find_files(self.locations)]
        if len(units) < most:
            units = [
                Groups(unit.file, group, group + 1)
                for unit in units
                for group in range(_number_of_groups(unit.file))
            ] or units
        return [
            Part(ParquetFiles(self.locations, _joined(run)), float(len(run)))
            for run in runs(units, most)
        ]


def _joined(run: Sequence[Groups]) -> list[Groups]:
    """The same with neighbouring row groups of a file as one."""
    joined: list[Groups] = []
    for unit in run:
        if joined and joined[-1].file == unit.file and joined[-1].end == unit.start:
            joined[-1] = Groups(unit.file, joined[-1].start, unit.end)
        else:
            joined.append(unit)
    return joined


def _number_of_groups(name: str) -> int:
    try:
        with _opened(name) as file:
            return file.num_row_groups
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{name} cannot be read: {why(error)}") from error


@contextmanager
def _opened(name: str) -> Generator[Any]:
    with (
        open_seekable(name) as raw,
        pyarrow.parquet.ParquetFile(raw, buffer_size=BUFFER_BYTES) as file,
    ):
        yield file


def _rows(groups: Groups, index: int, passed: int) -> Iterator[Row]:
    """Streams some row groups behind the file's first `passed` rows, skipping groups unread."""
    name, number = groups.file, 0
    try:
        with _opened(name) as file:
            _refuse_twins(name, file.schema_arrow.names)
            end = file.num_row_groups if groups.end is None else groups.end
            for group in range(end):
                size: int = file.metadata.row_group(group).num_rows
                if group < groups.start or number + size <= passed:
                    number += size
                    continue
                for read in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    batch = _with_short_floats(read)
                    unread = batch.slice(min(max(0, passed - number), len(batch)))
                    number += len(batch) - len(unread)
                    for columns in _decode(unread):
                        number += 1
                        after = {"file": index, "row": number}
                        if isinstance(columns, dict):
                            yield Row(number, columns, name, after)
                        else:
                            column, problem = columns
                            yield bad_row(name, number, problem, after, column)
    except (OSError, pyarrow.ArrowException) as error:
        where = "" if number == 0 else f" behind row {number}"
        raise SourceError(f"{name} cannot be read{where}: {why(error)}") from error


def _refuse_twins(name: str, columns: Sequence[str]) -> None:
    """Of two columns with one name it would be chance which counts."""
    twins = sorted({column for column in columns if columns.count(column) > 1})
    if twins:
        raise SourceError(f"{name} has several columns named {', '.join(twins)}")


def _with_short_floats(batch: Any) -> Any:
    """Narrow floats as the numbers they were written from: 0.1 and not 0.10000000149011612."""
    for place, kind in enumerate(batch.schema.types):
        wide = _with_leaves_as(kind, _is_narrow, pyarrow.float64())
        if wide != kind:
            column = batch.column(place)
            # Text is the shortest that gives the same narrow float.
            for leaf in (pyarrow.float32(), pyarrow.string(), pyarrow.float64()):
                column = column.cast(_with_leaves_as(kind, _is_narrow, leaf))
            batch = batch.set_column(place, batch.schema.names[place], column)
    return batch


def _is_narrow(kind: Any) -> bool:
    return pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind)


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
    return column.to_pylist(maps_as_pydicts="strict")


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
