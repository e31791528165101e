"""A person's wish to end a run: noted at once, granted at the end of the step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Protocol


class Interruption(Protocol):
    """Whether a run is asked to end."""

    @property
    def signal(self) -> str | None:
        """Name of the signal that asked for it; None: nobody did."""
        ...


class Signals:
    """Notes the first SIGINT, SIGTERM or SIGHUP, so that a step can end in peace.

    A context manager. A second one is handled as if this were not there. SIGHUP stays ignored where
    `nohup` started the process; SIGINT does not, though scripts start what is in their background
    so: whoever sends it there means it.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that came."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        except ValueError:
            # Not the main thread: signals are the caller's business.
            self._before.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
