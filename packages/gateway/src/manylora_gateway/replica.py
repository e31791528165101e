"""The engine replica as Ray Serve runs it: a thin shell around a Worker."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, aclosing
from pathlib import Path

from ray import serve

from manylora_gateway import tracing
from manylora_gateway.config import EngineConfig, GatewayConfig
from manylora_gateway.deltas import DeltaSender, FrontAddress
from manylora_gateway.engine import Engine, Prompt, Sampling
from manylora_gateway.environment import engine_environment
from manylora_gateway.errors import ReplicaLostError
from manylora_gateway.fair import Share
from manylora_gateway.replicas import ReplicaState
from manylora_gateway.worker import Servable, Worker
from manylora_registry import Cache, Registry, Version

MakeEngine = Callable[[Path, EngineConfig, int], Engine]
"""Makes an engine from the base's directory and a number of GPUs."""

logger = logging.getLogger(__name__)


def vllm_engine(base: Path, config: EngineConfig, gpus: int) -> Engine:
    """The engine of production."""
    # It reads the environment of the replica when it is imported.
    from manylora_gateway.vllm_engine import VllmEngine

    return VllmEngine(base, config, gpus)


class LazyRegistry:
    """A registry that is opened when it is first needed.

    A replica that is started while the registry is away serves what is on disk, and must not
    make a new registry in its place.
    """

    def __init__(self, location: Path | None) -> None:
        self._location = location
        self._opening = threading.Lock()
        self._registry: Registry | None = None

    def hold(self, version: Version, cache: Cache) -> AbstractContextManager[Path]:
        """See `Registry.hold`."""
        with self._opening:
            if self._registry is None:
                self._registry = Registry.open(self._location, create=False)
        return self._registry.hold(version, cache)

    def close(self) -> None:
        """Closes it."""
        if self._registry is not None:
            self._registry.close()


class EngineReplica:
    """One engine. Serve starts it in a process of its own and again when it dies.

    It begins empty: what is asked of it loads on demand, and the next swap is prepared on it too.

    Args:
        cache: verified copies of versions.
        gpus: GPUs of this replica; 0 runs on the CPU.
        make_engine: makes the engine in the replica's process.
    """

    async def __init__(
        self,
        config: GatewayConfig,
        servable: Servable,
        cache: Cache,
        gpus: int,
        make_engine: MakeEngine,
    ) -> None:
        os.environ.update(engine_environment(config.engine))
        tracing.configure(config.tracing, "manylora-replica")
        self._registry = LazyRegistry(config.registry)
        engine_config = config.engine.on(gpus)
        engine = make_engine(config.base, engine_config, gpus)
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._worker = Worker(replica_id, engine, self._registry, cache, servable, engine_config)
        self._senders: dict[FrontAddress, DeltaSender] = {}
        self._connecting = asyncio.Lock()

    async def generate(
        self,
        to: FrontAddress,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        *,
        version: Version | None,
        share: Share,
        traceparent: str,
    ) -> None:
        """See Worker; the deltas go to the front that asks."""
        sender = await self._sender(to)
        span = tracing.begin("manylora.replica.generate", traceparent)
        tracing.describe(span, request_id, version)
        deltas = self._worker.generate(request_id, prompt, sampling, version, share)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    await sender.send(request_id, delta)
            await sender.send(request_id, None)
        except ReplicaLostError:
            self._end_with_the_engine()
            raise
        finally:
            span.end()

    def _end_with_the_engine(self) -> None:
        """Ends this process if its engine is dead, as a replica that is killed ends.

        Until Serve has seen three checks of health fail it would go on sending requests here, and
        as an adapter has a home, those that are tried once more too.
        """
        try:
            self._worker.check_health()
        except ReplicaLostError:
            logger.error("the engine died, and its replica with it")
            os._exit(1)

    async def _sender(self, to: FrontAddress) -> DeltaSender:
        async with self._connecting:
            sender = self._senders.get(to)
            if sender is None or not sender.open:
                sender = self._senders[to] = await DeltaSender.connect(to)
            return sender

    async def count_tokens(self, prompt: Prompt) -> int:
        """See Worker."""
        return await self._worker.count_tokens(prompt)

    async def prepare(self, version: Version) -> None:
        """See Worker."""
        await self._worker.prepare(version)

    async def pin(self, version: Version) -> None:
        """See Worker."""
        await self._worker.pin(version)

    async def unpin(self, version: Version) -> bool:
        """See Worker."""
        return self._worker.unpin(version)

    async def retire(self, version: Version) -> bool:
        """See Worker."""
        return self._worker.retire(version)

    async def state(self) -> ReplicaState:
        """See Worker."""
        return self._worker.state()

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        self._worker.check_health()

    async def __del__(self) -> None:
        """Awaited by Serve when it takes the replica down."""
        await self._worker.close()
        for sender in self._senders.values():
            sender.close()
        self._registry.close()
        await tracing.end()
