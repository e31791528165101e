"""Rows that a function of the user's yields."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from manylora_trainer.errors import SourceError
from manylora_trainer.sources import Place, Row, row_of


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
