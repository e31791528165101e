"""Watches the replicas: what they hold, whether anyone answers, and who is new."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing

from manylora_gateway.admission import Admission
from manylora_gateway.engine import Sampling, TextPrompt
from manylora_gateway.errors import ReplicaLostError
from manylora_gateway.metrics import Metrics
from manylora_gateway.replicas import Replicas, ReplicaState
from manylora_gateway.retries import FIRST_RETRY_S, later
from manylora_gateway.routes import Routes
from manylora_registry import Version

WATCH_S = 1.0
FAILURES = 3
"""Looks in a row that must fail before nobody is let in: a busy replica may miss one."""

logger = logging.getLogger(__name__)


class Fleet:
    """The replicas as they were last seen. Lives on one event loop.

    Args:
        announce: tells health checks whether requests are wanted.
        warm: versions a new replica gets loaded, at most, besides the pinned ones.
    """

    def __init__(
        self,
        replicas: Replicas,
        routes: Routes,
        admission: Admission,
        metrics: Metrics,
        announce: Callable[[bool], Awaitable[None]],
        warm: int,
    ) -> None:
        # By digest: what every replica is to keep loaded, new ones too.
        self._pinned: dict[str, Version] = {}
        self._pinning = False
        self._retry_s = FIRST_RETRY_S
        self._replicas = replicas
        self._routes = routes
        self._admission = admission
        self._metrics = metrics
        self._announce = announce
        self._warm = warm
        self._known: set[str] = set()
        self._failures = 0
        self._tasks: set[asyncio.Task[object]] = set()

    async def begin(self) -> None:
        """Has the base answer once, then watches.

        Raises:
            GatewayError: the base does not answer.
        """
        probe = self._replicas.generate("probe", TextPrompt("Hello"), Sampling(max_tokens=1), None)
        async with aclosing(probe) as deltas:
            async for _ in deltas:
                pass
        await self.look()
        self._start(self._watch())

    async def close(self) -> None:
        """Ends watching."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def pin(self, version: Version) -> None:
        """Keeps `version` loaded on every replica, new ones too.

        Raises:
            GatewayError: it cannot be loaded, or too many are pinned; then none keeps it.
        """
        first = version.digest not in self._pinned
        self._pinned[version.digest] = version
        try:
            await self._replicas.pin(version)
        except BaseException:
            if first:
                # Those that were quicker than the failure have pinned it.
                self._start(self._bring(self.unpin, version))
            raise

    async def unpin(self, version: Version) -> None:
        """Lets `version` go."""
        self._pinned.pop(version.digest, None)
        await self._replicas.unpin(version)

    async def announce_end(self) -> None:
        """Tells health checks that no requests are wanted any more."""
        await self._announce(False)

    async def look(self) -> None:
        """Takes one look."""
        try:
            states = await self._replicas.states()
        except Exception as error:
            self._failures += 1
            if self._failures == FAILURES:
                logger.warning("no engine replica answers: %s", error)
                self._metrics.replicas = ()
                self._admission.lost = ReplicaLostError(
                    "No engine replica runs; one is being started."
                )
                await self._announce(False)
            return
        self._failures = 0
        self._metrics.replicas = states
        self._metrics.registry_age.set(self._routes.registry_age_s)
        present = {state.replica_id for state in states}
        if self._known and not present <= self._known:
            # It knows nothing: what is served now is loaded before it is asked for.
            self._start(self._warm_up())
        self._known = present
        lacking = [version for version in self._pinned.values() if not _pinned(states, version)]
        if not lacking:
            self._retry_s = FIRST_RETRY_S
        elif not self._pinning:
            self._pinning = True
            self._start(self._pin_again(lacking))
        if self._admission.lost is not None:
            logger.info("engine replicas answer again")
            self._admission.lost = None
            await self._announce(not self._admission.draining)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await self.look()

    async def _warm_up(self) -> None:
        for version in self._routes.served()[: self._warm]:
            await self._bring(self._replicas.prepare, version)
            # It may have been replaced meanwhile.
            self._routes.displace(version)

    async def _pin_again(self, versions: Sequence[Version]) -> None:
        failed = False
        for version in versions:
            if version.digest in self._pinned:
                failed |= not await self._bring(self._replicas.pin, version)
            if version.digest not in self._pinned:
                await self._bring(self._replicas.unpin, version)
        if failed:
            await asyncio.sleep(self._retry_s)
            self._retry_s = later(self._retry_s)
        self._pinning = False

    async def _bring(self, bring: Callable[[Version], Awaitable[object]], version: Version) -> bool:
        try:
            await bring(version)
        except Exception as error:
            logger.warning("%s is not as it should be everywhere: %s", version.engine_name, error)
            return False
        return True

    def _start(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pinned(states: Sequence[ReplicaState], version: Version) -> bool:
    """Whether every replica keeps `version`."""
    return all(
        any(held.pinned and held.version.digest == version.digest for held in state.residents)
        for state in states
    )
