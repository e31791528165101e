"""Ending what runs from outside, in our words and not as if its own caller had left."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from manylora_gateway.errors import GatewayError


class CutOff:
    """What runs under it can be ended at once. Lives on one event loop.

    Args:
        error: what is raised in each that is ended.
    """

    def __init__(self, error: Callable[[], GatewayError]) -> None:
        self._error = error
        self._running: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def around(self) -> AsyncGenerator[None, None]:
        """While the context lasts, `end` ends it."""
        running = asyncio.timeout(None)
        self._running.add(running)
        try:
            async with running:
                yield
        except TimeoutError as error:
            if not running.expired():
                raise
            raise self._error() from error
        finally:
            self._running.discard(running)

    def end(self) -> None:
        """Ends all that runs now."""
        running, self._running = self._running, set()
        if running:
            now = asyncio.get_running_loop().time()
            for each in running:
                each.reschedule(now)
