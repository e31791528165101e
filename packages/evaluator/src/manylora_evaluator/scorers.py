"""How an answer is compared with what was expected.

Every score is a ratio of sums over the rows, so that a mean of hits and a micro-averaged F1 are
added up, and resampled, in the same way.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

from rapidfuzz.distance import LCSseq

ScorerName: TypeAlias = Literal["exact_match", "json_field_f1", "rouge_l"]


@dataclass(frozen=True, slots=True)
class Tally:
    """One row's share of a score: the score is the sum of `hits` over the sum of `of`."""

    hits: float
    of: float


class Scorer(Protocol):
    """Compares one answer with the expected one."""

    def unfit(self, expected: str) -> str | None:
        """Why `expected` cannot be scored against; None when it can."""
        ...

    def score(self, output: str, expected: str) -> Mapping[str, Tally]:
        """The row's share of each score this scorer reports, by the score's name."""
        ...


class ExactMatch:
    """`exact_match`: the answer equals the expected text, letter case included.

    Both are brought to Unicode NFC first; whitespace at the ends is dropped and each run of it
    inside counts as one space.
    """

    def unfit(self, expected: str) -> str | None:  # noqa: ARG002 - any text will do
        """Never: any text will do."""
        return None

    def score(self, output: str, expected: str) -> Mapping[str, Tally]:
        """1 for equal, else 0."""
        return {"exact_match": Tally(float(_normalised(output) == _normalised(expected)), 1)}


class JsonFieldF1:
    """`json_field_f1`: micro-averaged F1 over the fields of a JSON object; and `json_valid`.

    A field is a leaf of the object, known by its path through nested objects; an array is one
    leaf. It is right when the same path holds an equal value (1 equals 1.0; "1" and true do not).
    A wrong value counts twice, as a field too many and as one missing. An answer that is not one
    JSON object from end to end, surrounding whitespace aside, has no fields; `json_valid` is the
    share of those that are.
    """

    def unfit(self, expected: str) -> str | None:
        """A JSON object is needed."""
        return None if _fields(expected) is not None else "is not a JSON object"

    def score(self, output: str, expected: str) -> Mapping[str, Tally]:
        """2TP over 2TP + FP + FN of the row; and whether the answer is a JSON object."""
        wanted, answer = _fields(expected) or set(), _fields(output)
        given = answer or set()
        return {
            "json_field_f1": Tally(2 * len(wanted & given), len(wanted) + len(given)),
            "json_valid": Tally(float(answer is not None), 1),
        }


class RougeL:
    """`rouge_l`: F-measure of the longest common subsequence of words, averaged over the rows.

    Words are runs of letters, digits and underscores, in lower case (Lin 2004, with beta 1).
    """

    def unfit(self, expected: str) -> str | None:
        """At least one word is needed."""
        return None if _words(expected) else "has no words"

    def score(self, output: str, expected: str) -> Mapping[str, Tally]:
        """2 LCS over the sum of both lengths."""
        wanted, given = _words(expected), _words(output)
        return {
            "rouge_l": Tally(2 * LCSseq.similarity(wanted, given) / (len(wanted) + len(given)), 1)
        }


SCORERS: Mapping[ScorerName, Scorer] = {
    "exact_match": ExactMatch(),
    "json_field_f1": JsonFieldF1(),
    "rouge_l": RougeL(),
}


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


_Field: TypeAlias = tuple[tuple[str, ...], object]


def _fields(text: str) -> set[_Field] | None:
    """The leaves of the JSON object `text`, each a path and its value; None if it is not one."""
    try:
        value: object = json.loads(text, parse_constant=_refuse)
        if not isinstance(value, dict):
            return None
        return set(_leaves(cast("dict[str, Any]", value), ()))
    except (ValueError, RecursionError):
        # A model may well nest brackets until Python gives up.
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _leaves(fields: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[_Field]:
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _leaves(cast("dict[str, Any]", value), (*path, key))
        else:
            yield (*path, key), _comparable(value)


def _comparable(value: Any) -> object:
    # The type stands beside the value because Python takes True for 1; 1 and 1.0 stay equal.
    match value:
        case dict():
            fields = cast("dict[str, Any]", value)
            return ("object", frozenset((key, _comparable(inner)) for key, inner in fields.items()))
        case list():
            return ("array", *map(_comparable, cast("list[Any]", value)))
        case bool():
            return ("boolean", value)
        case int() | float():
            return ("number", value)
        case _:
            return ("other", value)
