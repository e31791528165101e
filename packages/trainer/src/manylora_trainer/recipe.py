"""The recipe: one base, one or more tasks, where the run goes. Pure data, checked without torch.

What the serving engine would refuse later (its LoRA loader's rules) is refused here.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from manylora_registry.config import ConfigModel, load_config
from manylora_registry.errors import InvalidNameError
from manylora_registry.reference import check_adapter_name

MAX_RANK = 512
"""The largest LoRA rank the serving engine can be configured for."""
UNSERVABLE_MODULES = frozenset({"lm_head", "embed_tokens", "wte", "embed_out"})
"""Adapters on these need extra weights saved beside them, which the engine refuses."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class PythonSource(ConfigModel):
    """Rows from a Python generator function."""

    kind: Literal["python"]
    file: Path
    """Python file, relative to the recipe."""
    function: str = Field(min_length=1)
    """Function in it that takes no arguments and yields one mapping a row."""


class JsonlSource(ConfigModel):
    """Rows from a file with one JSON object a line."""

    kind: Literal["jsonl"]
    path: Path
    """The file, relative to the recipe."""


SourceSettings = Annotated[PythonSource | JsonlSource, Field(discriminator="kind")]


class TemplateFormat(ConfigModel):
    """One turn written from columns: `{column}` is replaced by the row's value."""

    kind: Literal["template"]
    system: str | None = None
    """System message; may name columns. None: the base's own default."""
    prompt: str = Field(min_length=1)
    """User message, with `{column}` placeholders."""
    completion: str | None = Field(default=None, min_length=1)
    """What the adapter learns to answer, with `{column}` placeholders."""
    completion_json: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Instead of `completion`: these columns as one canonical JSON object."""

    @field_validator("system", "prompt", "completion")
    @classmethod
    def _placeholders_are_columns(cls, value: str | None) -> str | None:
        if value is not None:
            placeholders(value)
        return value

    @model_validator(mode="after")
    def _one_completion(self) -> "TemplateFormat":
        if (self.completion is None) == (self.completion_json is None):
            raise ValueError("give either completion or completion_json")
        return self


class PromptCompletionFormat(ConfigModel):
    """Rows that already hold a prompt and its completion."""

    kind: Literal["prompt_completion"]
    system: str | None = None
    """System message. None: the base's own default."""
    prompt_column: str = "prompt"
    """Column with the user message."""
    completion_column: str = "completion"
    """Column with the answer to learn."""


class ChatFormat(ConfigModel):
    """Rows that hold a conversation whose last message is the answer to learn."""

    kind: Literal["chat"]
    system: str | None = None
    """System message put before conversations that have none."""
    messages_column: str = "messages"
    """Column with a list of `{role, content}`; the last role must be `assistant`."""


FormatSettings = Annotated[
    TemplateFormat | PromptCompletionFormat | ChatFormat, Field(discriminator="kind")
]


class Split(ConfigModel):
    """How rows are divided, by a hash of their rendered input: equal inputs stay together."""

    validation: Fraction = 0.02
    """Share of inputs kept for the validation loss."""
    held_out: Fraction = 0.1
    """Share of inputs kept out of training, for the evaluator."""
    validation_rows: int = Field(default=64, ge=0)
    """At most this many validation rows are used."""
    held_out_rows: int = Field(default=200, ge=0)
    """At most this many held-out rows are written."""

    @field_validator("held_out")
    @classmethod
    def _leaves_rows_to_train_on(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("validation", 0.0) >= 1.0:
            raise ValueError("validation and held_out together must stay below 1")
        return value


class Lora(ConfigModel):
    """Shape of one adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Inner dimension r."""
    alpha: int = Field(default=16, ge=1)
    """The update is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear`, or names of linear layers such as `[q_proj, v_proj]`."""
    init_from: Path | None = None
    """Directory of an adapter of the same shape to go on from, relative to the recipe. None: fresh
    weights."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_of_linears(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError(
                "must be all-linear or a list of module names such as [q_proj, v_proj]"
            )
        names: list[str] = []
        for name in cast("Sequence[Any]", value):
            if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
                raise ValueError(f"{name!r} is not a module name such as q_proj")
            if name.rsplit(".", 1)[-1] in UNSERVABLE_MODULES:
                raise ValueError(
                    f"{name!r} cannot be adapted: the serving engine takes adapters of the "
                    "linear layers between the embedding and the head only"
                )
            names.append(name)
        return tuple(sorted(set(names)))


class Optimizer(ConfigModel):
    """AdamW (https://arxiv.org/abs/1711.05101) and its schedule, for one adapter alone."""

    learning_rate: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate climbs to its peak."""
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    epsilon: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Added to the root of the running square."""
    clip_norm: float | None = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """The adapter's gradient is scaled down to this L2 norm; null: never."""


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
    tasks: tuple[Task, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("two tasks have the same name")
        return self

    @property
    def digest(self) -> str:
        """`sha256:…` of everything that decides what is trained; not of where the run goes."""
        data = self.model_dump(mode="json", exclude={"run_directory"})
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
            "base": _absolute(here, recipe.base),
            "run_directory": _absolute(here, recipe.run_directory),
            "tasks": tuple(
                task.model_copy(
                    update={
                        "source": _absolute_source(here, task.source),
                        "lora": _absolute_lora(here, task.lora),
                    }
                )
                for task in recipe.tasks
            ),
        }
    )


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


def _absolute_source(here: Path, source: SourceSettings) -> SourceSettings:
    if isinstance(source, PythonSource):
        return source.model_copy(update={"file": _absolute(here, source.file)})
    return source.model_copy(update={"path": _absolute(here, source.path)})


def _absolute_lora(here: Path, lora: Lora) -> Lora:
    if lora.init_from is None:
        return lora
    return lora.model_copy(update={"init_from": _absolute(here, lora.init_from)})


def _absolute(here: Path, path: Path) -> Path:
    # Not resolve(): a link in a path is the user's choice of name.
    return here / path.expanduser()
