"""What passes through a task's stream: the protocols between rows, formats and training steps.

    Row ── Preparation.render ──> Rendering ── Preparation.encode ──> Item ──> batches of a step

The stream reads, divides, shuffles, encodes, cuts and batches; it knows nothing of what an item is
besides these. An `Example` of supervised training is one kind of item; a pair of a chosen and a
rejected answer is another, made by a preparation of its own.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeVar

from manylora_trainer.sources import Row


class Rendering(Protocol):
    """One row as text: a conversation and what is to be learned of it. Immutable."""

    @property
    def input_key(self) -> bytes:
        """Equal for equal inputs, whatever the answers: decides what trains."""
        ...

    @property
    def content_key(self) -> bytes:
        """Equal only where everything that trains is equal: goes into the data's fingerprint."""
        ...

    def held_out(self) -> dict[str, Any]:
        """What an evaluator is given: `messages` and the `expected` answer."""
        ...


class Item(Protocol):
    """One rendering as tokens. Immutable."""

    def __len__(self) -> int:
        """Tokens it adds to a step, over all its sequences: what `batch_tokens` counts."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence: what `max_length` bounds."""
        ...

    def truncated(self, length: int) -> Self | None:
        """The same with no sequence longer than `length`; None where nothing is left to learn."""
        ...


R = TypeVar("R", bound=Rendering)
I = TypeVar("I", bound=Item)  # noqa: E741 (beside R, not in formulas)


class Preparation(Protocol[R, I]):
    """Makes a task's items. Called from several threads at once."""

    def render(self, row: Row) -> R:
        """Renders one row.

        Raises:
            RowError: the row cannot be rendered.
        """
        ...

    def encode(self, rendered: Sequence[R]) -> list[I]:
        """Tokenises renderings, in their order."""
        ...
