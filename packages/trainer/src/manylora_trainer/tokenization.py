"""From a conversation to token ids, exactly as a server renders it, and a mask of what trains."""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from manylora_trainer.data_settings import ChatFormat, FormatSettings
from manylora_trainer.errors import DataError, RowError, UnsupportedBaseError
from manylora_trainer.formats import Message, Rendered, render
from manylora_trainer.sources import Row


@dataclass(frozen=True)
class Example:
    """One tokenised example."""

    tokens: NDArray[np.int32]
    """Prompt, completion and stop token, [length]."""
    trained: NDArray[np.bool_]
    """True where the token is one to learn, [length]; never the first."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one that trains."""
        return int(np.argmax(self.trained))

    @property
    def sequences(self) -> "tuple[Example, ...]":
        """Itself: what goes through the model for it."""
        return (self,)

    @property
    def longest(self) -> int:
        """Its length: it is one sequence."""
        return len(self.tokens)

    def truncated(self, length: int) -> "Example | None":
        """The first `length` tokens; None if none of them trains."""
        trained = self.trained[:length]
        return Example(self.tokens[:length], trained) if trained.any() else None


class ChatTokenizer:
    """The base's tokenizer and chat template.

    The prompt part is what a server gets from `apply_chat_template(add_generation_prompt=True)`,
    token for token; the completion follows as the model would write it, ended by the token that
    the template puts after an answer.
    """

    def __init__(self, base: Path, now: datetime | None = None) -> None:
        """Loads the tokenizer in the base directory.

        `now` is what a chat template that writes the date takes it from; this moment unless given.

        Raises:
            UnsupportedBaseError: it has no tokenizer, chat template or stop token.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UnsupportedBaseError(f"{base}: its tokenizer cannot be read: {error}") from error
        if not self._tokenizer.chat_template:
            raise UnsupportedBaseError(f"{base}: its tokenizer has no chat template")
        self._lock = threading.Lock()
        self._base = base
        self._now = now or datetime.now(UTC)
        self._accepted: set[tuple[str, ...]] = set()
        self.stop_token: int = self._find_stop_token(base)
        self._stop_text: str = self._tokenizer.decode([self.stop_token])

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the date, which served is that of the request."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]

        def text(date: str) -> str:
            def strftime_now(_: str) -> str:
                return date

            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, strftime_now=strftime_now
            )

        return text("a date") != text("another")

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text a server would put to the model for these messages."""
        return self._render(messages, add_generation_prompt=True)

    def check(self, rendered: Rendered, row: Row, column: str | None = None) -> None:
        """Refuses a row of which the chat template makes nothing that can be learned.

        Each prompt is tried, as some templates refuse by content. With its answer the first
        conversation of each sequence of roles is, and one with earlier answers to learn each time:
        templates cut white space and reasoning from them.

        Raises:
            RowError: it does.
        """
        turns = (*rendered.messages, Message("assistant", rendered.completion))
        roles = tuple(turn.role for turn in turns)
        try:
            self.render_prompt(rendered.messages)
            if roles in self._accepted and not rendered.also_trained:
                return
            whole = self._render(turns, add_generation_prompt=False)
        except DataError as error:
            raise RowError(row.source, row.number, column, str(error)) from error
        at = 0
        for answer in [rendered.messages[number].content for number in rendered.also_trained]:
            at = whole.find(answer + self._stop_text, at)
            if at < 0:
                raise RowError(row.source, row.number, column, self._changed(answer))
            at += len(answer)
        self._accepted.add(roles)

    def encode(self, rendered: Sequence[Rendered]) -> list[Example]:
        """Tokenises examples, in their order.

        Raises:
            UnsupportedBaseError: earlier answers are to be learned, and the chat template does not
                leave them as they were given.
        """
        if not rendered:
            return []
        pieces = [self._pieces(entry) for entry in rendered]
        encoded = iter(self._ids([text for piece in pieces for text in piece]))
        return [self._join([next(encoded) for _ in piece]) for piece in pieces]

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """Text of the tokens, special ones included."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _pieces(self, entry: Rendered) -> list[str]:
        """An example as text: by turns what is given and what is learned.

        They are tokenised one by one, so that the first is what a server tokenises, and an answer
        what the model writes. The stop token behind each answer is left out.
        """
        if not entry.also_trained:
            return [self.render_prompt(entry.messages), entry.completion]
        messages = [*entry.messages, Message("assistant", entry.completion)]
        whole = self._render(messages, add_generation_prompt=False)
        pieces: list[str] = []
        at = 0
        for number in (*entry.also_trained, len(entry.messages)):
            start = len(prompt := self.render_prompt(messages[:number]))
            answer = messages[number].content
            if whole[:start] != prompt or not whole.startswith(answer + self._stop_text, start):
                raise UnsupportedBaseError(self._changed(answer))
            pieces += [whole[at:start], answer]
            at = start + len(answer) + len(self._stop_text)
        return pieces

    def _changed(self, answer: str) -> str:
        shown = repr(answer) if len(answer) <= 40 else f"{answer[:20]!r} … {answer[-20:]!r}"
        return (
            f"{self._base}: its chat template changes earlier answers ({shown}), so such ones "
            "cannot be learned, only the last of a conversation: format.train: last"
        )

    def _join(self, pieces: Sequence[list[int]]) -> Example:
        tokens: list[int] = []
        trained: list[bool] = []
        for given, learned in zip(pieces[::2], pieces[1::2], strict=True):
            tokens += [*given, *learned, self.stop_token]
            trained += [False] * len(given) + [True] * (len(learned) + 1)
        return Example(np.array(tokens, dtype=np.int32), np.array(trained))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                strftime_now=self._now.strftime,
            )
        except TemplateError as error:
            # Templates refuse what their model was not trained on, such as two user turns in a row.
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"{self._base}: its chat template refuses a conversation of {roles} that begins "
                f"{messages[0].content[:60]!r}: {error}"
            ) from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The template has already written the special tokens. One call at a time: a call sets its
        # options in the tokenizer, which refuses that while another thread is in it.
        with self._lock:
            return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _find_stop_token(self, base: Path) -> int:
        """The first end-of-sequence token the template writes after an answer."""
        stops = {self._tokenizer.eos_token_id, *_generation_stops(base)} - {None}
        answer = "manylora"
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for token in self._ids([text.rsplit(answer, 1)[-1]])[0]:
            if token in stops:
                return token
        if self._tokenizer.eos_token_id is None:
            raise UnsupportedBaseError(f"{base}: its tokenizer has no end-of-sequence token")
        return int(self._tokenizer.eos_token_id)


@dataclass(frozen=True)
class ChatPreparation:
    """Makes examples of supervised training of a task's rows."""

    format: FormatSettings
    tokenizer: ChatTokenizer

    def render(self, row: Row) -> Rendered:
        """The row as its format says, if the base's chat template takes it."""
        rendered = render(self.format, row)
        column = self.format.messages_column if isinstance(self.format, ChatFormat) else None
        self.tokenizer.check(rendered, row, column)
        return rendered

    def encode(self, rendered: Sequence[Rendered]) -> list[Example]:
        """The conversations as tokens."""
        return self.tokenizer.encode(rendered)


def _generation_stops(base: Path) -> list[int]:
    path = base / "generation_config.json"
    if not path.is_file():
        return []
    stops: int | list[int] | None = json.loads(path.read_bytes()).get("eos_token_id")
    if stops is None:
        return []
    return [stops] if isinstance(stops, int) else stops
