"""Where rows come from: small sources behind one protocol, each a stream to be taken up again.

A source gives its rows in an order that is the same at every reading, and with each row the place
right behind it. A place is a small JSON object: kept in a checkpoint, it starts another reading at
exactly the next row. No source holds more than a page, a row group or a line in memory.
"""

import codecs
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from manylora_registry.json_objects import distinct
from manylora_trainer.errors import RowError, SourceError
from manylora_trainer.files import find_files, open_file, why
from manylora_trainer.source_settings import (
    DatasetsSource,
    JsonlSource,
    MixSource,
    ParquetSource,
    PythonSource,
    RaySource,
    SourceSettings,
    SqlSource,
)

if TYPE_CHECKING:
    from manylora_trainer.mix import Part

T = TypeVar("T")
MAX_LINE_BYTES = 4 * 1024 * 1024
"""A longer line is a mistake (a file without line ends), not an example."""

Place = Mapping[str, Any]
"""Where to go on in a source: JSON, and opaque to all but the source that made it."""


@dataclass(frozen=True)
class Row:
    """One row of a source, or what is wrong with it."""

    number: int
    """1 is the first of its file or query."""
    columns: Mapping[str, Any]
    source: str = "rows"
    """What messages call the file or query it stands in."""
    after: Place = field(default_factory=dict[str, Any])
    """The place of the next row."""
    error: RowError | None = None
    """Why it has no columns. A source goes on behind such a row; the reader decides."""
    again: bool = False
    """Whether this reading has given it before, as a mix does with its shorter sources."""


class Source(Protocol):
    """Rows, in an order that is the same at every reading."""

    @property
    def name(self) -> str:
        """What messages call it, e.g. its file name."""
        ...

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows from a place on, or all of them.

        Raises:
            SourceError: the source cannot be opened or fails midway.
        """
        ...


def open_source(settings: SourceSettings, seed: str = "") -> Source:
    """The source that a recipe describes; nothing is read yet.

    `seed` decides the order in which sources and parts of them are drawn from, and nothing else.
    """
    match settings:
        case JsonlSource():
            from manylora_trainer.mix import Spread

            return Spread(JsonLines(settings.locations), seed)
        case PythonSource():
            return PythonFunction(settings.file, settings.function)
        case ParquetSource():
            from manylora_trainer.mix import Spread
            from manylora_trainer.parquet import ParquetFiles

            return Spread(ParquetFiles(settings.locations), seed)
        case SqlSource():
            from manylora_trainer.sql import SqlRows

            return SqlRows(settings)
        case DatasetsSource():
            from manylora_trainer.hf_datasets import SavedDataset

            return SavedDataset(settings)
        case RaySource():
            from manylora_trainer.ray_data import RayDataset

            return RayDataset(load_function(settings.file, settings.function), settings)
        case MixSource():
            from manylora_trainer.mix import Mix, Part

            parts = [
                Part(open_source(part.source, f"{seed}/{index}"), part.weight)
                for index, part in enumerate(settings.sources)
            ]
            return Mix(parts, seed)


@dataclass(frozen=True)
class JsonLines:
    """Files with one JSON object a line; blank lines are skipped.

    A place is the file, the offset of the next line in (decompressed) bytes and its number.
    """

    locations: Sequence[str]

    @property
    def name(self) -> str:
        """The paths."""
        return ", ".join(self.locations)

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the lines of all files."""
        files = find_files(self.locations)
        first, offset, number = _file_place(after, "offset")
        for index in range(first, len(files)):
            yield from _lines(files[index], index, offset, number)
            offset = number = 0

    def divided(self, most: int) -> "Sequence[Part]":
        """Several runs of files; one file is one part, as lines are counted from its start."""
        from manylora_trainer.mix import Part

        return [
            Part(JsonLines(files), float(len(files)))
            for files in runs(find_files(self.locations), most)
        ]


@dataclass(frozen=True)
class PythonFunction:
    """A generator function in a Python file of the user's.

    A place is the number of rows before it: they are generated once more and passed over.
    """

    file: Path
    function: str

    @property
    def name(self) -> str:
        """The file and the function."""
        return f"{self.file}:{self.function}"

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams what the function yields."""
        generate = cast("Callable[[], Iterator[Any]]", load_function(self.file, self.function))
        passed = 0 if after is None else int(after["row"])
        number = 0
        try:
            for number, value in enumerate(generate(), start=1):
                if number > passed:
                    yield row_of(self.name, number, value, {"row": number})
        except GeneratorExit:
            raise
        except Exception as error:
            raise SourceError(
                f"{self.name} failed after {number} rows: {type(error).__name__}: {error}"
            ) from error


def runs(units: Sequence[T], most: int) -> list[Sequence[T]]:
    """Divides units into up to `most` runs of almost equal length, in order."""
    count = min(most, len(units))
    bounds = [len(units) * i // count for i in range(count + 1)]
    return [units[start:end] for start, end in pairwise(bounds)]


def row_of(source: str, number: int, value: Any, after: Place) -> Row:
    """A row of what stands for one: a mapping, or it is malformed."""
    if isinstance(value, Mapping):
        return Row(number, cast("Mapping[str, Any]", value), source, after)
    problem = f"must be an object with columns, is {type(value).__name__}"
    return bad_row(source, number, problem, after)


def bad_row(source: str, number: int, problem: str, after: Place, column: str | None = None) -> Row:
    """A row that cannot be read."""
    return Row(number, {}, source, after, RowError(source, number, column, problem))


def load_function(file: Path, function: str) -> Callable[[], Any]:
    """A function in a Python file.

    Raises:
        SourceError: there is no such file or function, or importing it fails.
    """
    if not file.is_file():
        raise SourceError(f"{file} does not exist")
    specification = importlib.util.spec_from_file_location(f"manylora_source_{file.stem}", file)
    if specification is None or specification.loader is None:
        raise SourceError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise SourceError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise SourceError(f"{file} has no function {function!r}")
    return found


def _file_place(after: Place | None, within: str) -> tuple[int, int, int]:
    if after is None:
        return 0, 0, 0
    return int(after["file"]), int(after[within]), int(after["row"])


def _lines(file: str, index: int, offset: int, number: int) -> Iterator[Row]:
    """Streams one file from `offset` on, which is the place after line `number`."""
    before = max(offset - 1, 0)
    try:
        with open_file(file, offset=before) as raw, io.BufferedReader(raw, 1 << 20) as lines:
            if offset and not _stands_behind_a_line(lines):
                raise SourceError(
                    f"{file} is not as it was: behind row {number}, where this run goes on, no "
                    "line ends; put the file back, or begin a new run"
                )
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                offset += len(line)
                too_long = len(line) > MAX_LINE_BYTES
                while too_long and line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
                    offset += len(line)
                after = {"file": index, "offset": offset, "row": number}
                if too_long:
                    yield bad_row(file, number, f"longer than {MAX_LINE_BYTES >> 20} MiB", after)
                    continue
                if number == 1:
                    # Before the first line of files from some editors.
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _parse(file, number, line, after)
    except OSError as error:
        where = "" if number == 0 else f" behind row {number}"
        raise SourceError(f"{file} cannot be read{where}: {why(error)}") from error


def _stands_behind_a_line(lines: io.BufferedReader) -> bool:
    """Passes over one byte, which ends a line as long as the file is what it was."""
    last = lines.read(1)
    # The last line of all may have no end, or have got one since.
    return last in (b"\n", b"") or lines.peek(1)[:1] in (b"\r", b"\n", b"")


def _parse(file: str, number: int, line: bytes, after: Place) -> Row:
    try:
        value: Any = json.loads(line.decode(), object_pairs_hook=distinct)
    except UnicodeDecodeError as error:
        return bad_row(file, number, f"not UTF-8: {error.reason} at byte {error.start}", after)
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
        if number == 1 and line.lstrip().startswith(b"["):
            problem = "not an object: the file is a JSON array; write one object a line instead"
        return bad_row(file, number, problem, after)
    return row_of(file, number, value, after)
