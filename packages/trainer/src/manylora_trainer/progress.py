"""What a person watching sees: bars on a terminal, a line now and then anywhere else."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 5.0


class Watch(Protocol):
    """Who is told how a run goes."""

    def say(self, text: str) -> None:
        """One line for good."""
        ...

    def start(self, steps: Mapping[str, int], done: int) -> None:
        """The tasks with their number of steps, of which `done` are behind them."""
        ...

    def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
        """One finished step and the training loss of each task in it."""
        ...

    def validated(self, name: str, loss: float) -> None:
        """A new validation loss."""
        ...


class _Unread:
    """A stream that may have lost its reader: a terminal that closed, `tee` that Ctrl-C ended.

    What a person would have seen is worth less than the run, which would end without a checkpoint.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """Progress of a run, one bar a task; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        # None where the process was started without one, which rich makes do with.
        stream = sys.stderr and cast("IO[str]", _Unread(sys.stderr))
        self._console = console or Console(file=stream, stderr=True)
        self._bars: RichProgress | None = None
        self._ids: dict[str, TaskID] = {}
        self._steps: dict[str, int] = {}
        self._losses: dict[str, str] = {}
        self._validation: dict[str, str] = {}
        self._last_line = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """One line for good."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, steps: Mapping[str, int], done: int) -> None:
        """Shows the tasks with their number of steps, of which `done` are behind them."""
        self._steps = dict(steps)
        self._losses = dict.fromkeys(steps, "")
        self._validation = dict.fromkeys(steps, "")
        if not self._console.is_terminal:
            return
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        for name, count in steps.items():
            self._ids[name] = self._bars.add_task(
                name, total=count, completed=min(done, count), losses="", speed=""
            )
        self._bars.start()

    def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
        """Shows one finished step and the training loss of each task in it."""
        for name, loss in losses.items():
            self._losses[name] = f"loss {loss:.3f}"
        if self._bars is not None:
            for name in losses:
                self._bars.update(
                    self._ids[name],
                    completed=step,
                    losses=self._describe(name),
                    speed=f"{tokens_per_s:.0f} tok/s",
                )
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            total = max(self._steps.values())
            shown = "  ".join(f"{name} {self._describe(name)}" for name in losses)
            self.say(f"step {step}/{total}  {shown}  {tokens_per_s:.0f} tok/s")

    def validated(self, name: str, loss: float) -> None:
        """Shows a new validation loss."""
        self._validation[name] = f"validation {loss:.3f}"
        if self._bars is not None:
            self._bars.update(self._ids[name], losses=self._describe(name))

    def _describe(self, name: str) -> str:
        return " ".join(part for part in (self._losses[name], self._validation[name]) if part)
