"""Signals that a loop hears, however busy it is."""

import asyncio
import signal
from collections.abc import Callable, Iterable
from types import FrameType


def on_signals(numbers: Iterable[signal.Signals], callback: Callable[[], None]) -> None:
    """Has the running loop call `callback` for each of these signals, in the main thread.

    asyncio by itself loses one that comes while its loop is busy and some 280 calls of other
    threads wait to be noticed: it tells the loop by a byte in the socket those calls fill.
    """
    loop = asyncio.get_running_loop()

    def heard(_number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)

    for number in numbers:
        # For its byte, which wakes a loop that sleeps; where that is lost the loop is awake.
        loop.add_signal_handler(number, _nothing)
        signal.signal(number, heard)
    # A lost byte is no fault to be written with a trace.
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)


def _nothing() -> None:
    pass
