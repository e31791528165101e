"""Scores against values worked out by hand, and what must hold for any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora_evaluator.scorers.tally import Tally
from tests.unit.evaluator.scorer_cases import HOSTILE, fixture, row, scorer, tally

SIMPLE: list[tuple[object, str]] = [
    ("exact_match", "receive"),
    ("normalised_match", "receive"),
    ("json_valid", ""),
    ("json_field_f1", '{"a": 1, "l": [1, {"b": 2}]}'),
    ({"kind": "json_field_f1", "arrays": "items", "text": "normalised"}, '{"l": ["x"]}'),
    ({"kind": "json_schema", "schema": {"properties": {"a": {"$ref": "#"}}}}, ""),
    ("rouge_l", "two words"),
    ({"kind": "classification", "labels": ["yes", "no"], "per_label": True}, "yes"),
    ({"kind": "numeric", "take": "last", "relative": 0.1}, "4"),
    ({"kind": "regex", "pattern": "(a+)+b", "timeout_s": 0.05}, ""),
]


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
    ("output", "expected", "hit"),
    [
        ("  Dr. SMITH -- (MD)!", "dr smith md", 1),
        ("stra\u00dfe", "STRASSE", 1),
        ("\uff21\uff22\uff23", "abc", 1),
        ("\ufb01ve", "five", 1),
        ("caf\u00e9", "cafe\u0301", 1),
        ("cafe", "caf\u00e9", 0),
        ("3.5", "35", 0),
        ("over-rule", "overrule", 0),
        ("one", "one two", 0),
        ("\u0928\u092e\u0938\u094d\u0924\u0947!", "\u0928\u092e\u0938\u094d\u0924\u0947", 1),
    ],
)
def test_normalised_match_forgives_case_spaces_punctuation_and_forms(
    output: str, expected: str, hit: float
) -> None:
    assert tally("normalised_match", output, expected) == Tally(hit, 1)


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
        ("cafe\u0301 noir", "caf\u00e9 noir", 1),
        # Two words of Hindi that differ in the vowel's mark alone.
        ("\u0915\u093f", "\u0915\u093e", 0),
    ],
)
def test_rouge_l(output: str, expected: str, f_measure: float) -> None:
    assert tally("rouge_l", output, expected).hits == pytest.approx(f_measure)


@pytest.mark.parametrize(
    ("settings", "output", "expected", "hit"),
    [
        ({}, "42", "42", 1),
        ({}, " 42.0\n", "42", 1),
        ({}, "1,234.5", "1234.5", 1),
        ({}, "\N{MINUS SIGN}3", "-3", 1),
        ({}, "1e3", "1000", 1),
        ({}, ".5", "0.5", 1),
        ({}, "it is 42", "42", 0),
        ({}, "12,34", "1234", 0),
        ({}, "42 43", "42", 0),
        ({}, "1e999", "1", 0),
        ({}, "nan", "1", 0),
        ({"absolute": 0.5}, "41.5", "42", 1),
        ({"absolute": 0.5}, "41.4", "42", 0),
        ({"relative": 0.1}, "-90", "-100", 1),
        ({"relative": 0.1}, "-89", "-100", 0),
        ({"absolute": 0.1}, "0.4", "0.3", 1),
        ({"absolute": 0.1}, "0.40001", "0.3", 0),
        ({"relative": 0.05}, "1.47", "1.4", 1),
        ({}, "1e-400", "1e-300", 0),
        ({}, "1e-99999999999999999999", "0", 1),
        ({"take": "first"}, "4 of 7 days", "4", 1),
        ({"take": "last"}, "10-12 mg", "12", 1),
        ({"take": "last"}, "5 -3", "-3", 1),
        ({"take": "last"}, "3 + 4 = 7.", "7", 1),
        ({"take": "last"}, "none at all", "7", 0),
    ],
)
def test_numeric(settings: dict[str, object], output: str, expected: str, hit: float) -> None:
    assert tally({"kind": "numeric"} | settings, output, expected) == Tally(hit, 1)


@pytest.mark.parametrize(
    ("settings", "output", "expected", "hit"),
    [
        ({"pattern": r"\bICD-\d+"}, "code ICD-10 applies", "", 1),
        ({"pattern": r"\bICD-\d+"}, "code icd-10 applies", "", 0),
        ({"pattern": r"icd-\d+", "ignore_case": True}, "ICD-10", "", 1),
        ({"pattern": r"\d+", "whole": True}, " 10\n", "", 1),
        ({"pattern": r"\d+", "whole": True}, "10 mg", "", 0),
        ({"pattern": r"answer: (\w+)", "group_is_expected": True}, "answer: yes", "yes", 1),
        ({"pattern": r"answer: (\w+)", "group_is_expected": True}, "answer: no", "yes", 0),
        ({"pattern": r"a(b)?", "group_is_expected": True}, "a", "b", 0),
        ({"pattern": r"(a+)+$", "timeout_s": 0.05}, "a" * 64 + "b", "", 0),
    ],
)
def test_regex(settings: dict[str, object], output: str, expected: str, hit: float) -> None:
    assert tally({"kind": "regex"} | settings, output, expected) == Tally(hit, 1)


@pytest.mark.parametrize(
    ("settings", "expected", "fit"),
    [
        ("exact_match", "anything", True),
        ("exact_match", " ", False),
        ("normalised_match", "...", False),
        ("json_field_f1", '{"a": 1}', True),
        ("json_field_f1", "[1]", False),
        ("json_field_f1", "a", False),
        ("json_valid", "", True),
        ("rouge_l", "word", True),
        ("rouge_l", "...", False),
        ("numeric", "about 4", False),
        ({"kind": "classification", "labels": ["yes", "no"]}, "maybe", False),
        ({"kind": "regex", "pattern": "a"}, "", True),
        ({"kind": "regex", "pattern": "(a)", "group_is_expected": True}, "", False),
    ],
)
def test_a_scorer_knows_what_it_cannot_score_against(
    settings: object, expected: str, fit: bool
) -> None:
    assert (scorer(settings, expected).unfit(row(expected)) is None) == fit


@pytest.mark.parametrize("output", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(("settings", "expected"), SIMPLE, ids=lambda value: str(value)[:30])
def test_no_answer_breaks_a_scorer(settings: object, expected: str, output: str) -> None:
    made = scorer(settings, expected)

    shares = made.score(output, row(expected))

    assert set(shares) == set(made.names)
    assert all(0 <= share.hits <= share.of for tallies in shares.values() for share in tallies)


@pytest.mark.parametrize("output", HOSTILE.values(), ids=HOSTILE)
def test_no_answer_breaks_the_database(output: str, tmp_path: Path) -> None:
    assert tally(fixture(tmp_path, "CREATE TABLE t (a)"), output, "SELECT a FROM t").hits == 0


@given(st.text(), st.text())
def test_a_share_lies_between_nothing_and_all_of_it(output: str, expected: str) -> None:
    for settings, _ in SIMPLE:
        made = scorer(settings, expected)
        if made.unfit(row(expected)) is None:
            for tallies in made.score(output, row(expected)).values():
                assert all(0 <= share.hits <= share.of for share in tallies)


@given(st.text(alphabet="ab c", min_size=1), st.text(alphabet="ab c"))
def test_rouge_l_is_symmetric_and_full_for_the_same_words(one: str, other: str) -> None:
    made = scorer("rouge_l")
    if made.unfit(row(one)) is None and made.unfit(row(other)) is None:
        assert tally("rouge_l", one, other) == tally("rouge_l", other, one)
        assert tally("rouge_l", one, one) == Tally(1, 1)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_is_equal_to_itself(value: float) -> None:
    assert tally("numeric", repr(value), json.dumps(value)) == Tally(1, 1)
