"""Rows of Parquet files."""

# pyarrow comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

from manylora_trainer.errors import SourceError
from manylora_trainer.files import find_files, open_seekable, why
from manylora_trainer.sources import Place, Row, bad_row

BATCH_ROWS = 1024
"""Rows decoded at once."""


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files, read one row group at a time.

    A place is the file, the row group and the number of rows of the file before it.
    """

    locations: Sequence[str]

    @property
    def name(self) -> str:
        """The paths."""
        return ", ".join(self.locations)

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows of all files."""
        files = find_files(self.locations)
        first = 0 if after is None else int(after["file"])
        for index in range(first, len(files)):
            yield from _rows(files[index], index, 0 if after is None else int(after["row"]))
            after = None


def _rows(name: str, index: int, passed: int) -> Iterator[Row]:
    """Streams one file behind its first `passed` rows; whole row groups are skipped unread."""
    number = 0
    try:
        with open_seekable(name) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            for group in range(file.num_row_groups):
                size: int = file.metadata.row_group(group).num_rows
                if number + size <= passed:
                    number += size
                    continue
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    unread = batch.slice(min(max(0, passed - number), len(batch)))
                    number += len(batch) - len(unread)
                    for columns in _decode(unread):
                        number += 1
                        after = {"file": index, "row": number}
                        if isinstance(columns, dict):
                            yield Row(number, columns, name, after)
                        else:
                            yield bad_row(name, number, "not UTF-8", after, columns)
    except (OSError, pyarrow.ArrowException) as error:
        where = "" if number == 0 else f" behind row {number}"
        raise SourceError(f"{name} cannot be read{where}: {why(error)}") from error


def _decode(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; for one whose text is not UTF-8 the name of the column."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(batch)):
            columns: dict[str, Any] = {}
            for column in batch.schema.names:
                try:
                    columns[column] = batch.column(column)[row].as_py()
                except UnicodeDecodeError:
                    yield column
                    break
            else:
                yield columns
