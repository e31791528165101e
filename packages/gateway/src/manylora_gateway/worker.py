"""What one replica does, without Ray around it: an engine, its pool, and adapters on disk."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from manylora_gateway.config import EngineConfig
from manylora_gateway.engine import Delta, Engine, Prompt, Sampling, TextPrompt, characters
from manylora_gateway.errors import (
    AdapterLoadError,
    GatewayError,
    RankTooHighError,
    YankedAdapterError,
    from_registry,
)
from manylora_gateway.fair import EVERYBODY, Share
from manylora_gateway.pool import AdapterPool
from manylora_gateway.replicas import ReplicaState
from manylora_gateway.timing import Stopwatch
from manylora_registry import Cache, Version
from manylora_registry.errors import RegistryError

TRIAL = TextPrompt("Hello")
"""Every version answers this once before it may serve."""

LONG_PROMPT = 16_384
"""Characters above which a prompt is tokenised beside the event loop: below, 10 ms at most."""

DIGEST_DIGITS = 64
"""A verified copy is a directory named after its version's digest."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Servable:
    """Which versions an engine can serve."""

    base_fingerprint: str
    max_rank: int

    def check(self, version: Version) -> None:
        """Raises UnservableError where `version` must not reach the engine."""
        try:
            version.require_base(self.base_fingerprint)
        except RegistryError as error:
            raise from_registry(error) from error
        if version.rank > self.max_rank:
            raise RankTooHighError(
                f"{version.name}@{version.number} has rank {version.rank}; this gateway takes up "
                f"to {self.max_rank} (engine.max_rank)."
            )
        if version.yanked or version.deleted:
            how = "deleted" if version.deleted else "yanked"
            raise YankedAdapterError(f"{version.name}@{version.number} was {how}.")


class Versions(Protocol):
    """What a worker needs of a registry."""

    def hold(self, version: Version, cache: Cache) -> AbstractContextManager[Path]:
        """See `Registry.hold`."""
        ...


class Worker:
    """One engine with its adapters. Lives on one event loop.

    Args:
        replica_id: unique among the replicas of the gateway.
        cache: verified copies of versions; replicas of one machine share it.
    """

    def __init__(
        self,
        replica_id: str,
        engine: Engine,
        registry: Versions,
        cache: Cache,
        servable: Servable,
        config: EngineConfig,
    ) -> None:
        self._replica_id = replica_id
        self._engine = engine
        self._registry = registry
        self._cache = cache
        self._servable = servable
        self._slots = config.slots
        # One thread: many long prompts queue for it and take no more than a core.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        # When the load of each adapter that is in the engine began and ended, by digest.
        self._loads: dict[str, tuple[float, float]] = {}
        # What the engine calls each: equal files published under two names are one adapter.
        self._names: dict[str, str] = {}
        # Copies on disk of the adapters that are in the engine, which may read them again.
        self._held: dict[str, ExitStack] = {}
        self._pool = AdapterPool(
            self._load,
            self._unload,
            slots=config.slots,
            capacity=max(config.host_adapters, config.slots + 1),
            seats=config.max_concurrent,
            express=config.express_seats,
            turn_s=config.turn_s,
        )

    async def generate(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        version: Version | None,
        share: Share = EVERYBODY,
    ) -> AsyncGenerator[Delta, None]:
        """Waits for a seat and the adapter, then generates.

        Raises:
            GatewayError: the prompt is refused, or the adapter cannot be loaded.
        """
        token_ids = await self._tokenize(prompt)
        stopwatch = Stopwatch(sampling.n)
        most = len(token_ids) + sampling.max_tokens * sampling.n
        async with self._pool.hold(version, share, most) as seat:
            stopwatch.seated(None if version is None else self._loads.get(version.digest))
            seat.used = len(token_ids)
            name = None if version is None else self._names[version.digest]
            generation = self._engine.generate(request_id, token_ids, sampling, name, seat.priority)
            unsaid = len(token_ids)
            async with aclosing(generation) as deltas:
                async for delta in deltas:
                    seat.used += len(delta.token_ids)
                    timed = stopwatch.timed(delta)
                    yield replace(timed, prompt_tokens=unsaid) if unsaid else timed
                    unsaid = 0

    async def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of `prompt` as the engine reads it."""
        return len(await self._tokenize(prompt))

    async def _tokenize(self, prompt: Prompt) -> list[int]:
        """A long prompt takes its time (half a second for a mebibyte), the others go on."""
        if characters(prompt) < LONG_PROMPT:
            return self._engine.tokenize(prompt)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, self._engine.tokenize, prompt)

    async def prepare(self, version: Version) -> None:
        """Loads `version`, if it is not loaded, and tries it."""
        await self._pool.prepare(version)

    async def pin(self, version: Version) -> None:
        """Loads `version` and keeps it loaded."""
        await self._pool.pin(version)

    def unpin(self, version: Version) -> bool:
        """Ends a pin; says whether there was one."""
        return self._pool.unpin(version)

    def retire(self, version: Version) -> bool:
        """Unloads `version` once drained; says whether it was loaded."""
        return self._pool.retire(version)

    def state(self) -> ReplicaState:
        """What this replica holds and does now."""
        return ReplicaState(
            self._replica_id,
            self._slots,
            self._pool.requests,
            tuple(self._pool.residents()),
            self._pool.waiting,
            self._pool.counts,
            self._on_disk(),
        )

    def _on_disk(self) -> int:
        directory = self._cache.directory
        if not directory.is_dir():
            return 0
        return sum(len(entry.name) == DIGEST_DIGITS for entry in directory.iterdir())

    def check_health(self) -> None:
        """Raises once the engine cannot recover."""
        self._engine.check_health()

    async def close(self) -> None:
        """Ends loads under way, then the engine."""
        await self._pool.settle()
        await self._engine.close()
        self._tokenizing.shutdown(wait=False)
        for held in self._held.values():
            held.close()

    async def _load(self, version: Version) -> None:
        began = time.monotonic()
        self._servable.check(version)
        held = ExitStack()
        try:
            directory = await asyncio.to_thread(self._hold, held, version)
            await self._engine.load(version.engine_name, directory)
            try:
                await self._try(version)
            except Exception as error:
                await self._engine.unload(version.engine_name)
                if isinstance(error, GatewayError):
                    raise
                raise AdapterLoadError(
                    f"{version.name}@{version.number} failed its trial prompt."
                ) from error
        except BaseException:
            await asyncio.to_thread(held.close)
            raise
        self._held[version.digest] = held
        self._loads[version.digest] = (began, time.monotonic())
        self._names[version.digest] = version.engine_name
        logger.info("loaded %s in %.2f s", version.engine_name, time.monotonic() - began)

    def _hold(self, held: ExitStack, version: Version) -> Path:
        """A verified copy of `version`, which stays until `held` is closed."""
        try:
            return held.enter_context(self._registry.hold(version, self._cache))
        except RegistryError as error:
            raise from_registry(error) from error

    async def _try(self, version: Version) -> None:
        """One token through the adapter: what vLLM accepts it may still fail to run."""
        trial = self._engine.generate(
            f"trial-{version.engine_name}",
            self._engine.tokenize(TRIAL),
            Sampling(max_tokens=1),
            version.engine_name,
        )
        async with aclosing(trial) as deltas:
            async for _ in deltas:
                pass

    async def _unload(self, version: Version) -> None:
        self._loads.pop(version.digest, None)
        self._names.pop(version.digest, None)
        await self._engine.unload(version.engine_name)
        if (held := self._held.pop(version.digest, None)) is not None:
            await asyncio.to_thread(held.close)
        logger.info("unloaded %s", version.engine_name)
