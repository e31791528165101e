"""Scorers of answers that are JSON."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import jsonschema.validators
import regex
from jsonschema.exceptions import ValidationError as SchemaFailure
from referencing import Registry
from referencing.exceptions import Unresolvable

from manylora_evaluator.rows import Row
from manylora_evaluator.scorer_settings import JsonFieldF1Settings, JsonSchemaSettings
from manylora_evaluator.scorers.tally import Tallies, Tally, one
from manylora_evaluator.scorers.text import normalised
from manylora_registry.json_objects import distinct

Field: TypeAlias = tuple[tuple[str, ...], object]
"""A leaf of a JSON object: the path to it through nested objects, and its value."""

VALID = "json_valid"
PATTERN_S = 1.0
"""Seconds for one pattern of a schema on one text."""


class JsonValid:
    """The answer is one JSON object from end to end, surrounding whitespace aside."""

    def __init__(self, name: str = VALID) -> None:
        self.names = (name,)

    def unfit(self, row: Row) -> str | None:  # noqa: ARG002 - any row will do
        """Never: nothing is expected."""
        return None

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:  # noqa: ARG002
        """1 for an object, else 0."""
        return {self.names[0]: one(isinstance(parse(output), dict))}


class JsonFieldF1:
    """Micro-averaged F1 over the fields of a JSON object; and `json_valid`.

    A field is a leaf of the object, known by its path through nested objects; an array is one
    leaf, or each of its entries is, one that is there twice twice. It is right when the same path
    holds an equal value (1 equals 1.0; "1" and true do not). A wrong value counts twice, as a
    field too many and as one missing. An answer that is not one JSON object has no fields;
    `json_valid` is the share of those that are.
    """

    def __init__(self, settings: JsonFieldF1Settings) -> None:
        self._settings = settings
        self._text = normalised if settings.text == "normalised" else str
        sections = (f"{settings.name}.{section}" for section in settings.sections)
        self.names = (settings.name, VALID, *sections)

    def unfit(self, row: Row) -> str | None:
        """A JSON object is needed."""
        return None if self._fields(row.expected) is not None else "is not a JSON object"

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """2TP over 2TP + FP + FN of the row and its sections; and whether it is an object."""
        wanted, answer = self._fields(row.expected) or Counter(), self._fields(output)
        given = answer or Counter[Field]()
        scores = {self._settings.name: _f1(wanted, given), VALID: one(answer is not None)}
        for section in self._settings.sections:
            scores[f"{self._settings.name}.{section}"] = _f1(
                _below(section, wanted), _below(section, given)
            )
        return scores

    def _fields(self, text: str) -> Counter[Field] | None:
        value = parse(text)
        if not isinstance(value, dict):
            return None
        try:
            return Counter(self._leaves(cast("dict[str, Any]", value), ()))
        except RecursionError:
            return None

    def _leaves(self, fields: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Field]:
        for key, value in fields.items():
            here = (*path, key)
            if isinstance(value, dict) and value:
                yield from self._leaves(cast("dict[str, Any]", value), here)
            elif isinstance(value, list) and value and self._settings.arrays == "items":
                yield from (
                    ((*here, "[]"), _comparable(item, self._text))
                    for item in cast("list[Any]", value)
                )
            else:
                yield here, _comparable(value, self._text)


class JsonSchema:
    """The answer is JSON that a JSON Schema (draft 2020-12) accepts.

    Patterns of the schema are searched as the scorer `regex` does: one that backtracks for ever
    on some answer is stopped after a second, and the answer is not accepted.
    """

    def __init__(self, settings: JsonSchemaSettings) -> None:
        self.names = (settings.name,)
        # An empty registry: a reference to another document is an error and not a download.
        validator: Any = _VALIDATOR(settings.schema_, registry=Registry[Any]())
        self._is_valid: Callable[[object], bool] = validator.is_valid

    def unfit(self, row: Row) -> str | None:  # noqa: ARG002 - any row will do
        """Never: the schema is all that is expected."""
        return None

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:  # noqa: ARG002
        """1 for accepted, else 0."""
        value = parse(output)
        return {self.names[0]: one(value is not INVALID and self._accepts(value))}

    def _accepts(self, value: object) -> bool:
        try:
            return self._is_valid(value)
        except (RecursionError, ArithmeticError, Unresolvable, TimeoutError):
            # Too deep, a number of more digits than a float can be divided into, or a pattern
            # that was stopped: the next key would take as long.
            return False


def _pattern(_: Any, pattern: str, value: object, __: Any) -> Iterator[SchemaFailure]:
    if isinstance(value, str) and not _found(pattern, value):
        yield SchemaFailure("does not match")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: object, _: Any
) -> Iterator[SchemaFailure]:
    if isinstance(value, dict):
        for pattern, schema in patterns.items():
            for name, inner in cast("dict[str, Any]", value).items():
                if _found(pattern, name):
                    yield from validator.descend(inner, schema)


def _additional_properties(
    validator: Any, allowed: object, value: object, schema: Mapping[str, Any]
) -> Iterator[SchemaFailure]:
    # The package's own searches with `re`, which nothing stops.
    if isinstance(value, dict):
        named, patterns = schema.get("properties", ()), schema.get("patternProperties", ())
        for name, inner in cast("dict[str, Any]", value).items():
            if name not in named and not any(_found(pattern, name) for pattern in patterns):
                yield from validator.descend(inner, allowed)


def _unique_items(_: Any, wanted: object, value: object, __: Any) -> Iterator[SchemaFailure]:
    # The package's own compares each object with every other one.
    if wanted and isinstance(value, list):
        items = cast("list[Any]", value)
        if len({_comparable(item) for item in items}) < len(items):
            yield SchemaFailure("has an item twice")


def _found(pattern: str, text: str) -> bool:
    return regex.search(pattern, text, timeout=PATTERN_S) is not None


# The package's own classes of validators are made at run time and have no types.
_VALIDATORS: Any = jsonschema.validators
_VALIDATOR: Any = _VALIDATORS.extend(
    _VALIDATORS.Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    },
)


class _Invalid:
    """The value of text that is no JSON; None is the value of `null`."""


INVALID = _Invalid()


def parse(text: str) -> object:
    """The JSON value that is all of `text`, else INVALID.

    An object with the same key twice is invalid.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=distinct)
    except (ValueError, RecursionError):
        # A model may well nest brackets until Python gives up.
        return INVALID


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _comparable(value: Any, form: Callable[[str], str] = str) -> object:
    """What is equal for equal JSON values, their text in some `form`, and can be hashed."""
    # The type stands beside the value because Python takes True for 1; 1 and 1.0 stay equal.
    match value:
        case dict():
            fields = cast("dict[str, Any]", value)
            return (
                "object",
                frozenset((key, _comparable(inner, form)) for key, inner in fields.items()),
            )
        case list():
            return ("array", *(_comparable(item, form) for item in cast("list[Any]", value)))
        case bool():
            return ("boolean", value)
        case int() | float():
            return ("number", value)
        case str():
            return ("text", form(value))
        case _:
            return ("other", value)


def _below(section: str, fields: Counter[Field]) -> Counter[Field]:
    return Counter({field: times for field, times in fields.items() if field[0][0] == section})


def _f1(wanted: Counter[Field], given: Counter[Field]) -> Tallies:
    return (Tally(2 * (wanted & given).total(), wanted.total() + given.total()),)
