"""Scores against values worked out by hand, and what must hold for any text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora_evaluator.scorers import SCORERS, ScorerName, Tally

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=2), JSON, max_size=4)


def tally(scorer: ScorerName, output: str, expected: str, score: str | None = None) -> Tally:
    return SCORERS[scorer].score(output, expected)[score or scorer]


@pytest.mark.parametrize(
    ("output", "expected", "hit"),
    [
        ("receive", "receive", 1),
        ("  two\n\twords ", "two words", 1),
        ("cafe\u0301", "caf\u00e9", 1),
        ("Receive", "receive", 0),
        ("twowords", "two words", 0),
        ("receive.", "receive", 0),
        ("", "receive", 0),
    ],
)
def test_exact_match_forgives_whitespace_only(output: str, expected: str, hit: float) -> None:
    assert tally("exact_match", output, expected) == Tally(hit, 1)


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


@pytest.mark.parametrize(
    ("output", "expected", "f_measure"),
    [
        # Lin 2004: "police kill the gunman" shares 3 words in order, "the gunman kill police" 2.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The, gunman!", "the gunman", 1),
        ("a b c d e f", "a c", 2 * 2 / 8),
        ("", "a c", 0),
        ("été über", "ÉTÉ ÜBER", 1),
    ],
)
def test_rouge_l(output: str, expected: str, f_measure: float) -> None:
    assert tally("rouge_l", output, expected).hits == pytest.approx(f_measure)


@pytest.mark.parametrize(
    ("scorer", "expected", "fit"),
    [
        ("exact_match", "anything", True),
        ("json_field_f1", '{"a": 1}', True),
        ("json_field_f1", "[1]", False),
        ("json_field_f1", "a", False),
        ("rouge_l", "word", True),
        ("rouge_l", "...", False),
    ],
)
def test_a_scorer_knows_what_it_cannot_score_against(
    scorer: ScorerName, expected: str, fit: bool
) -> None:
    assert (SCORERS[scorer].unfit(expected) is None) == fit


@given(st.text(), st.text())
def test_a_share_lies_between_nothing_and_all_of_it(output: str, expected: str) -> None:
    for scorer in SCORERS.values():
        if scorer.unfit(expected) is None:
            for share in scorer.score(output, expected).values():
                assert 0 <= share.hits <= share.of


@given(OBJECTS, OBJECTS)
def test_json_field_f1_is_symmetric_and_full_for_the_same_object(
    one: dict[str, object], other: dict[str, object]
) -> None:
    first, second = json.dumps(one), json.dumps(other, indent=1)

    assert tally("json_field_f1", first, second) == tally("json_field_f1", second, first)
    same = tally("json_field_f1", json.dumps(one, sort_keys=True), first)
    assert same.hits == same.of


@given(st.text(alphabet="ab c", min_size=1), st.text(alphabet="ab c"))
def test_rouge_l_is_symmetric_and_full_for_the_same_words(one: str, other: str) -> None:
    scorer = SCORERS["rouge_l"]
    if scorer.unfit(one) is None and scorer.unfit(other) is None:
        assert tally("rouge_l", one, other) == tally("rouge_l", other, one)
        assert tally("rouge_l", one, one) == Tally(1, 1)
