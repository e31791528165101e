"""What operators ask for: load, pin, drain, and how requests are divided among versions."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from manylora_gateway.admission import Admission
from manylora_gateway.cutoff import CutOff
from manylora_gateway.errors import (
    DrainingError,
    InvalidRequestError,
    UnknownAdapterError,
    UnservableError,
    Violation,
    YankedAdapterError,
)
from manylora_gateway.fleet import Fleet
from manylora_gateway.metrics import Metrics
from manylora_gateway.replicas import Replicas, ReplicaState
from manylora_gateway.retries import FIRST_RETRY_S, later
from manylora_gateway.rollouts import (
    AliasKey,
    Division,
    Rollout,
    Rollouts,
    Share,
    check_division,
)
from manylora_gateway.routes import Routes
from manylora_registry import AdapterReference, Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutState:
    """How the requests for an alias are divided now."""

    key: AliasKey
    serving: Version | None
    """What the alias means by itself; None: nothing of it can be served."""
    rollout: Rollout | None

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each version gets."""
        divided = self.rollout.shares if self.rollout is not None else ()
        return divided or (() if self.serving is None else (Share(self.serving, 100),))


class Operations:
    """Acts on all replicas. Lives on one event loop."""

    def __init__(
        self,
        routes: Routes,
        replicas: Replicas,
        rollouts: Rollouts,
        admission: Admission,
        fleet: Fleet,
        metrics: Metrics,
        drain_s: float,
    ) -> None:
        self.metrics = metrics
        self.rollouts = rollouts
        self._routes = routes
        self._replicas = replicas
        self._admission = admission
        self._fleet = fleet
        self._drain_s = drain_s
        self._setting = asyncio.Lock()
        # Why saved rollouts could not be set again, as far as the log says.
        self._told: set[str] = set()
        self._restoring: asyncio.Task[None] | None = None
        # Not admission's: answers to clients are still written when the last request has left.
        self._answering = CutOff(
            lambda: DrainingError("The gateway ended before what was asked was done.")
        )

    def until_cut_off(self) -> AbstractAsyncContextManager[None]:
        """Around what answers an operator, which the gateway's end ends in our words."""
        return self._answering.around()

    async def states(self) -> list[ReplicaState]:
        """Every replica and what it holds."""
        return list(await self._replicas.states())

    async def load(self, reference: str) -> Version:
        """Loads what `reference` means on every replica.

        Raises:
            GatewayError: it names nothing, or cannot be loaded.
        """
        async with self._routes.use(reference) as version:
            assert version is not None
            await self._replicas.prepare(version)
            return version

    async def unload(self, reference: str) -> tuple[Version, int]:
        """Unloads what `reference` means once drained; says on how many replicas it was.

        Raises:
            GatewayError: it names nothing.
        """
        version = await self._routes.identify(reference)
        return version, await self._replicas.retire(version)

    async def pin(self, reference: str, *, release: bool) -> Version:
        """Keeps what `reference` means loaded on every replica, or lets it go.

        Raises:
            GatewayError: it names nothing, cannot be loaded, or too many are pinned.
        """
        if release:
            version = await self._routes.identify(reference)
            await self._fleet.unpin(version)
            return version
        async with self._routes.use(reference) as version:
            assert version is not None
            await self._fleet.pin(version)
            return version

    async def drain(self, timeout_s: float | None) -> int:
        """Takes no new requests and waits for those inside; says how many are left.

        Raises:
            InvalidRequestError: the timeout is negative; nothing has changed.
        """
        if timeout_s is not None and timeout_s < 0:
            raise InvalidRequestError([Violation("timeout", "must not be negative")])
        await self._fleet.announce_end()
        try:
            async with asyncio.timeout(self._drain_s if timeout_s is None else timeout_s):
                await self._admission.drain()
        except TimeoutError:
            logger.warning("%d requests still run", self._admission.inside)
        return self._admission.inside

    async def rollout(self, key: AliasKey) -> RolloutState:
        """How requests for an alias are divided.

        Raises:
            GatewayError: there is no such alias, or nothing of it can be served.
        """
        serving = await self._routes.serving(key)
        return RolloutState(key, serving, self.rollouts.get(key, serving))

    async def set_rollout(
        self, key: AliasKey, shares: Division, shadow: tuple[int, int] | None
    ) -> RolloutState:
        """Divides the requests for an alias, once every version is loaded on every replica.

        Without shares and shadow the division ends, whatever can be served.

        Raises:
            InvalidRequestError: the shares are no division.
            GatewayError: a version is not there or cannot be served; nothing has changed.
        """
        check_division(shares, shadow)
        async with self._setting:
            if not shares and shadow is None:
                return await self._clear(key)
            return await self._set(key, shares, shadow)

    async def _clear(self, key: AliasKey) -> RolloutState:
        try:
            serving = await self._routes.serving(key)
        except UnknownAdapterError:
            raise
        except Exception:
            # Whatever is wrong with it: this only takes away.
            serving = None
        self._put(key, Rollout(under="", shares=()))
        return RolloutState(key, serving, None)

    async def _set(
        self, key: AliasKey, shares: Division, shadow: tuple[int, int] | None
    ) -> RolloutState:
        serving = await self._routes.serving(key)
        rollout = Rollout(
            under=serving.digest,
            shares=tuple([await self._share(key, *share) for share in shares]),
            shadow=None if shadow is None else await self._share(key, *shadow),
        )
        for version in rollout.versions:
            await self._replicas.prepare(version)
        # Rollouts end with their versions, but this one was not among them while it loaded.
        for version in rollout.versions:
            await self._routes.resolve(f"{version.name}@{version.number}")
        if (await self._routes.serving(key)).digest != serving.digest:
            text = "moved while the versions were loaded: look at it and set it again"
            raise InvalidRequestError([Violation("alias", text)])
        self._put(key, rollout)
        return await self.rollout(key)

    def _put(self, key: AliasKey, rollout: Rollout) -> None:
        before = self.rollouts.put(key, rollout)
        logger.info("%s is divided: %s", "@".join(key), _told(rollout))
        for version in [] if before is None else before.versions:
            self._routes.displace(version)

    async def begin(self) -> None:
        """Sets the rollouts again that were saved, as far as their aliases have not moved.

        One that cannot be set yet is tried again, later and later, until it can or is over.
        """
        self.rollouts.read()
        await self._set_again()
        self._restoring = asyncio.create_task(self._restore())

    async def close(self) -> None:
        """Ends what operators wait for, and trying."""
        self._answering.end()
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.gather(self._restoring, return_exceptions=True)

    async def _restore(self) -> None:
        delay = FIRST_RETRY_S
        while self.rollouts.unset():
            await asyncio.sleep(delay)
            delay = later(delay)
            await self._set_again()

    async def _set_again(self) -> None:
        for entry in self.rollouts.unset():
            async with self._setting:
                # An operator may have set another one meanwhile, or none.
                if entry not in self.rollouts.unset():
                    continue
                key = (entry["adapter"], entry["alias"])
                try:
                    await self._set_saved(key, entry)
                except YankedAdapterError as error:
                    logger.warning("%s: its rollout is over: %s", "@".join(key), error)
                    self.rollouts.end(key)
                except Exception as error:
                    # Whatever it is, requests get what their alias serves.
                    if (text := f"{entry}: {error}") not in self._told:
                        self._told.add(text)
                        logger.error("a saved rollout cannot be set again yet: %s", text)

    async def _set_saved(self, key: AliasKey, entry: dict[str, Any]) -> None:
        target = await self._routes.look_up(AdapterReference(*key))
        if target.digest != entry["under"]:
            logger.info("%s has moved: its rollout is over", "@".join(key))
            self.rollouts.end(key)
            return
        serving = await self._routes.serving(key)
        if serving.digest != target.digest:
            # The alias fell back behind what it points at.
            raise UnservableError(f"version {target.number} is not served")
        shares = [(share["version"], share["percent"]) for share in entry["shares"]]
        shadow = entry["shadow"]
        await self._set(key, shares, shadow and (shadow["version"], shadow["percent"]))

    async def _share(self, key: AliasKey, number: int, percent: int) -> Share:
        return Share(await self._routes.resolve(f"{key[0]}@{number}"), percent)


def _told(rollout: Rollout) -> str:
    shares = [f"version {share.version.number} {share.percent} %" for share in rollout.shares]
    if rollout.shadow is not None:
        shares.append(f"copies to {rollout.shadow.version.number} {rollout.shadow.percent} %")
    return ", ".join(shares) or "no more"
