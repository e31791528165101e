"""Where rows come from: small sources behind one protocol, each read as a stream."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from manylora_trainer.data_settings import PythonSource, SourceSettings
from manylora_trainer.errors import RowError, SourceError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is a mistake (a file without line ends), not an example."""


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    number: int
    """1 is the first."""
    columns: Mapping[str, Any]


class Source(Protocol):
    """Rows, in an order that is the same at every reading."""

    @property
    def name(self) -> str:
        """What messages call it, e.g. its file name."""
        ...

    def rows(self) -> Iterator[Row]:
        """Streams all rows.

        Raises:
            RowError: a row is malformed.
            SourceError: the source cannot be opened or fails midway.
        """
        ...


def open_source(settings: SourceSettings) -> Source:
    """The source that a recipe describes; nothing is read yet."""
    if isinstance(settings, PythonSource):
        return PythonFunction(settings.file, settings.function)
    return JsonLines(settings.path)


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object a line."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def rows(self) -> Iterator[Row]:
        """Streams the lines; blank ones are skipped."""
        try:
            with self.path.open("rb") as file:
                number = 0
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(line) > MAX_LINE_BYTES:
                        raise RowError(
                            self.name, number, None, f"longer than {MAX_LINE_BYTES >> 20} MiB"
                        )
                    if line.strip():
                        yield Row(number, self._columns(number, line))
        except OSError as error:
            raise SourceError(f"{self.name} cannot be read: {error.strerror}") from error

    def _columns(self, number: int, line: bytes) -> Mapping[str, Any]:
        try:
            value: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(self.name, number, None, f"not UTF-8: {error.reason}") from error
        except ValueError as error:
            raise RowError(self.name, number, None, f"not JSON: {error}") from error
        return _mapping(self.name, number, value)


@dataclass(frozen=True)
class PythonFunction:
    """A generator function in a Python file of the user's."""

    file: Path
    function: str

    @property
    def name(self) -> str:
        """The file and the function."""
        return f"{self.file}:{self.function}"

    def rows(self) -> Iterator[Row]:
        """Streams what the function yields."""
        generate = self._load()
        number = 0
        try:
            for number, value in enumerate(generate(), start=1):
                yield Row(number, _mapping(self.name, number, value))
        except (RowError, GeneratorExit):
            raise
        except Exception as error:
            raise SourceError(
                f"{self.name} failed after {number} rows: {type(error).__name__}: {error}"
            ) from error

    def _load(self) -> Callable[[], Iterator[Any]]:
        if not self.file.is_file():
            raise SourceError(f"{self.file} does not exist")
        specification = importlib.util.spec_from_file_location(
            f"manylora_source_{self.file.stem}", self.file
        )
        if specification is None or specification.loader is None:
            raise SourceError(f"{self.file} is not a Python file")
        module = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            raise SourceError(
                f"{self.file} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        function = getattr(module, self.function, None)
        if not callable(function):
            raise SourceError(f"{self.file} has no function {self.function!r}")
        return cast("Callable[[], Iterator[Any]]", function)


def _mapping(source: str, number: int, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(
            source, number, None, f"must be an object with columns, is {type(value).__name__}"
        )
    return cast("Mapping[str, Any]", value)
