"""Several sources as one, drawn by weight; and one source read at several places at once."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from manylora_trainer.errors import NoExamplesError
from manylora_trainer.sources import Place, Row, Source

PLACES_AT_ONCE = 8
"""Places at which a large source is read at once."""


@dataclass(frozen=True)
class Part:
    """One source of a mix."""

    source: Source
    weight: float


@dataclass(frozen=True)
class Mix:
    """Rows of several sources in a random order that depends on `seed` and the weights alone.

    Draw number n is a function of the seed and n, so a place is n and the places of the parts.
    A pass ends when each part has been read to its end.
    """

    parts: Sequence[Part]
    seed: str
    repeats: bool = True
    """Whether a part that ends before the others begins again, or leaves."""

    @property
    def name(self) -> str:
        """The names of the parts."""
        return f"mix of {', '.join(part.source.name for part in self.parts)}"

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows of all parts."""
        drawn = 0 if after is None else int(after["drawn"])
        starts: list[Place | None] = [None] * len(self.parts) if after is None else after["parts"]
        ended: list[bool] = [False] * len(self.parts) if after is None else list(after["ended"])
        reading = [
            _Reading(part.source, start) for part, start in zip(self.parts, starts, strict=True)
        ]
        bounds = self._bounds(ended)
        while True:
            chosen = self._choose(drawn, bounds)
            row = reading[chosen].next_row()
            if row is None:
                # The end is seen one row late, by the draw that finds nothing.
                if self.repeats and reading[chosen].after is None:
                    raise NoExamplesError(f"{self.parts[chosen].source.name} has no rows")
                ended[chosen] = True
                if all(ended):
                    return
                if not self.repeats:
                    bounds = self._bounds(ended)
                    continue
                row = reading[chosen].begin_again()
            drawn += 1
            after = {"drawn": drawn, "parts": [r.after for r in reading], "ended": [*ended]}
            again = row.again or ended[chosen]
            yield Row(row.number, row.columns, row.source, after, row.error, again)

    def _bounds(self, ended: Sequence[bool]) -> list[float]:
        """Upper bounds of the parts' shares; those that have left have none."""
        left = [part.weight for part in self.parts]
        if not self.repeats:
            left = [0.0 if end else weight for weight, end in zip(left, ended, strict=True)]
        return list(accumulate(left))

    def _choose(self, draw: int, bounds: Sequence[float]) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{draw}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest) / 2**64 * bounds[-1]
        return next(i for i, bound in enumerate(bounds) if place < bound)


class Divisible(Source, Protocol):
    """A source that can be read at several places."""

    def divided(self, most: int) -> Sequence[Part]:
        """This source as up to `most` parts of similar size, in order.

        Raises:
            SourceError: it cannot be opened.
        """
        ...


@dataclass(frozen=True)
class Spread:
    """One source read at several places at once, so that neighbours in it do not stay together.

    A source that is larger than the shuffle buffer is often sorted by something that matters.
    """

    source: Divisible
    seed: str

    @property
    def name(self) -> str:
        """Of the source."""
        return self.source.name

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows, each once."""
        parts = self.source.divided(PLACES_AT_ONCE)
        return Mix(parts, self.seed, repeats=False).rows(after)


class _Reading:
    """One part on its way."""

    def __init__(self, source: Source, after: Place | None) -> None:
        self._source = source
        self._rows = source.rows(after)
        self.after: Any = after

    def next_row(self) -> Row | None:
        row = next(self._rows, None)
        if row is not None:
            self.after = row.after
        return row

    def begin_again(self) -> Row:
        self._rows = self._source.rows()
        row = self.next_row()
        if row is None:
            raise NoExamplesError(f"{self._source.name} has no rows")
        return row
