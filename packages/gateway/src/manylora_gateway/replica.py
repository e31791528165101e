"""The engine replica as Ray Serve runs it: a thin shell around a Worker."""

import os
from collections.abc import AsyncGenerator
from pathlib import Path

from ray import serve

from manylora_gateway.config import GatewayConfig
from manylora_gateway.engine import Delta, Prompt, Sampling
from manylora_gateway.environment import engine_environment
from manylora_gateway.replicas import ReplicaState
from manylora_gateway.worker import Servable, Worker
from manylora_registry import Registry, Version


class EngineReplica:
    """One engine. Serve starts it in a process of its own and again when it dies.

    It begins empty: what is asked of it loads on demand, and the next swap is prepared on it too.

    Args:
        cache: directory for verified copies of versions.
        gpus: GPUs of this replica; 0 runs on the CPU.
    """

    async def __init__(
        self, config: GatewayConfig, servable: Servable, cache: Path, gpus: int
    ) -> None:
        os.environ.update(engine_environment(config.engine))
        # vLLM reads the environment when it is imported.
        from manylora_gateway.vllm_engine import VllmEngine

        self._registry = Registry.open(config.registry)
        engine = VllmEngine(config.base, config.engine, gpus)
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._worker = Worker(replica_id, engine, self._registry, cache, servable, config.engine)

    async def generate(
        self, request_id: str, prompt: Prompt, sampling: Sampling, version: Version | None
    ) -> AsyncGenerator[Delta, None]:
        """See Worker."""
        async for delta in self._worker.generate(request_id, prompt, sampling, version):
            yield delta

    async def count_tokens(self, prompt: Prompt) -> int:
        """See Worker."""
        return self._worker.count_tokens(prompt)

    async def prepare(self, version: Version) -> None:
        """See Worker."""
        await self._worker.prepare(version)

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
        self._registry.close()
