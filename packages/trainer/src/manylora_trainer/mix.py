"""Several sources as one, drawn by weight."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from manylora_trainer.errors import NoExamplesError
from manylora_trainer.sources import Place, Row, Source


@dataclass(frozen=True)
class Part:
    """One source of a mix."""

    source: Source
    weight: float


@dataclass(frozen=True)
class Mix:
    """Rows of several sources in a random order that depends on `seed` and the weights alone.

    Draw number n is a function of the seed and n, so a place is n and the places of the parts.
    A pass ends when each part has been read to its end; a shorter one begins again meanwhile.
    """

    parts: Sequence[Part]
    seed: str

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
        bounds = list(accumulate(part.weight for part in self.parts))
        while True:
            chosen = self._choose(drawn, bounds)
            row = reading[chosen].next_row()
            if row is None:
                # The end is seen one row late, by the draw that finds nothing.
                ended[chosen] = True
                if all(ended):
                    return
                row = reading[chosen].begin_again()
            drawn += 1
            after = {"drawn": drawn, "parts": [r.after for r in reading], "ended": [*ended]}
            yield Row(row.number, row.columns, row.source, after, row.error)

    def _choose(self, draw: int, bounds: Sequence[float]) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{draw}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest) / 2**64 * bounds[-1]
        return next((i for i, bound in enumerate(bounds) if place < bound), len(bounds) - 1)


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
