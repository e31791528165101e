"""Where rows come from: small sources behind one protocol, each a stream to be taken up again.

A source gives its rows in an order that is the same at every reading, and with each row the place
right behind it. A place is a small JSON object: kept in a checkpoint, it starts another reading at
exactly the next row. No source holds more than a page, a row group or a line in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeVar, cast

from manylora_trainer.errors import RowError

T = TypeVar("T")
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
