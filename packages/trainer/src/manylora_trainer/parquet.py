"""Rows of Parquet files."""

# pyarrow comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

from manylora_trainer.arrow import rows_of
from manylora_trainer.errors import SourceError
from manylora_trainer.files import find_files, open_seekable, why
from manylora_trainer.mix import Part
from manylora_trainer.sources import Place, Row, runs

BATCH_ROWS = 1024
"""Rows decoded at once."""
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
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    unread = batch.slice(min(max(0, passed - number), len(batch)))
                    number += len(batch) - len(unread)
                    for row in rows_of(unread, name, number, {"file": index}):
                        number = row.number
                        yield row
    except (OSError, pyarrow.ArrowException) as error:
        where = "" if number == 0 else f" behind row {number}"
        raise SourceError(f"{name} cannot be read{where}: {why(error)}") from error


def _refuse_twins(name: str, columns: Sequence[str]) -> None:
    """Of two columns with one name it would be chance which counts."""
    twins = sorted({column for column in columns if columns.count(column) > 1})
    if twins:
        raise SourceError(f"{name} has several columns named {', '.join(twins)}")
