"""Where the time of one request goes in a replica."""

import time
from dataclasses import replace

from manylora_gateway.engine import Delta, Timing


class Stopwatch:
    """Runs from its making, when the request came, to the last delta of its `answers`."""

    def __init__(self, answers: int) -> None:
        self._unfinished = answers
        self._asked = self._seated = self._first = time.monotonic()
        self._load_s = 0.0
        self._any = False

    def seated(self, load: tuple[float, float] | None) -> None:
        """The engine begins.

        Args:
            load: when the load of the adapter began and ended, by the monotonic clock.
        """
        self._seated = time.monotonic()
        if load is not None:
            self._load_s = max(0.0, min(self._seated, load[1]) - max(self._asked, load[0]))

    def timed(self, delta: Delta) -> Delta:
        """The same delta, with the timing of the whole request if it is the last."""
        if not self._any:
            self._any, self._first = True, time.monotonic()
        if delta.finish is not None:
            self._unfinished -= 1
        if self._unfinished:
            return delta
        timing = Timing(
            queue_s=self._seated - self._asked - self._load_s,
            load_s=self._load_s,
            prefill_s=self._first - self._seated,
            decode_s=time.monotonic() - self._first,
        )
        return replace(delta, timing=timing)
