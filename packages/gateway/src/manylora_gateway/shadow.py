"""Copies of requests to a version that is not trusted yet; nobody gets its answers."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing

from manylora_gateway.engine import Prompt, Sampling
from manylora_gateway.errors import DisplacedError
from manylora_gateway.fair import Share
from manylora_gateway.metrics import Metrics
from manylora_gateway.replicas import Replicas
from manylora_gateway.rollouts import Rollout
from manylora_gateway.routes import Routes
from manylora_registry import Version

MAX_COPIES = 8
"""Copies under way; more are not made, and counted as skipped."""
SHARE = Share("shadow", tenant_weight=0.1, gives_way=True)
IN_TURN = Share("shadow in turn", tenant_weight=0.1)

logger = logging.getLogger(__name__)


class Shadows:
    """Makes copies once the answer is out, and compares. Lives on one event loop."""

    def __init__(self, routes: Routes, replicas: Replicas, metrics: Metrics) -> None:
        self._routes = routes
        self._replicas = replicas
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def copy(
        self,
        rollout: Rollout,
        version: Version,
        prompt: Prompt,
        sampling: Sampling,
        answer: Sequence[int],
    ) -> None:
        """Has `version` answer what was answered with the tokens `answer`."""
        figures, share = rollout.figures, SHARE
        if figures.turns.take():
            share = IN_TURN
        elif len(self._tasks) >= MAX_COPIES:
            self._skip(rollout)
            return
        work = self._compare(rollout, version, prompt, sampling, answer, share)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _skip(self, rollout: Rollout) -> None:
        rollout.figures.skipped += 1
        self._metrics.shadows.labels("skipped").inc()

    async def settle(self) -> None:
        """Waits until no copy is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Gives up the copies under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(
        self,
        rollout: Rollout,
        version: Version,
        prompt: Prompt,
        sampling: Sampling,
        answer: Sequence[int],
        share: Share,
    ) -> None:
        figures, began = rollout.figures, time.monotonic()
        tokens: list[int] = []
        request_id = f"shadow-{id(answer):x}-{began}"
        try:
            async with self._routes.use(f"{version.name}@{version.number}"):
                deltas = self._replicas.generate(request_id, prompt, sampling, version, share)
                async with aclosing(deltas):
                    async for delta in deltas:
                        if not tokens:
                            figures.first_token.add(time.monotonic() - began)
                        if not delta.choice:
                            tokens.extend(delta.token_ids)
        except DisplacedError:
            self._skip(rollout)
            return
        except Exception as error:
            figures.failed += 1
            self._metrics.shadows.labels("failed").inc()
            logger.warning("a copy for %s failed: %s", version.engine_name, error)
            return
        finally:
            if share is IN_TURN:
                figures.turns.end(time.monotonic() - began)
        figures.turns.put_off()
        if tokens == list(answer):
            figures.same += 1
            self._metrics.shadows.labels("same").inc()
            return
        figures.different += 1
        self._metrics.shadows.labels("different").inc()
        pairs = enumerate(zip(tokens, answer, strict=False))
        parted = (index for index, (here, there) in pairs if here != there)
        figures.agreeing_tokens += next(parted, min(len(tokens), len(answer)))
