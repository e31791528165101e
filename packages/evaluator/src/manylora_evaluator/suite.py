"""What to evaluate: a suite of tasks, read from YAML."""

from pathlib import Path
from typing import Annotated, cast

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from manylora_evaluator.scorers import ScorerName
from manylora_registry.config import ConfigModel, load_config


def _beside_the_suite(path: Path, info: ValidationInfo) -> Path:
    """Relative paths start at the directory of the YAML file."""
    context = cast("dict[str, Path]", info.context or {})
    return context.get("directory", Path()) / path


class Task(ConfigModel):
    """One set of held-out rows, asked of the bare base and of adapters."""

    name: str = Field(min_length=1)
    """Name in tables and reports; unique in the suite."""
    adapter: str = Field(min_length=1)
    """Adapter reference to score beside the bare base."""
    rows: Annotated[Path, AfterValidator(_beside_the_suite)]
    """JSON lines of held-out rows, relative to the suite's file."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows to ask, from the file's start; unset: all."""
    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of one answer."""
    scorers: list[ScorerName] = Field(min_length=1)
    """exact_match, json_field_f1, rouge_l."""


class Suite(ConfigModel):
    """Tasks that are evaluated together, with one server."""

    name: str = Field(min_length=1)
    """Title of the report."""
    tasks: list[Task] = Field(min_length=1)
    concurrency: int = Field(default=16, ge=1)
    """Most requests under way at once."""
    timeout: float = Field(default=300, gt=0)
    """Seconds for one request, waiting in the server's queue included."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap behind the confidence intervals."""

    @field_validator("tasks")
    @classmethod
    def _names_are_unique(cls, tasks: list[Task]) -> list[Task]:
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tasks have the same name: {', '.join(twice)}")
        return tasks


def load_suite(path: Path) -> Suite:
    """Reads the suite at `path`.

    Raises:
        ConfigError: with every mistake of the file, each with its path and line.
    """
    return load_config(path, Suite)
