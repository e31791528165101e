"""A sweep's settings: which settings of one task are searched, how, and when losers stop.

All trials of a run are adapters over one base in one loop, so only what belongs to an adapter
alone can vary between them; what all share is refused by name.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from manylora_registry.config import ConfigModel, load_config
from manylora_registry.errors import ConfigError, Problem
from manylora_trainer.recipe import Recipe, anchored, load_recipe

DECIDES_THE_MEASURE = (
    *("name", "seed_as", "source", "format", "split", "max_length", "overlong"),
    *("on_bad_row", "max_bad_rows", "kind", "beta", "optimizer.normalizer"),
)
"""Settings of a task that decide what the validation loss is and on which rows it is measured."""
Settings = Mapping[str, Any]
"""Values by dotted path, e.g. `{"tasks.0.lora.rank": 8}`."""


class Range(ConfigModel):
    """Numbers between two ends, both included; whole ones if both ends are whole."""

    low: int | float
    """Least value."""
    high: int | float
    """Greatest value."""
    log: bool = False
    """Draw evenly over orders of magnitude."""

    @model_validator(mode="after")
    def _goes_up(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must begin above 0, not at {self.low}")
        return self

    @property
    def tried(self) -> tuple[int | float, ...]:
        """Values that stand for all: the ends, and a fraction where fractions are drawn."""
        if self.is_whole:
            return self.low, self.high
        # Both ends may be whole, as of 2.0 to 8.0, for a setting that takes no fraction.
        return self.low, self.high, self.low + (self.high - self.low) / math.e

    @property
    def is_whole(self) -> bool:
        """Whether its values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class Halving(ConfigModel):
    """Successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934).

    After `first_rung`, `first_rung * factor`, … steps only the best 1 / `factor` of all trials
    that came as far go on; the others leave the run.
    """

    first_rung: int = Field(ge=1)
    """Steps before the first trials stop; a multiple of the recipe's training.validate_every and
    fewer than the longest trial has."""
    factor: int = Field(default=2, ge=2)
    """One of so many trials goes on."""

    def is_rung(self, step: int) -> bool:
        """Whether trials are compared after `step` steps."""
        rung = self.first_rung
        while rung < step:
            rung *= self.factor
        return rung == step


class Sweep(ConfigModel):
    """A search for the best settings of one task of a recipe."""

    recipe: Path
    """The recipe, relative to this file."""
    overrides: tuple[str, ...] = ()
    """Changes of the recipe for all trials, `PATH=VALUE` as `--set` takes them."""
    sweep_directory: Path
    """Where runs and results go, relative to this file."""
    method: Literal["grid", "random", "tpe"] = "tpe"
    """`tpe`: learns from the trials before (Bergstra et al. 2011). `random`: learns nothing.
    `grid`: every combination."""
    trials: int | None = Field(default=None, ge=1)
    """How many; a grid tries all unless given."""
    trials_per_run: int = Field(default=8, ge=1)
    """How many train together over one copy of the base. `tpe` learns between runs."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the search; the trials are trained with the recipe's seed."""
    space: Mapping[
        str,
        Annotated[
            Annotated[Range, Tag("range")] | Annotated[tuple[JsonValue, ...], Tag("values")],
            # So that a range that is wrong is not told that it is no list as well.
            Discriminator(lambda given: "values" if isinstance(given, list | tuple) else "range"),
        ],
    ] = Field(min_length=1)
    """By dotted path of the recipe, such as `tasks.0.lora.rank`: a list of values, or a range
    `{low, high, log}`."""
    halving: Halving | None = None
    """When losers stop; null: every trial is trained to its end."""

    @field_validator("space", mode="before")
    @classmethod
    def _lists_or_ranges(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("must map dotted paths of the recipe to values")
        for path, values in cast("Mapping[Any, Any]", value).items():
            is_list = isinstance(values, Sequence) and not isinstance(values, str)
            if not isinstance(values, Mapping | Range) and not (is_list and values):
                raise ValueError(f"{path} must be a list of values or a range {{low, high}}")
            if is_list and (twice := _listed_twice(cast("Sequence[Any]", values))):
                raise ValueError(f"{path} lists {', '.join(twice)} twice")
        return cast("Any", value)

    @field_validator("space")
    @classmethod
    def _belongs_to_one_task(cls, space: Mapping[str, Any]) -> Mapping[str, Any]:
        problems: list[str] = []
        for path in space:
            match = re.fullmatch(r"tasks\.\d+\.(\w+(\.\w+)*)", path)
            if match is None:
                problems.append(
                    f"{path} cannot vary: all adapters of a run share it; only settings of a "
                    "task can, such as tasks.0.lora.rank"
                )
            elif any(f"{match[1]}.".startswith(f"{name}.") for name in DECIDES_THE_MEASURE):
                problems.append(
                    f"{path} cannot vary: it decides what the validation loss is measured on, "
                    "and losses would not compare"
                )
            problems += [
                f"{path} and {other} overlap: one would take the other's place"
                for other in space
                if other.startswith(f"{path}.")
            ]
        tasks = {path.split(".")[1] for path in space if path.startswith("tasks.")}
        if len(tasks) > 1:
            problems.append(f"one sweep is of one task, not of tasks {', '.join(sorted(tasks))}")
        if problems:
            raise ValueError("; ".join(problems))
        return space

    @field_validator("space")
    @classmethod
    def _fits_the_method(cls, space: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        ranges = [path for path, values in space.items() if isinstance(values, Range)]
        if info.data.get("method") == "grid" and ranges:
            raise ValueError(f"a grid needs lists of values, not ranges: {', '.join(ranges)}")
        return space

    @model_validator(mode="after")
    def _says_how_many(self) -> "Sweep":
        if self.method != "grid" and self.trials is None:
            raise ValueError(f"trials is required with method {self.method}")
        return self

    @property
    def task(self) -> int:
        """Which task of the recipe is searched."""
        return int(next(iter(self.space)).split(".")[1])

    @property
    def count(self) -> int:
        """How many trials there will be."""
        if self.method != "grid":
            return self.trials or 0
        whole = prod(len(cast("tuple[Any, ...]", values)) for values in self.space.values())
        return min(whole, self.trials or whole)

    def grid(self) -> Iterator[Settings]:
        """Every combination of the listed values, the last path varying fastest."""
        values = [cast("tuple[Any, ...]", listed) for listed in self.space.values()]
        return (dict(zip(self.space, combination, strict=True)) for combination in product(*values))

    def recipe_with(self, settings: Settings) -> Recipe:
        """The recipe with a trial's settings.

        Raises:
            ConfigError: they make no valid recipe.
        """
        changes = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
        return load_recipe(self.recipe, [*self.overrides, *changes])


def _listed_twice(values: Sequence[Any]) -> list[str]:
    # Truth values are told from the numbers they equal.
    known = [(isinstance(value, bool), value) for value in values]
    return [repr(value) for at, (_, value) in enumerate(known) if known[at] in known[:at]]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep, checks it against its recipe and makes its paths absolute.

    Raises:
        ConfigError: with every mistake of the sweep or of its recipe.
    """
    sweep = load_config(path, Sweep, overrides)
    here = path.resolve().parent
    sweep = sweep.model_copy(
        update={
            "recipe": anchored(sweep.recipe, here),
            "sweep_directory": anchored(sweep.sweep_directory, here),
        }
    )
    recipe = sweep.recipe_with({})
    problems = _problems(sweep, recipe)
    if problems:
        raise ConfigError(path, problems)
    return sweep


def _problems(sweep: Sweep, recipe: Recipe) -> list[Problem]:
    if sweep.task >= len(recipe.tasks):
        return [Problem("space", f"the recipe has no tasks.{sweep.task}")]
    problems = list(_cannot_be_packed(recipe, sweep.task))
    for path, values in sweep.space.items():
        for value in values.tried if isinstance(values, Range) else values:
            try:
                sweep.recipe_with({path: value})
            except ConfigError as error:
                why = "; ".join(f"{problem.path}: {problem.message}" for problem in error.problems)
                problems.append(Problem(f"space.{path}", f"{value!r} is refused: {why}"))
    every = recipe.training.validate_every
    if sweep.halving is not None and sweep.halving.first_rung % every:
        problems.append(
            Problem(
                "halving.first_rung",
                f"must be a multiple of the recipe's training.validate_every ({every})",
            )
        )
    steps = None if problems else _most_steps(sweep, recipe)
    if sweep.halving is not None and steps is not None and sweep.halving.first_rung >= steps:
        problems.append(
            Problem("halving.first_rung", f"no trial stops there: it must be below {steps} steps")
        )
    split = recipe.tasks[sweep.task].split
    if not split.validation or not split.validation_rows:
        problems.append(
            Problem("recipe", "the task keeps no validation rows, and trials are judged by them")
        )
    return problems


def _most_steps(sweep: Sweep, recipe: Recipe) -> int | None:
    """Of the longest trial; None where the rows decide."""
    path = f"tasks.{sweep.task}"
    match sweep.space.get(f"{path}.steps"):
        case Range() as steps:
            return int(steps.high)
        case tuple() as steps if None not in steps:
            return max(cast("tuple[int, ...]", steps))
        case _ if f"{path}.epochs" in sweep.space:
            return None
        case _:
            return recipe.tasks[sweep.task].steps


def _cannot_be_packed(recipe: Recipe, task: int) -> Iterator[Problem]:
    """What the recipe says against a second task like the one that is searched."""
    settings = recipe.model_dump()
    trials = [{**settings["tasks"][task], "name": f"trial-{number}"} for number in range(2)]
    try:
        Recipe.model_validate({**settings, "tasks": trials})
    except ValidationError as error:
        for entry in error.errors():
            yield Problem("recipe", f"its trials cannot share a run: {entry['msg']}")
