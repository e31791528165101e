"""From a row's columns to a conversation and the answer to learn. No tokenizer here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from manylora_trainer.data_settings import (
    ChatFormat,
    FormatSettings,
    PreferenceFormat,
    PromptCompletionFormat,
    TemplateFormat,
    placeholders,
)
from manylora_trainer.errors import RowError
from manylora_trainer.sources import Row


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """One row as the conversation that is put to the model and the answer it should give."""

    messages: tuple[Message, ...]
    completion: str
    rejected: str | None = None
    """The answer it should rather not give, of a preference."""

    @property
    def input_key(self) -> bytes:
        """Equal for equal inputs, whatever the completion."""
        return json.dumps([[m.role, m.content] for m in self.messages]).encode()


def render(settings: FormatSettings, source: str, row: Row) -> Rendered:
    """Renders one row; `source` names it in errors.

    Raises:
        RowError: a column is missing, of the wrong type or empty.
    """
    reader = _RowReader(source, row)
    match settings:
        case TemplateFormat():
            return _render_template(settings, reader)
        case PromptCompletionFormat():
            prompt = reader.text(settings.prompt_column)
            completion = reader.text(settings.completion_column)
            return Rendered(_with_system(settings.system, Message("user", prompt)), completion)
        case ChatFormat():
            return _render_chat(settings, reader)
        case PreferenceFormat():
            return _render_preference(settings, reader)


@dataclass(frozen=True)
class _RowReader:
    """Reads columns and says which row and field is at fault."""

    source: str
    row: Row

    def error(self, column: str | None, problem: str) -> RowError:
        return RowError(self.source, self.row.number, column, problem)

    def value(self, column: str) -> Any:
        if column not in self.row.columns:
            raise self.error(column, "missing")
        return self.row.columns[column]

    def text(self, column: str) -> str:
        value = self.value(column)
        if not isinstance(value, str):
            raise self.error(column, f"must be text, is {type(value).__name__}")
        if not value.strip():
            raise self.error(column, "empty")
        return value

    def scalar(self, column: str) -> str:
        value = self.value(column)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise self.error(column, f"must be text or a number, is {type(value).__name__}")

    def fill(self, template: str) -> str:
        columns = {column: self.scalar(column) for column in placeholders(template)}
        return template.format_map(columns)

    def canonical_json(self, columns: tuple[str, ...]) -> str:
        values = {column: self.value(column) for column in columns}
        try:
            return json.dumps(
                values, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
            )
        except (TypeError, ValueError) as error:
            raise self.error(", ".join(columns), f"is not JSON: {error}") from error


def _render_template(settings: TemplateFormat, reader: _RowReader) -> Rendered:
    if settings.completion_json is not None:
        completion = reader.canonical_json(settings.completion_json)
    else:
        completion = reader.fill(settings.completion or "")
    if not completion.strip():
        raise reader.error("completion", "renders to nothing")
    system = None if settings.system is None else reader.fill(settings.system)
    prompt = Message("user", reader.fill(settings.prompt))
    return Rendered(_with_system(system, prompt), completion)


def _render_chat(settings: ChatFormat, reader: _RowReader) -> Rendered:
    column = settings.messages_column
    value = reader.value(column)
    if not isinstance(value, list) or len(cast("list[Any]", value)) < 2:
        raise reader.error(column, "must be a list of two or more messages")
    messages = tuple(
        _message(reader, f"{column}.{index}", entry)
        for index, entry in enumerate(cast("list[Any]", value))
    )
    *conversation, answer = messages
    if answer.role != "assistant":
        raise reader.error(column, f"must end with role assistant, ends with {answer.role!r}")
    if settings.system is not None and conversation[0].role != "system":
        conversation.insert(0, Message("system", settings.system))
    return Rendered(tuple(conversation), answer.content)


def _render_preference(settings: PreferenceFormat, reader: _RowReader) -> Rendered:
    prompt = Message("user", reader.text(settings.prompt_column))
    chosen = reader.text(settings.chosen_column)
    rejected = reader.text(settings.rejected_column)
    if chosen == rejected:
        raise reader.error(settings.rejected_column, "is the same answer as the chosen one")
    return Rendered(_with_system(settings.system, prompt), chosen, rejected=rejected)


def _message(reader: _RowReader, field: str, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise reader.error(field, f"must be an object, is {type(entry).__name__}")
    entry = cast("Mapping[str, Any]", entry)
    role, content = entry.get("role"), entry.get("content")
    if role not in ("system", "user", "assistant"):
        raise reader.error(f"{field}.role", f"must be system, user or assistant, is {role!r}")
    if not isinstance(content, str) or not content.strip():
        raise reader.error(f"{field}.content", "must be text that is not empty")
    return Message(role, content)


def _with_system(system: str | None, message: Message) -> tuple[Message, ...]:
    return (message,) if system is None else (Message("system", system), message)
