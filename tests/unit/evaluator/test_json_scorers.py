"""Scores of JSON answers."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from manylora_evaluator.scorers.tally import Tally
from tests.unit.evaluator.scorer_cases import scorer, shares, tally

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=2), JSON, max_size=4)


@pytest.mark.parametrize(
    ("output", "expected", "hits", "of"),
    [
        pytest.param('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 4, 4, id="order is nothing"),
        pytest.param('{"a": 1}', '{"a": 1, "b": 2}', 2, 3, id="one missing"),
        pytest.param('{"a": 1, "b": 2}', '{"a": 1}', 2, 3, id="one too many"),
        pytest.param('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 2, 4, id="a wrong value counts twice"),
        pytest.param('{"o": {"x": 1, "y": 2}}', '{"o": {"x": 1, "y": 3}}', 2, 4, id="nested"),
        pytest.param('{"o.x": 1}', '{"o": {"x": 1}}', 0, 2, id="a dot is no path"),
        pytest.param('{"l": [1, 2]}', '{"l": [2, 1]}', 0, 2, id="an array is one field"),
        pytest.param('{"l": [{"x": 1, "y": 2}]}', '{"l": [{"y": 2, "x": 1}]}', 2, 2, id="in array"),
        pytest.param('{"a": 1.0}', '{"a": 1}', 2, 2, id="numbers are compared as numbers"),
        pytest.param('{"a": "1"}', '{"a": 1}', 0, 2, id="text is no number"),
        pytest.param('{"a": true}', '{"a": 1}', 0, 2, id="true is not one"),
        pytest.param('{"a": null}', "{}", 0, 1, id="null is a field"),
        pytest.param('{"a": {}}', '{"a": {}}', 2, 2, id="an empty object is a field"),
        pytest.param("{}", "{}", 0, 0, id="nothing to find weighs nothing"),
    ],
)
def test_json_field_f1_counts_fields(output: str, expected: str, hits: float, of: float) -> None:
    assert tally("json_field_f1", output, expected) == Tally(hits, of)
    assert tally("json_field_f1", output, expected, "json_valid") == Tally(1, 1)


@pytest.mark.parametrize(
    ("output", "expected", "hits", "of"),
    [
        ('{"l": ["b", "a"]}', '{"l": ["a", "b"]}', 4, 4),
        ('{"l": ["a"]}', '{"l": ["a", "b"]}', 2, 3),
        ('{"l": ["A."]}', '{"l": ["a"]}', 2, 2),
        ('{"l": []}', '{"l": []}', 2, 2),
        ('{"l": "a"}', '{"l": ["a"]}', 0, 2),
        ('{"l": ["a", "a", "a"]}', '{"l": ["a"]}', 2, 4),
        ('{"l": ["a"]}', '{"l": ["a", "a"]}', 2, 3),
        ('{"l": ["a", "a"]}', '{"l": ["a", "a"]}', 4, 4),
    ],
)
def test_entries_of_arrays_may_count_each_and_text_be_normalised(
    output: str, expected: str, hits: float, of: float
) -> None:
    settings = {"kind": "json_field_f1", "arrays": "items", "text": "normalised"}

    assert tally(settings, output, expected) == Tally(hits, of)


def test_sections_have_scores_of_their_own() -> None:
    settings = {"kind": "json_field_f1", "name": "fields", "sections": ["s", "o"]}

    found = shares(settings, '{"s": {"a": 1}, "o": 3}', '{"s": {"a": 1, "b": 2}, "o": 4}')

    assert found["fields.s"] == (Tally(2, 3),)
    assert found["fields.o"] == (Tally(0, 2),)
    assert found["fields"] == (Tally(2, 5),)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "{",
        '{"a": 1} and more',
        '```json\n{"a": 1}\n```',
        "[1]",
        '"a"',
        '{"a": NaN}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda output: output[:12],
)
def test_an_answer_that_is_no_json_object_scores_nothing(output: str) -> None:
    assert tally("json_field_f1", output, '{"a": 1, "b": 2}') == Tally(0, 2)
    assert tally("json_field_f1", output, '{"a": 1, "b": 2}', "json_valid") == Tally(0, 1)
    assert tally("json_valid", output, "") == Tally(0, 1)


@pytest.mark.parametrize(
    ("output", "hit"),
    [
        ('{"age": 40}', 1),
        ('{"age": -1}', 0),
        ('{"age": 40, "more": 1}', 0),
        ('{"age": "40"}', 0),
        ("null", 0),
        ("", 0),
    ],
)
def test_a_json_schema_accepts_or_refuses(output: str, hit: float) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0}},
        "required": ["age"],
        "additionalProperties": False,
    }

    assert tally({"kind": "json_schema", "schema": schema}, output, "") == Tally(hit, 1)


@pytest.mark.parametrize(
    ("output", "hit"),
    [
        ('{"n": 1.5}', 1),
        ('{"n": 1' + "0" * 400 + "}", 0),
        ('{"n": 1e999}', 0),
        ('{"word": "' + "a" * 60 + '!"}', 0),
        ('{"word": "aaa"}', 1),
        ('{"x-1": 1}', 1),
        ('{"x-1": "1"}', 0),
    ],
    ids=lambda value: str(value)[:14],
)
def test_no_answer_upsets_a_schema(output: str, hit: float) -> None:
    schema = {
        "properties": {"n": {"multipleOf": 0.5}, "word": {"pattern": "^(a+)+$"}},
        "patternProperties": {"^x-": {"type": "number"}},
        "additionalProperties": False,
    }

    assert tally({"kind": "json_schema", "schema": schema}, output, "") == Tally(hit, 1)


@pytest.mark.parametrize("allowed", [False, {"type": "number"}])
@pytest.mark.parametrize(
    "answer",
    [
        {"a" * 60 + "!": 1},
        {"a" * 60 + f"!{n}": 1 for n in range(1_000)},
    ],
    ids=["one key", "many keys"],
)
def test_no_key_holds_up_a_schema(answer: dict[str, int], allowed: object) -> None:
    # Keywords are looked at in their order.
    schema = {"additionalProperties": allowed, "patternProperties": {"^(a|aa)+$": {}}}

    begun = time.monotonic()
    share = tally({"kind": "json_schema", "schema": schema}, json.dumps(answer), "")

    assert share == Tally(0, 1)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("items", "hit"),
    [
        ([{"n": n} for n in range(20_000)], 1),
        ([*({"n": n} for n in range(20_000)), {"n": 7.0}], 0),
        ([1, True, "1", None, [1], [True]], 1),
        ([[1, {"a": "x"}], [1.0, {"a": "x"}]], 0),
    ],
    ids=["many", "many, one twice", "types", "nested"],
)
def test_unique_items_are_told_at_once(items: list[object], hit: float) -> None:
    settings = {"kind": "json_schema", "schema": {"uniqueItems": True}}

    begun = time.monotonic()

    assert tally(settings, json.dumps(items), "") == Tally(hit, 1)
    assert time.monotonic() - begun < 10


def test_a_pattern_that_nothing_could_stop_is_refused() -> None:
    schema = {
        "allOf": [{"patternProperties": {"^(a+)+$": {}}}],
        "unevaluatedProperties": False,
    }

    with pytest.raises(ValidationError, match="write additionalProperties"):
        scorer({"kind": "json_schema", "schema": schema})


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}}, "$defs": {"a": {}}},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_a_schema_no_answer_could_meet_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"leads nowhere|is not a JSON Schema"):
        scorer({"kind": "json_schema", "schema": schema})


def test_a_schema_may_refer_to_its_own_parts() -> None:
    schema = {
        "$id": "https://example.com/note",
        "$ref": "#/$defs/note",
        "$defs": {"note": {"properties": {"next": {"$ref": "note#/$defs/note"}}}},
        "examples": [{"$ref": "not a reference"}],
    }

    assert tally({"kind": "json_schema", "schema": schema}, '{"next": {}}', "") == Tally(1, 1)


@pytest.mark.parametrize("kind", ["json_valid", "json_field_f1"])
def test_the_same_key_twice_is_no_answer(kind: str) -> None:
    assert tally(kind, '{"a": 2, "a": 1}', '{"a": 1}', "json_valid") == Tally(0, 1)


@given(OBJECTS, OBJECTS)
def test_json_field_f1_is_symmetric_and_full_for_the_same_object(
    one: dict[str, object], other: dict[str, object]
) -> None:
    first, second = json.dumps(one), json.dumps(other, indent=1)

    assert tally("json_field_f1", first, second) == tally("json_field_f1", second, first)
    same = tally("json_field_f1", json.dumps(one, sort_keys=True), first)
    assert same.hits == same.of
