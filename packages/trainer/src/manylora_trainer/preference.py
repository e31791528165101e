"""Pairs of a chosen and a rejected answer, from rows to what goes through the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from manylora_trainer.data_settings import FormatSettings
from manylora_trainer.formats import Rendered, render
from manylora_trainer.sources import Row
from manylora_trainer.tokenization import ChatTokenizer, Example


@dataclass(frozen=True)
class Pair:
    """One tokenised preference: two examples with the same prompt."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What goes through the model for it."""
        return (self.chosen, self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))

    def truncated(self, length: int) -> "Pair | None":
        """Both cut to `length` tokens; None if one has no answer left, or both have the same."""
        chosen, rejected = self.chosen.truncated(length), self.rejected.truncated(length)
        if chosen is None or rejected is None or np.array_equal(chosen.tokens, rejected.tokens):
            return None
        return Pair(chosen, rejected)


@dataclass(frozen=True)
class PairPreparation:
    """Makes pairs of a task's rows."""

    format: FormatSettings
    tokenizer: ChatTokenizer

    def render(self, row: Row) -> Rendered:
        """The row as its format says, if the base's chat template takes it."""
        rendered = render(self.format, row)
        self.tokenizer.check(rendered, row)
        return rendered

    def encode(self, rendered: Sequence[Rendered]) -> list[Pair]:
        """Both answers of each preference as tokens."""
        chosen = self.tokenizer.encode(rendered)
        rejected = self.tokenizer.encode(
            [replace(entry, completion=entry.rejected or "") for entry in rendered]
        )
        return [Pair(*halves) for halves in zip(chosen, rejected, strict=True)]
