"""A gateway in one process: real registry, real gRPC, real pool, and readable engines."""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from safetensors.numpy import save_file

from manylora.admin.v1 import admin_pb2_grpc
from manylora.inference.v1 import inference_pb2 as pb
from manylora.inference.v1 import inference_pb2_grpc
from manylora_gateway.access import Access
from manylora_gateway.admission import Admission
from manylora_gateway.config import (
    EngineConfig,
    FollowConfig,
    LimitsConfig,
    ListenConfig,
    TlsConfig,
)
from manylora_gateway.engine import Delta, Prompt, Sampling
from manylora_gateway.errors import ReplicaLostError
from manylora_gateway.fair import EVERYBODY, Share
from manylora_gateway.fleet import Fleet
from manylora_gateway.front import Front
from manylora_gateway.inference import Inference
from manylora_gateway.limits import Limits
from manylora_gateway.metrics import Metrics
from manylora_gateway.operations import Operations
from manylora_gateway.replicas import ReplicaState
from manylora_gateway.rollouts import Rollouts
from manylora_gateway.routes import Routes
from manylora_gateway.swaps import Swaps
from manylora_gateway.tls import ServerTls
from manylora_gateway.worker import Servable, Worker
from manylora_registry import BaseModelIdentity, Cache, Registry, Version
from tests.unit.gateway.fake_engine import MAX_CONTEXT, FakeEngine

MODULE = "model.layers.0.self_attn.q_proj"
BASE = BaseModelIdentity("sha256:" + "b" * 64, {f"{MODULE}.weight": (4, 4)})
OTHER_BASE = BaseModelIdentity("sha256:" + "c" * 64, {f"{MODULE}.weight": (4, 4)})
BASE_NAME = "tiny"
MAX_RANK = 8


def publish(
    registry: Registry,
    directory: Path,
    name: str,
    seed: int,
    *,
    rank: int = 2,
    base: BaseModelIdentity = BASE,
) -> Version:
    """One tiny random version of `name`."""
    source = directory / f"{name}-{seed}"
    source.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": rng.random((rank, 4), dtype=np.float32),
        f"base_model.model.{MODULE}.lora_B.weight": rng.random((4, rank), dtype=np.float32),
    }
    save_file(tensors, source / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "bias": "none",
        "base_model_name_or_path": base.fingerprint,
    }
    (source / "adapter_config.json").write_text(json.dumps(config))
    return registry.publish(name, source, base=base)


class LocalReplicas:
    """Workers of this process; a request goes to the least busy one."""

    def __init__(self, make: Callable[[int], tuple[FakeEngine, Worker]], count: int) -> None:
        self._make = make
        made = [make(index) for index in range(count)]
        self.engines = [engine for engine, _ in made]
        self._workers = [worker for _, worker in made]
        self.lost = False
        """Nobody answers."""
        self.traceparents: list[str] = []

    async def restart(self, index: int) -> FakeEngine:
        """Puts a new replica in the place of one."""
        await self._workers[index].close()
        number = len(self._workers) + index
        self.engines[index], self._workers[index] = self._make(number)
        return self.engines[index]

    async def close(self) -> None:
        for worker in self._workers:
            await worker.close()

    async def generate(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        version: Version | None,
        share: Share = EVERYBODY,
        traceparent: str = "",
    ) -> AsyncGenerator[Delta, None]:
        self.traceparents.append(traceparent)
        worker = min(self._workers, key=lambda worker: worker.state().requests)
        deltas = worker.generate(request_id, prompt, sampling, version, share)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def count_tokens(self, prompt: Prompt) -> int:
        return await self._workers[0].count_tokens(prompt)

    async def prepare(self, version: Version) -> None:
        await asyncio.gather(*(worker.prepare(version) for worker in self._workers))

    async def pin(self, version: Version) -> None:
        await asyncio.gather(*(worker.pin(version) for worker in self._workers))

    async def unpin(self, version: Version) -> int:
        return sum(worker.unpin(version) for worker in self._workers)

    async def retire(self, version: Version) -> int:
        return sum(worker.retire(version) for worker in self._workers)

    async def states(self) -> list[ReplicaState]:
        if self.lost:
            raise ReplicaLostError("Nobody answers.")
        return [worker.state() for worker in self._workers]


@dataclass
class RunningGateway:
    """What a test holds of a gateway."""

    registry: Registry
    engines: list[FakeEngine]
    inference: "inference_pb2_grpc.InferenceServiceAsyncStub"
    admin: "admin_pb2_grpc.AdminServiceAsyncStub"
    front: Front
    admission: Admission
    metrics: Metrics
    fleet: Fleet
    replicas: LocalReplicas
    core: Inference
    operations: Operations
    routes: Routes
    registry_location: Path

    @property
    def http(self) -> str:
        """Where OpenAI's API is."""
        return f"http://{self.front.addresses['http']}"

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    async def until_serving(self, alias: str, number: int) -> None:
        """Until requests for `alias` (NAME@ALIAS) get version `number`."""
        async for entry in self._listings(alias):
            if entry.serving.number == number:
                return

    async def until_failed(self, alias: str) -> pb.AliasListing:
        """Until a new version of `alias` (NAME@ALIAS) could not be loaded."""
        async for entry in self._listings(alias):
            if entry.pending_error:
                return entry
        raise AssertionError("the listings never end")

    async def _listings(self, alias: str) -> AsyncIterator[pb.AliasListing]:
        name, _, short = alias.partition("@")
        async with asyncio.timeout(60):
            while True:
                listing = await self.inference.ListAdapters(pb.ListAdaptersRequest())
                for adapter in listing.adapters:
                    for entry in adapter.aliases:
                        if (adapter.name, entry.alias) == (name, short):
                            yield entry


@asynccontextmanager
async def running_gateway(
    registry: Registry,
    directory: Path,
    *,
    engine: EngineConfig | None = None,
    limits: LimitsConfig | None = None,
    replicas: int = 1,
    tls: TlsConfig | None = None,
    tenants: Path | None = None,
    max_stale_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    base: BaseModelIdentity = BASE,
    aliases: tuple[str, ...] = ("production",),
    cache_bytes: int = 1 << 30,
) -> AsyncGenerator[RunningGateway, None]:
    """Serves `registry` on free ports while the context lasts."""
    config = engine or EngineConfig(slots=2, host_adapters=4, max_concurrent=8, turn_s=0)
    limits = limits or LimitsConfig(default_max_tokens=4)
    servable = Servable(base.fingerprint, MAX_RANK)
    cache = Cache(directory / "cache", cache_bytes)

    def make(index: int) -> tuple[FakeEngine, Worker]:
        fake = FakeEngine(config.slots + 1)
        return fake, Worker(f"replica-{index}", fake, registry, cache, servable, config)

    local = LocalReplicas(make, replicas)
    metrics, rollouts = Metrics(), Rollouts(directory / "state")
    routes = Routes(registry, servable, rollouts, max_stale_s, clock)
    swaps = Swaps(registry, routes, local, FollowConfig(poll_s=0.01, aliases=aliases), metrics)
    admission = Admission(limits)
    front = Front(
        ListenConfig(inference="127.0.0.1:0", admin="127.0.0.1:0", health="127.0.0.1:0"),
        None if tls is None else ServerTls(tls),
        None if tenants is None else Access(tenants),
        metrics=metrics,
    )
    fleet = Fleet(local, routes, admission, metrics, front.announce, warm=config.slots)
    inference = Inference(registry, routes, local, admission, metrics)
    operations = Operations(routes, local, rollouts, admission, fleet, metrics, drain_s=5)
    await swaps.begin(warm=config.slots)
    await operations.begin()
    await front.answer_probes()
    await front.start(inference, operations, Limits(limits, MAX_CONTEXT), BASE_NAME)
    channel = grpc.aio.insecure_channel(front.inference_address)
    admin_channel = grpc.aio.insecure_channel(front.admin_address)
    try:
        yield RunningGateway(
            registry,
            local.engines,
            inference_pb2_grpc.InferenceServiceStub(channel),
            admin_pb2_grpc.AdminServiceStub(admin_channel),
            front,
            admission,
            metrics,
            fleet,
            local,
            inference,
            operations,
            routes,
            directory / "registry",
        )
    finally:
        for fake in local.engines:
            fake.let_load()
            fake.let_answer()
        await channel.close()
        await admin_channel.close()
        await inference.shadows.close()
        await operations.close()
        await swaps.close()
        await front.stop()
        await local.close()
