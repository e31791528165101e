"""Clients that take nothing: a stream waits for its reader, and holds its place meanwhile."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from manylora_gateway.errors import StalledError


@asynccontextmanager
async def patience(seconds: float) -> AsyncGenerator[None, None]:
    """Bounds one write to a client.

    Raises:
        StalledError: the client took nothing for `seconds`.
    """
    waiting = asyncio.timeout(seconds)
    try:
        async with waiting:
            yield
    except TimeoutError as error:
        if not waiting.expired():
            raise
        raise StalledError(f"The client took nothing for {seconds:g} s.") from error
