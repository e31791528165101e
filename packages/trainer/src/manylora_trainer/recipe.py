"""The recipe: one base, one or more tasks, where the run goes. Pure data, checked without torch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from manylora_registry.config import ConfigModel, load_config
from manylora_registry.errors import InvalidNameError
from manylora_registry.reference import check_adapter_name
from manylora_trainer.adapter_settings import Lora, Optimizer
from manylora_trainer.data_settings import FormatSettings, SourceSettings, Split
from manylora_trainer.worker_settings import WorkerSettings


class Task(ConfigModel):
    """What one adapter learns."""

    name: str
    """Name of the adapter in the registry."""
    source: SourceSettings
    format: FormatSettings
    split: Split = Split()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples of this task in one step."""
    max_length: int = Field(default=512, ge=8)
    """Longest example, in tokens with prompt and stop token."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer ones; either way they are counted and reported."""

    @field_validator("name")
    @classmethod
    def _names_an_adapter(cls, value: str, info: ValidationInfo) -> str:
        try:
            check_adapter_name(value)
        except InvalidNameError as error:
            raise ValueError(str(error)) from error
        # The names seen so far travel in the context of this one validation, so that a duplicate
        # is reported at its own place and together with every other mistake.
        if isinstance(info.context, dict):
            context = cast("dict[str, Any]", info.context)
            seen: set[str] = context.setdefault("task_names", set())
            if value in seen:
                raise ValueError(f"two tasks are named {value!r}")
            seen.add(value)
        return value

    @field_validator("steps")
    @classmethod
    def _warmup_ends(cls, value: int, info: ValidationInfo) -> int:
        optimizer = info.data.get("optimizer")
        if isinstance(optimizer, Optimizer) and optimizer.warmup_steps >= value:
            raise ValueError(
                f"must be greater than optimizer.warmup_steps ({optimizer.warmup_steps})"
            )
        return value


class Training(ConfigModel):
    """What all tasks of a run share."""

    pack_tokens: int = Field(default=512, ge=16)
    """Tokens computed in one forward and backward; examples are packed up to it."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between validation losses; each adapter is also validated when it ends."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept, newest first."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: as many as there are cores. Part of what makes a run repeatable."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base. auto: float32 on a CPU, bfloat16 on a GPU. Adapters are float32."""


class Recipe(ConfigModel):
    """One base, one or more tasks, where the run goes."""

    base: Path
    """Directory of a Hugging Face model, relative to the recipe."""
    seed: int = Field(default=0, ge=0)
    """Everything random is drawn from this and the task's name."""
    run_directory: Path
    """Where checkpoints, metrics and adapters go, relative to the recipe."""
    training: Training = Training()
    workers: WorkerSettings = WorkerSettings()
    tasks: tuple[Task, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("two tasks have the same name")
        return self

    @property
    def digest(self) -> str:
        """`sha256:…` of everything that decides what is trained, and of nothing else."""
        data = self.model_dump(mode="json", exclude={"run_directory", "workers"})
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and makes its paths absolute.

    `overrides` are `dotted.path=VALUE` strings, e.g. `tasks.0.steps=200`.

    Raises:
        ConfigError: with every mistake of the file, each with its path and line.
    """
    recipe = load_config(path, Recipe, overrides)
    here = path.resolve().parent
    # Joined, not resolved further: a link in a path is the user's choice of name.
    return recipe.model_copy(
        update={
            "base": here / recipe.base.expanduser(),
            "run_directory": here / recipe.run_directory.expanduser(),
            "tasks": tuple(
                task.model_copy(
                    update={
                        "source": task.source.relative_to(here),
                        "lora": task.lora.relative_to(here),
                    }
                )
                for task in recipe.tasks
            ),
        }
    )
