"""From a row's columns to a conversation and the answer to learn. No tokenizer here."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

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

WRITTEN = (date, time, UUID)
"""Columns of databases and Parquet that stand in a text as Python writes them; a `datetime` is a
`date`."""


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
    also_trained: tuple[int, ...] = ()
    """Those of `messages` that are learned as well, by their number; all are the assistant's."""
    rejected: str | None = None
    """The answer it should rather not give, of a preference."""

    @property
    def input_key(self) -> bytes:
        """Equal for equal inputs, whatever is learned."""
        given = self.messages[: self.also_trained[0]] if self.also_trained else self.messages
        return json.dumps([[m.role, m.content] for m in given]).encode()

    @property
    def content_key(self) -> bytes:
        """Equal for equal examples."""
        turns = [[m.role, m.content] for m in self.messages]
        answers = [self.completion] if self.rejected is None else [self.completion, self.rejected]
        return json.dumps([turns, *answers, self.also_trained]).encode()

    def held_out(self) -> dict[str, Any]:
        """The input, and the answer to compare with."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        return {"messages": messages, "expected": self.completion}


def render(settings: FormatSettings, row: Row) -> Rendered:
    """Renders one row.

    Raises:
        RowError: the row is malformed, or a column is missing, of the wrong type or empty.
    """
    if row.error is not None:
        raise row.error
    reader = _RowReader(row)
    match settings:
        case TemplateFormat():
            return _render_template(settings, reader)
        case PromptCompletionFormat():
            prompt = reader.text(settings.prompt_column, template_instead=True)
            completion = reader.text(settings.completion_column, template_instead=True)
            return Rendered(_with_system(settings.system, Message("user", prompt)), completion)
        case ChatFormat():
            return _render_chat(settings, reader)
        case PreferenceFormat():
            return _render_preference(settings, reader)


def _written(value: Any) -> str:
    """What JSON has no form for, as a template writes it."""
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise ValueError(f"{value} is not a number")
        # Digits as a database shows them: str would write 0E-8 for 0.00000000.
        return f"{value:f}"
    if isinstance(value, WRITTEN):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in it")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


@dataclass(frozen=True)
class _RowReader:
    """Reads columns and says which row and field is at fault."""

    row: Row

    def error(self, column: str | None, problem: str) -> RowError:
        return RowError(self.row.source, self.row.number, column, problem)

    def value(self, column: str) -> Any:
        if column not in self.row.columns:
            raise self.error(column, "missing")
        return self.row.columns[column]

    def text(self, column: str, *, template_instead: bool = False) -> str:
        """A column of text; `template_instead`: a template can do what the format does."""
        value = self.value(column)
        if not isinstance(value, str):
            hint = ""
            if template_instead:
                with suppress(RowError):
                    self.scalar(column)
                    hint = "; `kind: template` makes text of it"
            raise self.error(column, f"must be text, is {_kind(value)}{hint}")
        if not value.strip():
            raise self.error(column, "empty")
        return self.checked(column, value)

    def checked(self, column: str, value: str) -> str:
        """Text that can be written as UTF-8; JSON can escape what cannot."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(column, "holds half a surrogate pair, which is not text") from error
        return value

    def scalar(self, column: str) -> str:
        value = self.value(column)
        if isinstance(value, str):
            return self.checked(column, value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, float | Decimal):
            # Not of integers, which may be greater than any float.
            if not math.isfinite(value):
                raise self.error(column, f"is {value}, not a number")
            return str(value) if isinstance(value, float) else _written(value)
        if isinstance(value, WRITTEN):
            return str(value)
        raise self.error(column, f"must be text or a number, is {_kind(value)}")

    def fill(self, template: str) -> str:
        columns = {column: self.scalar(column) for column in placeholders(template)}
        return template.format_map(columns)

    def canonical_json(self, columns: tuple[str, ...]) -> str:
        values = {column: self.value(column) for column in columns}
        try:
            text = json.dumps(
                values,
                sort_keys=True,
                ensure_ascii=False,
                allow_nan=False,
                separators=(",", ":"),
                default=_written,
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise self.error(", ".join(columns), f"is not JSON: {error}") from error
        return self.checked(", ".join(columns), text)


def _render_template(settings: TemplateFormat, reader: _RowReader) -> Rendered:
    if settings.completion_json is not None:
        completion = reader.canonical_json(settings.completion_json)
    else:
        completion = reader.fill(settings.completion or "")
    if not completion.strip():
        raise reader.error("completion", "renders to nothing")
    system = None if settings.system is None else reader.fill(settings.system)
    if settings.prompt_json is not None:
        prompt = reader.canonical_json(settings.prompt_json)
    else:
        prompt = reader.fill(settings.prompt or "")
    if not prompt.strip():
        raise reader.error("prompt", "renders to nothing")
    return Rendered(_with_system(system, Message("user", prompt)), completion)


def _render_chat(settings: ChatFormat, reader: _RowReader) -> Rendered:
    column = settings.messages_column
    value = reader.value(column)
    if not isinstance(value, list) or len(cast("list[Any]", value)) < 2:
        raise reader.error(column, "must be a list of two or more messages")
    entries = cast("list[Any]", value)
    messages = [_message(reader, f"{column}.{index}", e) for index, e in enumerate(entries)]
    if settings.train != "flagged" and messages[-1].role != "assistant":
        raise reader.error(column, f"must end with role assistant, ends with {messages[-1].role!r}")
    match settings.train:
        case "last":
            trained = [len(messages) - 1]
        case "all":
            trained = [i for i, message in enumerate(messages) if message.role == "assistant"]
        case "flagged":
            trained = _flagged(reader, column, entries, messages)
    if trained[0] == 0:
        raise reader.error(column, "must not begin with a message to learn")
    if settings.system is not None and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", settings.system))
        trained = [number + 1 for number in trained]
    *earlier, last = trained
    return Rendered(tuple(messages[:last]), messages[last].content, tuple(earlier))


def _flagged(
    reader: _RowReader, column: str, entries: Sequence[Any], messages: Sequence[Message]
) -> list[int]:
    """The messages with `train: true`, by their number."""
    trained: list[int] = []
    for index, (entry, message) in enumerate(zip(entries, messages, strict=True)):
        field = f"{column}.{index}.train"
        # In Parquet every message has the field, and null where nothing was written.
        flag = entry.get("train") or False
        if not isinstance(flag, bool):
            raise reader.error(field, f"must be true or false, is {flag!r}")
        if flag and message.role != "assistant":
            raise reader.error(field, f"only assistant messages train, this is {message.role!r}")
        if flag:
            trained.append(index)
    if not trained:
        raise reader.error(column, "no message has train: true")
    return trained


def _render_preference(settings: PreferenceFormat, reader: _RowReader) -> Rendered:
    prompt = Message("user", reader.text(settings.prompt_column))
    chosen = reader.text(settings.chosen_column)
    rejected = reader.text(settings.rejected_column)
    if chosen == rejected:
        raise reader.error(settings.rejected_column, "is the same answer as the chosen one")
    return Rendered(_with_system(settings.system, prompt), chosen, rejected=rejected)


def _message(reader: _RowReader, field: str, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise reader.error(field, f"must be an object, is {_kind(entry)}")
    entry = cast("Mapping[str, Any]", entry)
    role, content = entry.get("role"), entry.get("content")
    if role not in ("system", "user", "assistant"):
        raise reader.error(f"{field}.role", f"must be system, user or assistant, is {role!r}")
    # First, as the content beside them is null.
    for name in ("tool_calls", "function_call"):
        if entry.get(name):
            raise reader.error(
                f"{field}.{name}", "would be lost: role and content alone are learned"
            )
    if not isinstance(content, str):
        raise reader.error(f"{field}.content", f"must be text, is {_kind(content)}")
    if not content.strip():
        raise reader.error(f"{field}.content", "empty")
    if entry.get("weight") not in (None, 1):
        raise reader.error(
            f"{field}.weight",
            "would be lost: say by train: true what trains, and set format.train: flagged",
        )
    return Message(role, reader.checked(f"{field}.content", content))


def _with_system(system: str | None, message: Message) -> tuple[Message, ...]:
    return (message,) if system is None else (Message("system", system), message)
