"""Which long prompts an engine computes now."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

AT_ONCE = 2
"""While the engine has the last part of one, the other keeps it busy."""


class PromptTurns:
    """Lets few long prompts into the engine, first those of who uses least of its share.

    An engine computes a part of each prompt it has begun in every step, and begins another if the
    step has room left. So a flood of long ones leaves none, whatever their priorities are, unless
    few of them are begun. Lives on one event loop.

    Args:
        long: tokens up to which a prompt is short; None lets all in.
    """

    def __init__(self, long: int | None) -> None:
        self._long = long
        self._free = AT_ONCE
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def turn(self, tokens: int, priority: int) -> AsyncGenerator[Callable[[], None], None]:
        """The turn of a prompt of so many tokens, the lowest `priority` first.

        Yields what ends it once the prompt is computed; with the block it ends as well.
        """
        if self._long is None or tokens <= self._long:
            yield lambda: None
            return
        granted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), granted))
        self._grant()
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended and granted.done() and not granted.cancelled():
                ended = True
                self._free += 1
                self._grant()

        try:
            await granted
            yield end
        finally:
            end()

    def _grant(self) -> None:
        while self._free and self._waiting:
            *_, granted = heapq.heappop(self._waiting)
            # One that was cancelled waits no more.
            if not granted.done():
                granted.set_result(None)
                self._free -= 1
