"""Settings of a task's rows: where they come from, and what is asked and expected."""

import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, field_validator, model_validator

from manylora_evaluator.suite_path import SuitePath
from manylora_registry.config import ConfigModel


class JsonlRows(ConfigModel):
    """A file with one JSON object a line; also written as the path alone."""

    kind: Literal["jsonl"]
    path: SuitePath
    """The file, relative to the suite."""

    @property
    def file(self) -> Path:
        """Where the rows are."""
        return self.path


class HeldOutRows(ConfigModel):
    """The rows a training run kept out of training."""

    kind: Literal["held_out"]
    run: SuitePath
    """The run's directory, relative to the suite."""
    task: str = Field(min_length=1)
    """The recipe's task."""

    @property
    def file(self) -> Path:
        """Where the rows are."""
        return self.run / "held_out" / f"{self.task}.jsonl"


class ParquetRows(ConfigModel):
    """A Parquet file; needs the extra `manylora-evaluator[parquet]`."""

    kind: Literal["parquet"]
    path: SuitePath
    """The file, relative to the suite."""

    @property
    def file(self) -> Path:
        """Where the rows are."""
        return self.path


def _path_alone(value: object) -> object:
    return {"kind": "jsonl", "path": value} if isinstance(value, str) else value


RowSource: TypeAlias = Annotated[
    Annotated[JsonlRows | HeldOutRows | ParquetRows, Field(discriminator="kind")],
    BeforeValidator(_path_alone),
]


class Prompt(ConfigModel):
    """What is asked and expected, written from a row's columns: `{column}` is replaced.

    Text, dates, times and decimals stand as they are, other values as JSON; a null is refused.
    """

    system: str | None = None
    """System message; unset: none."""
    user: str = Field(min_length=1)
    """User message."""
    expected: str | None = None
    """The expected answer."""
    expected_json: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Instead of `expected`: these columns as one JSON object."""

    @field_validator("system", "user", "expected")
    @classmethod
    def _placeholders_are_columns(cls, value: str | None) -> str | None:
        if value is not None:
            placeholders(value)
        return value

    @model_validator(mode="after")
    def _one_expectation(self) -> Self:
        if self.expected is not None and self.expected_json is not None:
            raise ValueError("give expected or expected_json, not both")
        return self


def placeholders(template: str) -> list[str]:
    """The columns a template names, in order.

    Raises:
        ValueError: a placeholder is not just a column name, or the braces do not match.
    """
    columns: list[str] = []
    for _, column, specification, conversion in Formatter().parse(template):
        if column is None:
            continue
        if specification or conversion or not re.fullmatch(r"[^\W\d]\w*", column):
            raise ValueError(
                f"{{{column}}} is not a column: write {{name}}, and {{{{ }}}} for literal braces"
            )
        columns.append(column)
    return columns
