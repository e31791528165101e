"""Where the workers of a run and the person at the driver leave each other word; a Ray actor.

In a file of its own, so that the actor's process starts without torch, which takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora_trainer.errors import TrainerError
    from manylora_trainer.result import RunResult


class Desk:
    """What should be shown, what was asked for, and how the run ended."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._signal: str | None = None
        self._outcome: RunResult | TrainerError | None = None

    def tell(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Notes one call of a method of `Progress`."""
        self._events.append((name, arguments))

    def heard(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The calls noted since the last time."""
        events, self._events = self._events, []
        return events

    def stop(self, signal: str) -> None:
        """A person asks the run to end."""
        self._signal = signal

    def signal(self) -> str | None:
        """What a person asked the run to end by."""
        return self._signal

    def end(self, outcome: "RunResult | TrainerError") -> None:
        """Notes how the run ended; the first word counts."""
        self._outcome = self._outcome or outcome

    def outcome(self) -> "RunResult | TrainerError | None":
        """How the run ended; None while it goes on."""
        return self._outcome
