"""Following the registry: a new version is ready everywhere before its alias means it.

For each alias that moved, one task: resolve it, prepare the version on every replica, flip the
route, retire the old version. A version that cannot be prepared leaves the old one serving and is
tried again, later and later, until it works or the alias moves on. Which one is the old one, a
gateway that was started anew learns from the alias's history.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable

from manylora_gateway.config import FollowConfig
from manylora_gateway.errors import (
    CorruptAdapterError,
    GatewayError,
    UnservableError,
    WrongBaseError,
)
from manylora_gateway.metrics import Metrics
from manylora_gateway.replicas import Replicas
from manylora_gateway.retries import FIRST_RETRY_S, later
from manylora_gateway.rollouts import AliasKey
from manylora_gateway.routes import Routes
from manylora_registry import AdapterReference, Event, Registry, Version

AT_ONCE = 2
"""Versions that are prepared at once. A load of one that is prepared goes before those of clients:
if a replica, which has two places for loads at the least, always had another waiting, no client got
an adapter that is not loaded until all aliases that moved had been followed."""

logger = logging.getLogger(__name__)


class _SetBackError(Exception):
    """The registry does not have what it had."""


class Swaps:
    """Keeps `routes` in step with the registry. Lives on one event loop."""

    def __init__(
        self,
        registry: Registry,
        routes: Routes,
        replicas: Replicas,
        config: FollowConfig,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._registry = registry
        self._routes = routes
        self._replicas = replicas
        self._config = config
        # Aliases with a swap under way, to be told when they move again.
        self._moved: dict[AliasKey, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._preparing = asyncio.Semaphore(AT_ONCE)
        self._seen: Event | None = None

    async def begin(self, warm: int) -> None:
        """Serves the followed aliases as they are, `warm` of them loaded, and goes on following.

        Raises:
            RegistryError: the registry cannot be read.
        """
        # Events first, aliases second: what moves in between is seen twice, not missed.
        while events := await asyncio.to_thread(self._news):
            self._seen = events[-1]
        for adapter in await asyncio.to_thread(self._registry.adapters):
            for alias, target in adapter.targets.items():
                key = (adapter.name, alias)
                if alias not in self._config.aliases:
                    continue
                if warm <= 0 and self._routes.adopt(key, target):
                    continue
                # Where all slots are full, nothing waits for what has to be looked up.
                if warm <= 0 or not await self._serve(key, target):
                    self._wake(key)
                if (route := self._routes.get(key)) is not None and route.serving is not None:
                    warm -= 1
        self._start(self._follow())
        self._start(self._look_again())
        self._start(self._retire_displaced())

    async def close(self) -> None:
        """Ends following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self) -> None:
        readable = True
        while True:
            try:
                events = await asyncio.to_thread(self._news)
            except _SetBackError:
                logger.warning(
                    "the registry is not the one it was, as after a restore: all is looked at again"
                )
                self._start_over()
                events = []
            except Exception as error:
                if readable:
                    logger.warning("the registry cannot be read, serving goes on: %s", error)
                readable, events = False, []
            else:
                readable = True
                self._routes.registry_was_read()
            for event in events:
                self._note(event)
                self._seen = event
            if not events:
                await asyncio.sleep(self._config.poll_s)

    def _news(self) -> list[Event]:
        """The events since the last one that was seen.

        Raises:
            _SetBackError: that one is not there; a registry that was restored numbers what happens
                from then on as it did before.
            RegistryError: the registry cannot be read.
        """
        seen = self._seen
        if seen is None:
            return self._registry.events()
        events = self._registry.events(seen.sequence - 1)
        if events[:1] != [seen]:
            raise _SetBackError
        return events[1:]

    def _start_over(self) -> None:
        """Trusts nothing that was read before, and notes every event there is anew."""
        self._seen = None
        self._routes.registry_changed()
        self._routes.forget_fixed()
        for key in {*self._routes.aliases(), *self._moved}:
            self._wake(key)

    def _note(self, event: Event) -> None:
        if event.kind in ("yanked", "deleted", "alias_moved"):
            self._routes.registry_changed()
        if event.kind in ("yanked", "deleted"):
            self._routes.forget_fixed(f"{event.name}@")
            self._displace(self._routes.rollouts.end_with(event.name, event.version))
            # One that is looked up for the first time may be served as it was before.
            looked_up = [key for key in self._moved if key[0] == event.name]
            for key in {*self._routes.aliases(event.name), *looked_up}:
                if (withdrawn := self._routes.withdraw(key, event.version)) is not None:
                    logger.warning(
                        "%s: version %d was %s and is served no more",
                        "@".join(key),
                        event.version,
                        event.kind,
                    )
                    self._displace([*self._routes.rollouts.end(key), withdrawn])
                self._wake(key)
        elif event.kind == "alias_moved" and event.alias is not None:
            key = (event.name, event.alias)
            if event.alias in self._config.aliases or self._routes.get(key) is not None:
                self._wake(key)

    def _wake(self, key: AliasKey) -> None:
        """Has a task look at `key` from the start, beginning one if there is none."""
        if (moved := self._moved.get(key)) is not None:
            moved.set()
        else:
            moved = self._moved[key] = asyncio.Event()
            self._start(self._swap(key, moved))

    async def _swap(self, key: AliasKey, moved: asyncio.Event) -> None:
        delay = FIRST_RETRY_S
        while not await self._attempt(key) or moved.is_set():
            if not moved.is_set():
                try:
                    async with asyncio.timeout(delay):
                        await moved.wait()
                except TimeoutError:
                    delay = later(delay)
                    continue
            moved.clear()
            delay = FIRST_RETRY_S
        # No await since the last look at `moved`: nobody can set it unseen.
        del self._moved[key]

    async def _attempt(self, key: AliasKey) -> bool:
        """One try to serve what the registry's alias points at; says whether it is settled."""
        try:
            target = await self._routes.look_up(AdapterReference(*key))
            if self._routes.get(key) is None:
                await self._routes.adopt_earlier(key, target)
        except Exception as error:
            logger.warning("%s cannot be resolved: %s", "@".join(key), _why(error))
            return False
        return await self._serve(key, target)

    async def _serve(self, key: AliasKey, target: Version) -> bool:
        """One try to serve `target`; says whether nothing is left to do until the alias moves."""
        label = "@".join(key)
        before = self._routes.get(key)
        abandoned = [] if before is None or before.pending is None else [before.pending]
        route = self._routes.follow(key, target)
        self._displace(abandoned)
        if route.pending is None:
            self._displace(self._routes.rollouts.end_others(key, target))
            return True
        try:
            self._routes.check(target)
            await self._prepare(target)
        except Exception as error:
            looked = False
            if route.serving is None and isinstance(error, UnservableError | CorruptAdapterError):
                looked = await self._fall_back(key, target)
            foreign = looked and route.serving is None and isinstance(error, WrongBaseError)
            if str(error) != str(route.pending_error):
                still = "nothing" if route.serving is None else f"version {route.serving.number}"
                logger.log(
                    logging.INFO if foreign else logging.WARNING,
                    "%s: version %d cannot be served, %s goes on serving: %s",
                    label,
                    target.number,
                    still,
                    _why(error),
                    exc_info=None if isinstance(error, GatewayError) else error,
                )
            route.pending_error = error
            if not foreign:
                self._metrics.swaps.labels("failed").inc()
            # An adapter of another base is the business of a gateway over that base.
            return foreign
        if self._has_moved(key):
            # What was prepared may be withdrawn by now.
            return False
        old = self._routes.flip(key, target)
        ended = self._routes.rollouts.end_others(key, target)
        self._metrics.swaps.labels("served").inc()
        logger.info("%s serves version %d", label, target.number)
        self._displace(ended if old is None else [*ended, old])
        return True

    async def _prepare(self, version: Version) -> None:
        async with self._preparing:
            await self._replicas.prepare(version)

    def _has_moved(self, key: AliasKey) -> bool:
        """Whether its task was told so and has not looked yet."""
        return (moved := self._moved.get(key)) is not None and moved.is_set()

    async def _fall_back(self, key: AliasKey, target: Version) -> bool:
        """Serves the newest version before `target` that can be loaded.

        Says False where the alias's history could not be read.
        """
        try:
            for version in await self._routes.earlier(key, target):
                try:
                    await self._prepare(version)
                except (UnservableError, CorruptAdapterError) as error:
                    logger.debug("nor can %s: %s", version.engine_name, _why(error))
                    continue
                if self._has_moved(key):
                    self._displace([version])
                else:
                    self._routes.fall_back(key, version)
                break
        except Exception as error:
            logger.warning("%s: what it was before: %s", "@".join(key), _why(error))
            return False
        return True

    async def _look_again(self) -> None:
        while True:
            self._wake(await self._routes.doubted.get())

    def _displace(self, versions: Iterable[Version]) -> None:
        for version in versions:
            self._routes.displace(version)

    async def _retire_displaced(self) -> None:
        while True:
            version = await self._routes.displaced.get()
            # One that is served again meanwhile stays.
            if not self._routes.serves(version):
                self._metrics.forget(version)
                self._start(self._retire(version))

    async def _retire(self, version: Version) -> None:
        try:
            await self._replicas.retire(version)
        except Exception as error:
            # A replica that is gone holds nothing; one that stays forgets idle versions by itself.
            logger.warning("%s was not retired: %s", version.engine_name, error)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _why(error: Exception) -> object:
    """For the log; it has what no client is told."""
    return getattr(error, "detail", "") or error
