"""Streams from an OpenAI server with the `openai` client; for `gateway.py`."""

import asyncio
import time
from collections.abc import Sequence
from statistics import median

from openai import AsyncOpenAI


async def stream_all(
    url: str, model: str, streams: int, tokens: int, prompt: Sequence[int]
) -> tuple[float, float]:
    """Tokens/s of all streams together, and median seconds to the first token."""
    firsts: list[float] = []

    async def stream(client: AsyncOpenAI) -> None:
        asked = time.perf_counter()
        answer = await client.completions.create(
            model=model,
            prompt=list(prompt),
            max_tokens=tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        first, got = None, 0
        async for chunk in answer:
            if first is None and chunk.choices:
                first = time.perf_counter() - asked
            if chunk.usage is not None:
                got = chunk.usage.completion_tokens
        assert first is not None
        assert got == tokens, (got, tokens)
        firsts.append(first)

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        began = time.perf_counter()
        await asyncio.gather(*(stream(client) for _ in range(streams)))
        seconds = time.perf_counter() - began
    return streams * tokens / seconds, median(firsts)
