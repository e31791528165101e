"""What would hold up an engine, or never compile, is refused before an engine sees it."""

import json

import pytest

from manylora_gateway.config import LimitsConfig
from manylora_gateway.constraints import nested_counts, problems
from manylora_gateway.engine import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex


@pytest.mark.parametrize(
    ("pattern", "depth"),
    [
        ("abc", 0),
        ("a{2}b{3}", 1),
        ("(a{2}b)c{3}", 1),
        ("([0-9]{1,3}[.]){3}[0-9]{1,3}", 2),
        ("(?:(a{1,9}){1,9}x){1,9}", 3),
        ("(((a{1,9}){1,9}){1,9}){1,9}", 4),
        ("a{2}{3}", 2),
        (r"\({2}\){3}", 1),
        ("[(]{2}[{]{3}[]{]{4}[^]{]{5}", 1),
        (r"[\]({2}]{3}", 1),
        ("(a+)*b", 0),
        ("((", 0),
        ("))){2}", 1),
        ("[", 0),
        ("\\", 0),
    ],
)
def test_repetitions_in_one_another_are_counted(pattern: str, depth: int) -> None:
    assert nested_counts(pattern) == depth


LIMITS = LimitsConfig()
EXPLOSIVE = "(((a{1,100}){1,100}){1,100}){1,100}"


@pytest.mark.parametrize(
    ("constraint", "complaint"),
    [
        (Regex(EXPLOSIVE), "in one another"),
        (JsonSchema(f'{{"items": {{"pattern": "{EXPLOSIVE}"}}}}'), "in one another"),
        (JsonSchema(f'{{"patternProperties": {{"{EXPLOSIVE}": {{}}}}}}'), "in one another"),
        (JsonSchema('{"items":' * 70 + "{}" + "}" * 70), "nested deeper"),
        (JsonSchema("[" * 60_000), "is not JSON"),
        (JsonSchema("3"), "must be a JSON object"),
        (JsonSchema("{" + " " * 65_536 + "}"), "65538 bytes"),
        (Regex(" "), "must not be empty"),
        (Grammar("a\0"), "NUL"),
        (OneOf(()), "nothing to choose"),
        (OneOf(("a", "")), "empty string"),
        (OneOf(("a", "a")), "twice"),
        (OneOf(("\ud800",)), "surrogate"),
        (JsonSchema('{"type": "number", "minimum": NaN}'), "it has no NaN"),
        (JsonSchema('{"not": {}}'), "has not, to which"),
        (JsonSchema('{"items": {"if": {}, "then": {}}}'), "has if, to which"),
        (JsonSchema('{"anyOf": [{"uniqueItems": true}]}'), "has uniqueItems, to which"),
        (JsonSchema('{"$defs": {"a": {"multipleOf": 2}}}'), "has multipleOf, to which"),
        (JsonSchema('{"$ref": "http://x/y"}'), "the $ref 'http://x/y'"),
        (JsonSchema('{"$ref": "#", "maxLength": 1}'), "maxLength beside $ref"),
        (JsonSchema('{"anyOf": [{}], "properties": {}}'), "properties beside anyOf"),
        (JsonSchema('{"prefixItems": [{"minLength": 1}]}'), "minLength without a type"),
        (JsonSchema('{"properties": {"a": {}}, "required": ["b"]}'), "requires 'b'"),
    ],
)
def test_what_is_wrong_is_said(constraint: Constraint, complaint: str) -> None:
    assert complaint in "; ".join(problems(constraint, LIMITS))


@pytest.mark.parametrize(
    "constraint",
    [
        Regex(EXPLOSIVE * 3000),
        JsonSchema(json.dumps({"properties": {}, "required": ["é"] * 10_000})),
        Grammar("\0" * 100_000),
        OneOf(("",) * 2 + ("a" * 100_000,)),
    ],
)
def test_what_is_too_long_is_not_looked_at(constraint: Constraint) -> None:
    """A mebibyte takes half a second, while every other request waits."""
    (problem,) = problems(constraint, LIMITS)
    assert problem.endswith("bytes; the most is 65536")


@pytest.mark.parametrize(
    "constraint",
    [
        JsonObject(),
        JsonSchema('{"properties": {"pattern": {"type": "string"}}}'),
        JsonSchema('{"properties": {"not": {}, "if": {}}, "required": ["not", "if"]}'),
        JsonSchema('{"enum": [{"not": 1}], "default": {"if": 1}, "type": "object"}'),
        JsonSchema('{"$ref": "#/$defs/a", "$defs": {"a": {}}, "title": "x", "default": 1}'),
        JsonSchema('{"type": "object", "anyOf": [{"type": "object"}], "description": "x"}'),
        JsonSchema('{"type": "array", "items": {}, "uniqueItems": false, "minItems": 1}'),
        JsonSchema('{"type": ["string", "null"], "minLength": 3}'),
        JsonSchema('{"type": "object", "propertyNames": {"pattern": "^a"}}'),
        Regex(r"([0-9]{1,3}\.){3}[0-9]{1,3}"),
        Grammar('root ::= "a"'),
        OneOf(("a", "b")),
    ],
)
def test_what_is_well_formed_passes(constraint: Constraint) -> None:
    assert list(problems(constraint, LIMITS)) == []


def test_a_pattern_is_a_regular_expression_wherever_it_is() -> None:
    """Two counts suffice for a step of 14 s, and a schema can bring them along."""
    limits = LimitsConfig(constraints=("json_schema",))
    slow = "((a|ab|abc|.){1,100}){1,100}"
    for schema in (
        {"type": "string", "pattern": slow},
        {"type": "array", "items": {"type": "string", "pattern": slow}},
        {"type": "object", "patternProperties": {slow: {}}},
        {"type": "object", "propertyNames": {"pattern": slow}},
    ):
        (problem,) = problems(JsonSchema(json.dumps(schema)), limits)
        assert "regular expressions are not allowed" in problem
    assert not list(problems(JsonSchema('{"type": "string", "maxLength": 9}'), limits))
