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
from manylora_trainer.adapter_settings import EarlyStopping, Lora, Optimizer
from manylora_trainer.data_settings import FormatSettings, PreferenceFormat, Split
from manylora_trainer.source_settings import SourceSettings
from manylora_trainer.worker_settings import WorkerSettings


class Task(ConfigModel):
    """What one adapter learns."""

    name: str
    """Name of the adapter in the registry."""
    source: SourceSettings
    """Where its rows come from."""
    format: FormatSettings
    """What is made of a row: a prompt, and what is learned of it."""
    kind: Literal["sft", "dpo"] = Field(default="sft", validate_default=True)
    """sft: learn the answers; dpo: learn to prefer one of two answers, from rows of the format
    `preference` (https://arxiv.org/abs/2305.18290)."""
    beta: float = Field(default=0.1, gt=0.0)
    """DPO's strength of the pull back to the reference, which is the model before training."""
    split: Split = Split()
    """Which rows train, and which measure."""
    lora: Lora = Lora()
    """Shape of the adapter."""
    optimizer: Optimizer = Optimizer()
    """How it is optimised."""
    early_stopping: EarlyStopping | None = None
    """When to end before the last step; null: never."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; the rows are repeated or cut off as needed."""
    epochs: float | None = Field(default=None, gt=0.0, validate_default=True)
    """Instead of `steps`: how often each training row is taken."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples of this task in one step; 16 unless `batch_tokens` is given."""
    max_length: int = Field(default=512, ge=8)
    """Longest example, in tokens with prompt and stop token."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Instead of `batch_size`: tokens of this task in one step, on average over the steps."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer ones; either way they are counted and reported."""
    shuffle_buffer: int = Field(default=16_384, ge=1)
    """Training rows held in memory and shuffled together. A source with no more is shuffled as a
    whole; one with more is read in order, so many rows at a time."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What happens to a malformed row; skipped ones are counted and reported."""
    max_bad_rows: int = Field(default=100, ge=0)
    """With `skip`: more of them in one reading of the source are an error."""
    seed_as: str | None = None
    """Draw examples, their order and first weights as the task of this name would; null: as its own
    name. Trials of a sweep share one, so that only their settings tell them apart."""

    @property
    def seed_name(self) -> str:
        """What everything random of this task is drawn by, with the recipe's seed."""
        return self.seed_as or self.name

    @field_validator("name", "seed_as")
    @classmethod
    def _names_an_adapter(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                check_adapter_name(value)
        except InvalidNameError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("name")
    @classmethod
    def _names_one_task(cls, value: str, info: ValidationInfo) -> str:
        # The names seen so far travel in the context of this one validation, so that a duplicate
        # is reported at its own place and together with every other mistake.
        if isinstance(info.context, dict):
            context = cast("dict[str, Any]", info.context)
            seen: set[str] = context.setdefault("task_names", set())
            if value in seen:
                raise ValueError(f"two tasks are named {value!r}")
            seen.add(value)
        return value

    @property
    def examples_per_step(self) -> int:
        """What `batch_size` means where `batch_tokens` is not given."""
        return self.batch_size or 16

    @field_validator("kind")
    @classmethod
    def _fits_the_rows(cls, value: str, info: ValidationInfo) -> str:
        format_ = info.data.get("format")
        if format_ is not None and (value == "dpo") != isinstance(format_, PreferenceFormat):
            raise ValueError("kind: dpo and format.kind: preference belong together")
        return value

    @field_validator("early_stopping")
    @classmethod
    def _has_something_to_validate(
        cls, value: EarlyStopping | None, info: ValidationInfo
    ) -> EarlyStopping | None:
        split = info.data.get("split")
        if value and isinstance(split, Split) and not (split.validation and split.validation_rows):
            raise ValueError("needs validation rows: raise split.validation")
        return value

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "steps" in info.data and (info.data["steps"] is None) == (value is None):
            raise ValueError("give either steps or epochs")
        return value

    @field_validator("batch_tokens")
    @classmethod
    def _one_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None:
            return value
        if info.data.get("batch_size") is not None:
            raise ValueError("give either batch_size or batch_tokens")
        longest = info.data.get("max_length", 0)
        if value < longest:
            raise ValueError(
                f"must not be less than max_length ({longest}): an example is never divided"
            )
        return value

    @field_validator("steps")
    @classmethod
    def _warmup_ends(cls, value: int | None, info: ValidationInfo) -> int | None:
        optimizer = info.data.get("optimizer")
        if value is None or not isinstance(optimizer, Optimizer):
            return value
        if (warmup := optimizer.warmup(value)) >= value:
            raise ValueError(f"must be greater than optimizer.warmup_steps ({warmup})")
        return value


class Training(ConfigModel):
    """What all tasks of a run share."""

    pack_tokens: int | None = Field(default=None, ge=16)
    """Tokens computed in one forward and backward; examples are packed up to it. Unset: 2,048
    on a CPU and 16,384 on a GPU, or as many as memory has room for."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between validation losses; each adapter is also validated when it ends."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept, newest first."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each worker; null: the machine's cores shared evenly by all workers. Part of
    what makes a run repeatable."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only what enters each layer, and compute the rest again in the backward: about a third
    more time for a fraction of the memory, and the same result. auto: where the activations of the
    largest pack would fill a good part of the memory."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: the frozen base's linear layers in four bits (QLoRA); needs a GPU and the extra
    `qlora`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base. auto: float32 on a CPU, bfloat16 on a GPU. Adapters are float32.
    A CPU that multiplies bfloat16 itself (AMX) trains faster in it."""

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _on_and_off_are_words(cls, value: Any) -> Any:
        # YAML reads a bare on or off as a truth value.
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class Recipe(ConfigModel):
    """One base, one or more tasks, where the run goes."""

    base: Path
    """Directory of a Hugging Face model, relative to the recipe."""
    seed: int = Field(default=0, ge=0)
    """Everything random is drawn from this and the task's name."""
    run_directory: Path
    """Where checkpoints, metrics and adapters go, relative to the recipe."""
    kind: Literal["lora", "full"] = "lora"
    """lora: an adapter for each task; full: one task trains all weights of the base instead, and
    the result is a model directory."""
    training: Training = Training()
    """What all tasks share."""
    workers: WorkerSettings = WorkerSettings()
    """The processes that train."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """What is trained, one adapter each."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("two tasks have the same name")
        return self

    @model_validator(mode="after")
    def _full_is_one_plain_task(self) -> "Recipe":
        if self.kind == "lora":
            return self
        task, *others = self.tasks
        if others:
            raise ValueError("kind: full trains the base itself, so it takes exactly one task")
        if task.lora != Lora():
            raise ValueError("kind: full has no adapter: remove tasks.0.lora")
        if task.kind != "sft":
            raise ValueError("kind: full keeps no reference to prefer against: use kind: lora")
        if self.training.dtype == "bfloat16" or self.training.quantization != "none":
            raise ValueError(
                "kind: full trains float32 weights: leave training.dtype and quantization as "
                "they are"
            )
        return self

    @model_validator(mode="after")
    def _sharding_finds_plain_frozen_weights(self) -> "Recipe":
        if self.workers.sharding == "none":
            return self
        if self.kind == "full" or self.training.quantization != "none":
            raise ValueError(
                "workers.sharding: fsdp divides a frozen base in its own dtype: it goes with "
                "kind: lora and without quantization"
            )
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
    return recipe.model_copy(
        update={
            "base": anchored(recipe.base, here),
            "run_directory": anchored(recipe.run_directory, here),
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


def anchored(path: Path, directory: Path) -> Path:
    """`path` as seen from the resolved `directory`, without the `..` it begins with.

    Not resolved further: a link in a path is the user's choice of name.
    """
    path = path.expanduser()
    while path.parts[:1] == ("..",):
        directory, path = directory.parent, Path(*path.parts[1:])
    return directory / path
