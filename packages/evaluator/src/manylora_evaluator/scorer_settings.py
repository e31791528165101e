"""Settings of the scorers, as they stand in a suite.

A scorer is written as its kind alone, `exact_match`, or as a mapping: `{kind: regex, pattern: …}`.
Its `name` is that of its chief score, and the first part of the names of further ones.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, cast

import regex
from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator
from pydantic import BeforeValidator, Field, field_validator, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from manylora_evaluator.suite_path import SuitePath
from manylora_registry.config import ConfigModel

ScoreName: TypeAlias = Annotated[
    str, Field(pattern=r"^[\w-]+$", description="Of its chief score, and before those of others.")
]


class ExactMatchSettings(ConfigModel):
    """The answer equals the expected text; only runs of whitespace are forgiven."""

    kind: Literal["exact_match"]
    name: ScoreName = "exact_match"


class NormalisedMatchSettings(ConfigModel):
    """The answer equals the expected text but for letter case, whitespace and punctuation."""

    kind: Literal["normalised_match"]
    name: ScoreName = "normalised_match"


class JsonValidSettings(ConfigModel):
    """The answer is one JSON object from end to end."""

    kind: Literal["json_valid"]
    name: ScoreName = "json_valid"


class JsonFieldF1Settings(ConfigModel):
    """Micro-averaged F1 over the fields of a JSON object."""

    kind: Literal["json_field_f1"]
    name: ScoreName = "json_field_f1"
    sections: tuple[str, ...] = ()
    """Top-level keys that get a score of their own, named SCORE.KEY."""
    arrays: Literal["whole", "items"] = "whole"
    """`whole`: an array is one field, right or wrong; `items`: each entry is, in any order."""
    text: Literal["exact", "normalised"] = "exact"
    """How text values are compared; `normalised` as normalised_match does."""


class JsonSchemaSettings(ConfigModel):
    """The answer is JSON that a JSON Schema (draft 2020-12) accepts."""

    kind: Literal["json_schema"]
    name: ScoreName = "json_schema"
    schema_: dict[str, Any] = Field(alias="schema")
    """The schema itself; references to other documents are not followed."""

    @field_validator("schema_")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            Draft202012Validator.check_schema(value)
        except SchemaError as error:
            raise ValueError(f"is not a JSON Schema: {error.message}") from error
        _check_references(value)
        if {"unevaluatedProperties", "patternProperties"} <= set(_keywords(value)):
            raise ValueError(
                "unevaluatedProperties beside patternProperties has no time limit for the "
                "patterns: write additionalProperties"
            )
        return value


class RougeLSettings(ConfigModel):
    """F-measure of the longest common subsequence of words."""

    kind: Literal["rouge_l"]
    name: ScoreName = "rouge_l"


class ClassificationSettings(ConfigModel):
    """The answer is a label: accuracy, macro F1 and a report with the confusion matrix."""

    kind: Literal["classification"]
    name: ScoreName = "classification"
    labels: tuple[str, ...] = ()
    """The labels there are; unset: those the rows expect. An answer that is none of them is a
    miss of its row's label and no label's false alarm."""
    per_label: bool = False
    """Whether each label's F1 is a score of its own, named SCORE.f1.LABEL."""


class NumericSettings(ConfigModel):
    """The number in the answer is near enough to the expected one."""

    kind: Literal["numeric"]
    name: ScoreName = "numeric"
    absolute: float = Field(default=0, ge=0)
    """Largest difference that is right."""
    relative: float = Field(default=0, ge=0, lt=1)
    """Largest difference that is right, as a share of the expected number."""
    take: Literal["only", "first", "last"] = "only"
    """Which number of the answer counts; `only`: an answer with other text is wrong."""


class RegexSettings(ConfigModel):
    """A regular expression is found in the answer."""

    kind: Literal["regex"]
    name: ScoreName = "regex"
    pattern: str = Field(min_length=1)
    """Python syntax, as the package `regex` reads it."""
    whole: bool = False
    """Whether the whole answer must match."""
    ignore_case: bool = False
    """Whether a letter equals its capital."""
    group_is_expected: bool = False
    """Whether the first group must also equal the expected text, as exact_match compares."""
    timeout_s: float = Field(default=1, gt=0)
    """Seconds for one answer; one that takes longer is wrong."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _has_the_group(self) -> Self:
        if self.group_is_expected and regex.compile(self.pattern).groups == 0:
            raise ValueError("group_is_expected needs a group in the pattern")
        return self


class SqlSettings(ConfigModel):
    """The answer is a query that returns what the expected query returns from a fixture."""

    kind: Literal["sql"]
    name: ScoreName = "sql"
    fixture: SuitePath
    """SQL script that makes the SQLite database, relative to the suite."""
    order: Literal["as_expected", "always", "never"] = "as_expected"
    """Whether the order of result rows counts; `as_expected`: where the expected query has an
    ORDER BY."""
    timeout_s: float = Field(default=2, gt=0)
    """Seconds for one query; one that takes longer is wrong."""
    most_rows: int = Field(default=10_000, ge=1)
    """A query that returns more is wrong."""


class JudgeSettings(ConfigModel):
    """A language model passes or fails the answer on stated criteria."""

    kind: Literal["judge"]
    name: ScoreName = "judge"
    by: str
    """Name of one of the suite's `judges`."""
    criteria: dict[ScoreName, str] = Field(min_length=1)
    """What a good answer does, by a short name. Each gets a score of its own, named
    SCORE.CRITERION; SCORE itself is the share of answers that pass them all."""
    reference: bool = True
    """Whether the judge is shown the expected answer."""
    section: str | None = None
    """Judge only this top-level key of JSON answers, in the answer and the expected one."""
    labels: SuitePath | None = None
    """JSON lines of answers that people passed or failed, to measure the judge by."""
    samples: int = Field(default=1, ge=1, le=15)
    """Times each answer is judged; a criterion passes when more than half of them pass it."""


class PairwiseSettings(ConfigModel):
    """A language model prefers the answer or another one; the score is the win rate."""

    kind: Literal["pairwise"]
    name: ScoreName = "pairwise"
    by: str
    """Name of one of the suite's `judges`."""
    question: str = "Which answer is better?"
    """What decides."""
    against: str = ""
    """Whose answer it is set against: `expected`, or an adapter reference that is evaluated too;
    empty: the bare base. Its own column is all ties."""
    reference: bool = False
    """Whether the judge is shown the expected answer beside the two."""
    samples: int = Field(default=1, ge=1, le=15)
    """Times each pair is judged in each order."""


def _check_references(schema: Mapping[str, Any]) -> None:
    """Looks up every reference of `schema`.

    Raises:
        ValueError: one leads nowhere, so that every answer would be wrong.
    """
    resource = DRAFT202012.create_resource(schema)
    base = resource.id() or ""
    resolver = Registry[Any]().with_resource(base, resource).resolver(base)
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            raise ValueError(
                f"$ref {reference!r} leads nowhere: only the schema itself is looked into"
            ) from error


def _references(schema: Mapping[str, Any]) -> Iterator[str]:
    # Below an $id of their own references start elsewhere.
    for part in _parts(schema, lambda part: "$id" not in part):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]


def _keywords(schema: Mapping[str, Any]) -> Iterator[str]:
    return (name for part in _parts(schema, lambda _: True) for name in part)


def _parts(
    schema: Mapping[str, Any], enters: Callable[[Mapping[str, Any]], bool]
) -> Iterator[Mapping[str, Any]]:
    """`schema` and all that is written inside it, but for what is a value."""
    yield schema
    for value in (value for name, value in schema.items() if name not in _VALUES):
        for entry in cast("list[object]", value) if isinstance(value, list) else [value]:
            if isinstance(entry, dict) and enters(cast("dict[str, Any]", entry)):
                yield from _parts(cast("dict[str, Any]", entry), enters)


_VALUES = {"enum", "const", "default", "examples"}


def _kind_alone(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


AnyScorer: TypeAlias = (
    ExactMatchSettings
    | NormalisedMatchSettings
    | JsonValidSettings
    | JsonFieldF1Settings
    | JsonSchemaSettings
    | RougeLSettings
    | ClassificationSettings
    | NumericSettings
    | RegexSettings
    | SqlSettings
    | JudgeSettings
    | PairwiseSettings
)
ScorerSettings: TypeAlias = Annotated[
    Annotated[AnyScorer, Field(discriminator="kind")], BeforeValidator(_kind_alone)
]
