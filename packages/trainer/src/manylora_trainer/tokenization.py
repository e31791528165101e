"""From a conversation to token ids, exactly as a server renders it, and a mask of what trains."""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.formats import Message, Rendered


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

    def __init__(self, base: Path) -> None:
        """Loads the tokenizer in the base directory.

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
        self.stop_token: int = self._find_stop_token(base)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text a server would put to the model for these messages."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )

    def encode(self, rendered: Sequence[Rendered]) -> list[Example]:
        """Tokenises examples, in their order."""
        if not rendered:
            return []
        prompts = self._ids([self.render_prompt(entry.messages) for entry in rendered])
        completions = self._ids([entry.completion for entry in rendered])
        return [
            Example(
                np.array([*prompt, *completion, self.stop_token], dtype=np.int32),
                np.arange(len(prompt) + len(completion) + 1) >= len(prompt),
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """Text of the tokens, special ones included."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The template has already written the special tokens.
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


def _generation_stops(base: Path) -> list[int]:
    path = base / "generation_config.json"
    if not path.is_file():
        return []
    stops: int | list[int] | None = json.loads(path.read_bytes()).get("eos_token_id")
    if stops is None:
        return []
    return [stops] if isinstance(stops, int) else stops
