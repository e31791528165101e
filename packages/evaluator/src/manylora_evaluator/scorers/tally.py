"""A row's share of a score.

Every score is a ratio of sums over the rows, or the mean of several such ratios, so that a mean of
hits, a micro-averaged and a macro-averaged F1 are added up, and resampled, in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from manylora_evaluator.rows import Row


@dataclass(frozen=True, slots=True)
class Tally:
    """One row's share of one ratio: the ratio is the sum of `hits` over the sum of `of`."""

    hits: float
    of: float
    group: str = ""
    """Ratios of several groups are averaged with equal weight, e.g. over labels."""


Tallies: TypeAlias = tuple[Tally, ...]


def one(hit: bool) -> Tallies:
    """The share of a row that is right or wrong."""
    return (Tally(float(hit), 1),)


def ratio(tallies: Sequence[Tally]) -> float | None:
    """The score of `tallies`: the mean over their groups; None where none has any weight."""
    hits: dict[str, float] = {}
    of: dict[str, float] = {}
    for tally in tallies:
        hits[tally.group] = hits.get(tally.group, 0) + tally.hits
        of[tally.group] = of.get(tally.group, 0) + tally.of
    ratios = [hits[group] / weight for group, weight in of.items() if weight]
    return sum(ratios) / len(ratios) if ratios else None


class Scorer(Protocol):
    """Compares one answer with what its row expects."""

    @property
    def names(self) -> tuple[str, ...]:
        """The scores it reports, the chief one first."""
        ...

    def unfit(self, row: Row) -> str | None:
        """Why `row` cannot be scored; None when it can."""
        ...

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """The row's share of each score, by the score's name. Never fails, whatever `output`."""
        ...
