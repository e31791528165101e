"""Settings of what is made of a task's rows, and how they are divided."""

import re
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from manylora_registry.config import ConfigModel

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class TemplateFormat(ConfigModel):
    """One turn written from columns: `{column}` is replaced by the row's value."""

    kind: Literal["template"]
    system: str | None = None
    """System message; may name columns. None: the base's own default."""
    prompt: str | None = Field(default=None, min_length=1)
    """User message, with `{column}` placeholders."""
    prompt_json: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Instead of `prompt`: these columns as one canonical JSON object."""
    completion: str | None = Field(default=None, min_length=1)
    """What the adapter learns to answer, with `{column}` placeholders."""
    completion_json: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Instead of `completion`: these columns as one canonical JSON object, keys sorted."""

    @field_validator("system", "prompt", "completion")
    @classmethod
    def _placeholders_are_columns(cls, value: str | None) -> str | None:
        if value is not None:
            placeholders(value)
        return value

    @model_validator(mode="after")
    def _one_prompt_and_one_completion(self) -> "TemplateFormat":
        if (self.prompt is None) == (self.prompt_json is None):
            raise ValueError("give either prompt or prompt_json")
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
    """Rows that hold a conversation."""

    kind: Literal["chat"]
    system: str | None = None
    """System message put before conversations that have none."""
    messages_column: str = "messages"
    """Column with a list of `{role, content}`."""
    train: Literal["last", "all", "flagged"] = "last"
    """Which messages are learned: the last one, which must be the assistant's; all of the
    assistant's; or those with `train: true` beside role and content. What stands behind the last
    one learned is left out."""


class PreferenceFormat(ConfigModel):
    """Rows that hold a prompt, an answer to prefer and one to avoid; for `kind: dpo`."""

    kind: Literal["preference"]
    system: str | None = None
    """System message. None: the base's own default."""
    prompt_column: str = "prompt"
    """Column with the user message."""
    chosen_column: str = "chosen"
    """Column with the answer to prefer."""
    rejected_column: str = "rejected"
    """Column with the answer to avoid."""


FormatSettings = Annotated[
    TemplateFormat | PromptCompletionFormat | ChatFormat | PreferenceFormat,
    Field(discriminator="kind"),
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
    scan_rows: int = Field(default=100_000, ge=1)
    """Rows looked through for both before training starts; with `epochs` it is all of them. Inputs
    of either part never train, wherever they stand."""

    @field_validator("held_out")
    @classmethod
    def _leaves_rows_to_train_on(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("validation", 0.0) >= 1.0:
            raise ValueError("validation and held_out together must stay below 1")
        return value


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
