"""What an answer may be held to: checked before an engine compiles it, as far as can be told."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from manylora_gateway.config import ConstraintKind, LimitsConfig
from manylora_gateway.engine import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex
from manylora_gateway.schema_gaps import gaps

MAX_SCHEMA_DEPTH = 64
"""Objects and arrays in one another; xgrammar's own limit in vLLM."""
MAX_NESTED_COUNTS = 3
"""Counted repetitions in one another. A step of the engine, which all its requests share, takes
20 ms with three of {1,100} and 3 s with four (xgrammar 0.2.8). It bounds accidents, not malice:
with alternatives that begin alike, two take 14 s."""


KINDS: Mapping[type[Constraint], ConstraintKind] = {
    JsonSchema: "json_schema",
    JsonObject: "json_object",
    Regex: "regex",
    OneOf: "choice",
    Grammar: "grammar",
}
"""What `limits.constraints` calls them."""
FIELDS: Mapping[type[Constraint], str] = {
    kind: f"sampling.structured_output.{name}" for kind, name in KINDS.items()
}
"""Where a request message has them."""


def problems(constraint: Constraint, limits: LimitsConfig) -> Iterator[str]:
    """What is wrong with `constraint`; nothing where an engine may try it."""
    if KINDS[type(constraint)] not in limits.constraints:
        allowed = ", ".join(limits.constraints) or "none"
        yield f"is not allowed here; structured output may be: {allowed}"
        return
    text = _text_of(constraint)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        yield "is not Unicode text: it has a lone surrogate"
        return
    if size > limits.max_constraint_bytes:
        # Nor is more of it looked at, which takes its time while everybody waits.
        yield f"has {size} bytes; the most is {limits.max_constraint_bytes}"
        return
    match constraint:
        case JsonSchema():
            yield from _schema_problems(text, may_match="regex" in limits.constraints)
        case Regex():
            yield from _text_problems(text)
            yield from _regex_problems(text)
        case Grammar():
            yield from _text_problems(text)
        case OneOf(values):
            if not values:
                yield "has nothing to choose"
            elif not all(values):
                yield "has an empty string to choose"
            if len(values) != len(set(values)):
                yield "has the same string twice"
        case JsonObject():
            pass


def _text_of(constraint: Constraint) -> str:
    """All of it that a client wrote."""
    match constraint:
        case JsonSchema(text) | Regex(text) | Grammar(text):
            return text
        case OneOf(values):
            return "".join(values)
        case JsonObject():
            return ""


def _text_problems(text: str) -> Iterator[str]:
    if not text.strip():
        yield "must not be empty"
    if "\0" in text:
        yield "must not contain NUL characters"


def _schema_problems(text: str, *, may_match: bool) -> Iterator[str]:
    try:
        schema: object = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        yield f"is not JSON: {error}"
        return
    if not isinstance(schema, dict):
        yield "is not a JSON Schema: it must be a JSON object"
        return
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        for node in level:
            if isinstance(node, dict):
                for pattern in _patterns(cast("dict[str, Any]", node)):
                    if not may_match:
                        yield "has a pattern: regular expressions are not allowed here"
                        return
                    yield from _regex_problems(pattern)
        level = [child for node in level for child in _children(node)]
        if not level:
            yield from gaps(cast("dict[str, Any]", schema))
            return
    yield f"is nested deeper than {MAX_SCHEMA_DEPTH} objects and arrays"


def _no_constant(name: str) -> object:
    raise ValueError(f"it has no {name}")


def _patterns(node: dict[str, Any]) -> Iterator[str]:
    """Regular expressions a schema's object has, where it is no list of property names."""
    if isinstance(pattern := node.get("pattern"), str):
        yield pattern
    if isinstance(named := node.get("patternProperties"), dict):
        yield from cast("dict[str, Any]", named)


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from cast("dict[str, Any]", node).values()
    elif isinstance(node, list):
        yield from cast("list[Any]", node)


def _regex_problems(pattern: str) -> Iterator[str]:
    if nested_counts(pattern) > MAX_NESTED_COUNTS:
        yield f"has more than {MAX_NESTED_COUNTS} counted repetitions {{n,m}} in one another"


def nested_counts(pattern: str) -> int:
    """How many counted repetitions of a regular expression are in one another at most.

    Brackets alone are looked at: whether it is well formed is for the engine to say.
    """
    # For each open group the most that was found inside; `last` for the item just read.
    groups, last = [0], 0
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
            last = 0
        elif character == "[":
            position = _end_of_class(pattern, position)
            last = 0
        elif character == "(":
            groups.append(0)
            last = 0
        elif character == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] = max(groups[-1], last)
        elif character == "{":
            last += 1
            groups[-1] = max(groups[-1], last)
        elif character not in "*+?}0123456789,":
            last = 0
        position += 1
    return max(groups)


def _end_of_class(pattern: str, start: int) -> int:
    """Position of the bracket that closes the character class at `start`."""
    position = start + 1
    # Right at the beginning a closing bracket stands for itself.
    if pattern[position : position + 1] == "^":
        position += 1
    position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position
