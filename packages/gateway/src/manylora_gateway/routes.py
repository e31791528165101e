"""What an adapter reference means now, and who still uses which version.

A reference becomes a version once, when its request is admitted, and counts as a use of that
version until the request has ended. An alias that is followed resolves here, not in the registry:
it goes on meaning the version that was served until its successor is ready.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import dropwhile

from manylora_gateway.errors import (
    RegistryLostError,
    UnservableError,
    YankedAdapterError,
    from_registry,
)
from manylora_gateway.rollouts import AliasKey, Rollout, Rollouts
from manylora_gateway.worker import Servable
from manylora_registry import AdapterReference, Registry, Version
from manylora_registry.errors import RegistryError

FIXED_REFERENCES_KEPT = 4096


@dataclass
class Route:
    """One followed alias."""

    serving: Version | None = None
    """What requests get; None until its first version is ready, and where that was yanked."""
    pending: Version | None = None
    """What the registry's alias points at, where that is not served yet."""
    pending_error: Exception | None = None
    """Why `pending` could not be loaded at the last try."""
    tried: bool = False
    """Whether `serving` was loaded everywhere before it came to be served."""


class Routes:
    """The table of followed aliases and the count of uses. Lives on one event loop."""

    def __init__(
        self,
        registry: Registry,
        servable: Servable,
        rollouts: Rollouts | None = None,
        max_stale_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.displaced: asyncio.Queue[Version] = asyncio.Queue()
        """Versions to unload: each when nothing serves it any more, and when its last use ends."""
        self.doubted: asyncio.Queue[AliasKey] = asyncio.Queue()
        """Aliases to look at again: what they served untried could not be loaded."""
        self.rollouts = rollouts or Rollouts()
        self._max_stale_s = max_stale_s
        self._clock = clock
        self._read_at = clock()
        self._registry = registry
        self._servable = servable
        self._routes: dict[AliasKey, Route] = {}
        self._uses: dict[str, int] = {}
        self._draining: set[str] = set()
        # Numbers and digests never change their meaning; a busy client costs one look-up.
        self._fixed: OrderedDict[str, Version] = OrderedDict()
        self._changes = 0

    @property
    def registry_age_s(self) -> float:
        """Seconds since the registry was last read."""
        return self._clock() - self._read_at

    def registry_was_read(self) -> None:
        """What references mean is up to date."""
        self._read_at = self._clock()

    @asynccontextmanager
    async def use(
        self, reference: str, sticky: Callable[[], str] = str
    ) -> AsyncGenerator[Version | None, None]:
        """The version `reference` means, counted as used while the context lasts.

        None for the empty reference, the bare base. In a rollout, which alone asks for it,
        requests with equal `sticky` get the same version.

        Raises:
            GatewayError: it names nothing, or a version that cannot be served.
        """
        if not reference:
            yield None
            return
        version = await self.resolve(reference, sticky)
        # No await between the look-up in the table and this count: a swap sees the use.
        self._uses[version.digest] = self._uses.get(version.digest, 0) + 1
        try:
            yield version
        finally:
            self._uses[version.digest] -= 1
            if not self._uses[version.digest]:
                del self._uses[version.digest]
                if version.digest in self._draining:
                    self._draining.remove(version.digest)
                    self.displaced.put_nowait(version)

    async def resolve(self, reference: str, sticky: Callable[[], str] = str) -> Version:
        """The servable version `reference` means now; its alias, if any, is followed from here on.

        Raises:
            GatewayError: it names nothing, or a version that cannot be served.
        """
        parsed = _parsed(reference)
        if self.registry_age_s > self._max_stale_s:
            raise RegistryLostError(
                f"The registry has not been read for {self.registry_age_s:.0f} s; what references "
                "mean may have changed."
            )
        if parsed.alias is None:
            return await self._resolve_fixed(parsed)
        key = (parsed.name, parsed.alias)
        serving = await self.serving(key)
        rollout = self.rollouts.get(key, serving)
        return serving if rollout is None else rollout.choose(serving, key, sticky())

    async def identify(self, reference: str) -> Version:
        """The version `reference` means now, servable or not: to let go of it.

        Raises:
            GatewayError: it names nothing.
        """
        parsed = _parsed(reference)
        if parsed.alias is None:
            return self._fixed.get(str(parsed)) or await self.look_up(parsed)
        return await self.serving((parsed.name, parsed.alias))

    async def serving(self, key: AliasKey) -> Version:
        """What an alias means here by itself; it is followed from here on.

        Raises:
            GatewayError: it is not there, or what it points at cannot be served.
        """
        while (route := self._routes.get(key)) is None:
            changes = self._changes
            found = await self._first_look(key)
            # What was read before a change and arrives after it is asked again: nobody follows
            # the alias yet, so nobody else would.
            if changes == self._changes:
                self._routes.setdefault(key, found)
        if route.serving is not None:
            return route.serving
        if route.pending_error is not None:
            # One error for many requests: each raise would lengthen its traceback for good.
            raise route.pending_error.with_traceback(None)
        assert route.pending is not None
        # Not one that was withdrawn, while it is looked up what there was before it.
        self.check(route.pending)
        return route.pending

    async def _first_look(self, key: AliasKey) -> Route:
        target = await self.look_up(AdapterReference(*key))
        try:
            self.check(target)
        except UnservableError as error:
            for version in await self.earlier(key, target):
                return Route(version, target, error)
            raise
        return Route(target)

    async def earlier(self, key: AliasKey, target: Version) -> list[Version]:
        """What `key` came by to `target`, newest first, as far as it may be served.

        One that was rolled back from is not among it. A withdrawn one is the end: whoever
        withdrew it did not ask for the one before.

        Raises:
            GatewayError: the registry cannot be read.
        """
        try:
            came = await asyncio.to_thread(self._registry.way, *key)
        except RegistryError as error:
            raise from_registry(error) from error
        found: list[Version] = []
        # It may have moved on since.
        for version in dropwhile(lambda each: each.number != target.number, reversed(came)):
            if version.yanked or version.deleted:
                break
            if version.number != target.number:
                with suppress(UnservableError):
                    self.check(version)
                    found.append(version)
        return found

    def rollout(self, reference: str) -> tuple[AliasKey, Rollout] | None:
        """The rollout of the alias that `reference` names, if there is one."""
        if not reference:
            return None
        parsed = AdapterReference.parse(reference)
        if parsed.alias is None:
            return None
        key = (parsed.name, parsed.alias)
        route = self._routes.get(key)
        found = None if route is None else self.rollouts.get(key, route.serving)
        return None if found is None else (key, found)

    def served(self) -> list[Version]:
        """The versions that aliases and rollouts serve, each once."""
        found: dict[str, Version] = {}
        for key, route in self._routes.items():
            if route.serving is not None:
                found[route.serving.digest] = route.serving
                if (rollout := self.rollouts.get(key, route.serving)) is not None:
                    found.update((version.digest, version) for version in rollout.versions)
        return list(found.values())

    async def _resolve_fixed(self, reference: AdapterReference) -> Version:
        text = str(reference)
        version = self._fixed.get(text)
        if version is None:
            changes = self._changes
            version = await self.look_up(reference)
            self.check(version)
            # What was read before a withdrawal and arrives after it must not be kept.
            if changes == self._changes:
                self._fixed[text] = version
            if len(self._fixed) > FIXED_REFERENCES_KEPT:
                self._fixed.popitem(last=False)
        return version

    async def look_up(self, reference: AdapterReference) -> Version:
        """What the registry says `reference` is now, servable or not.

        Raises:
            GatewayError: it names nothing, or the registry cannot be read.
        """
        try:
            return await asyncio.to_thread(self._registry.find, reference)
        except RegistryError as error:
            raise from_registry(error) from error

    def check(self, version: Version) -> None:
        """Raises UnservableError where `version` must not reach an engine."""
        self._servable.check(version)

    def registry_changed(self) -> None:
        """An alias moved or a version was withdrawn: what is being read may be old."""
        self._changes += 1

    def forget_fixed(self, prefix: str = "") -> None:
        """Drops what references to numbers and digests resolved to, of those that begin so."""
        for text in [text for text in self._fixed if text.startswith(prefix)]:
            del self._fixed[text]

    def get(self, key: AliasKey) -> Route | None:
        """The route of a followed alias."""
        return self._routes.get(key)

    def follow(self, key: AliasKey, target: Version) -> Route:
        """The route of an alias that should come to serve `target`; made if there is none."""
        route = self._routes.setdefault(key, Route())
        if route.serving is None or route.serving.digest != target.digest:
            if route.pending is None or route.pending.digest != target.digest:
                # Of the version before.
                route.pending_error = None
            route.pending = target
        else:
            route.pending = route.pending_error = None
        return route

    def aliases(self, name: str | None = None) -> list[AliasKey]:
        """The followed aliases, of one adapter or of all."""
        return [key for key in self._routes if name in (None, key[0])]

    def withdraw(self, key: AliasKey, number: int) -> Version | None:
        """Has `key` serve nothing, if it serves version `number`, which it returns then."""
        route = self._routes.get(key)
        if route is None or route.serving is None or route.serving.number != number:
            return None
        serving, route.serving = route.serving, None
        if route.pending is None:
            route.pending_error = YankedAdapterError(f"{serving.name}@{number} was yanked.")
        return serving

    def adopt(self, key: AliasKey, target: Version) -> bool:
        """Has an alias that nobody followed mean `target`; says False where it is unservable."""
        try:
            self.check(target)
        except UnservableError:
            return False
        self._routes.setdefault(key, Route(target))
        return True

    async def adopt_earlier(self, key: AliasKey, target: Version) -> None:
        """Has an alias that nobody followed mean what it meant before a `target` that may not be.

        Raises:
            GatewayError: the registry cannot be read.
        """
        changes = self._changes
        try:
            self.check(target)
        except UnservableError:
            for version in await self.earlier(key, target):
                if changes == self._changes:
                    self._routes.setdefault(key, Route(version, target))
                return

    def flip(self, key: AliasKey, version: Version) -> Version | None:
        """From here on `key` means `version`; returns what it meant before."""
        before = self._routes[key].serving
        self._routes[key] = Route(version, tried=True)
        return before

    def fall_back(self, key: AliasKey, version: Version) -> None:
        """From here on `key`, which serves nothing, means `version` until what is pending works."""
        route = self._routes[key]
        route.serving, route.tried = version, True

    def doubt(self, version: Version) -> None:
        """Has the aliases that came to serve `version` untried, which was not loaded, try it."""
        for key, route in self._routes.items():
            serving = route.serving
            if serving is not None and serving.digest == version.digest and not route.tried:
                route.serving, route.pending = None, route.pending or version
                self.doubted.put_nowait(key)

    def serves(self, version: Version) -> bool:
        """Whether an alias or a rollout serves `version`, or an alias is about to."""
        return self.rollouts.serve(version.digest) or any(
            each is not None and each.digest == version.digest
            for route in self._routes.values()
            for each in (route.serving, route.pending)
        )

    def displace(self, version: Version) -> None:
        """Has `version` unloaded, unless something serves it.

        As far as its requests have ended, now; and again when the last of them has, since those
        on their way to a replica may bring it back.
        """
        if self.serves(version):
            return
        if version.digest in self._uses:
            self._draining.add(version.digest)
        self.displaced.put_nowait(version)


def _parsed(reference: str) -> AdapterReference:
    try:
        return AdapterReference.parse(reference)
    except RegistryError as error:
        raise from_registry(error) from error
