"""What the tests of scorers share: one row, scored alone; and answers nobody wants."""

from pathlib import Path

from pydantic import TypeAdapter

from manylora_evaluator.rows import Message, Row
from manylora_evaluator.scorer_settings import AnyScorer, ScorerSettings
from manylora_evaluator.scorers import make_scorer
from manylora_evaluator.scorers.tally import Scorer, Tally

SETTINGS: TypeAdapter[AnyScorer] = TypeAdapter(ScorerSettings)

HOSTILE = {
    "nothing": "",
    "blank": " \t\n\u00a0\u2003",
    "huge": "a1 " * 400_000,
    "one huge word": "x" * 1_000_000,
    "digits": "9" * 1_000_000,
    "binary": "".join(map(chr, range(256))) * 50,
    "lone surrogates": "\ud800 \udfff",
    "nul": "\0" * 1_000,
    "brackets": "[" * 200_000,
    "nested objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested arrays": '{"a":' + "[" * 900 + "]" * 900 + "}",
    "not a number": '{"a": NaN, "b": 1e999}',
    "marks": "a" + "\u0301" * 100_000,
    "same key twice": '{"a": 1, "a": 2}',
    "fences": "```sql\n" * 20_000,
    "right to left": "\u202e}1 :a{",
}


def row(expected: str) -> Row:
    return Row((Message(role="user", content="?"),), expected, {})


def scorer(settings: object, *expected: str) -> Scorer:
    made = make_scorer(SETTINGS.validate_python(settings), [row(text) for text in expected])
    assert made is not None
    return made


def shares(settings: object, output: str, expected: str) -> dict[str, tuple[Tally, ...]]:
    return dict(scorer(settings, expected).score(output, row(expected)))


def tally(settings: object, output: str, expected: str, score: str | None = None) -> Tally:
    """The share of the chief score, or of `score`."""
    made = scorer(settings, expected)
    (share,) = made.score(output, row(expected))[score or made.names[0]]
    return share


def fixture(directory: Path, script: str) -> dict[str, object]:
    path = directory / "fixture.sql"
    path.write_text(script)
    return {"kind": "sql", "fixture": str(path)}
