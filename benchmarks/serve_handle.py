"""Chunks a second through a plain Ray Serve streaming handle; for `gateway.py`."""

# Ray's handles are typed at run time only.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncGenerator

import ray
from ray import serve

CHUNKS = 100


@serve.deployment(max_ongoing_requests=1000)
class Source:
    """Emits as fast as it is read."""

    async def stream(self, count: int) -> AsyncGenerator[tuple[str, tuple[int, ...]], None]:
        """`count` chunks of one token."""
        for index in range(count):
            yield " tok", (index,)


async def measure(streams: int) -> float:
    """Chunks a second over all streams."""
    handle = serve.run(Source.bind(), route_prefix=None).options(stream=True)

    async def read(count: int) -> None:
        async for _ in handle.stream.remote(count):
            pass

    await read(10)
    began = time.perf_counter()
    await asyncio.gather(*(read(CHUNKS) for _ in range(streams)))
    return streams * CHUNKS / (time.perf_counter() - began)


if __name__ == "__main__":
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    print(json.dumps({"chunks_per_s": asyncio.run(measure(int(sys.argv[1])))}))
    serve.shutdown()
    ray.shutdown()
