"""Signals to a process whose loop is busy."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from manylora_gateway.signals import on_signals

CALLS = 1000
"""More than the socket holds by which threads wake a loop."""


@pytest.fixture
def as_before() -> Iterator[None]:
    """Puts the handler of SIGUSR1 back."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("as_before")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
async def test_a_signal_to_a_loop_that_is_busy_is_heard_once() -> None:
    loop, heard = asyncio.get_running_loop(), list[str]()
    on_signals([signal.SIGUSR1], lambda: heard.append("it"))
    for _ in range(CALLS):
        loop.call_soon_threadsafe(int)
    os.kill(os.getpid(), signal.SIGUSR1)
    # What has come by now is done in the loop's next rounds.
    for _ in range(5):
        await asyncio.sleep(0)
    assert heard == ["it"]


@pytest.mark.usefixtures("as_before")
async def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    heard = asyncio.Event()
    on_signals([signal.SIGUSR1], heard.set)
    # By another thread, while this one waits for nothing else.
    threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1)).start()
    async with asyncio.timeout(10):
        await heard.wait()
