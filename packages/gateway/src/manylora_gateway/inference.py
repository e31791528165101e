"""The gateway's core: one request from admission to its last token, whatever the wire.

The gRPC front speaks to it, and any other front would: it knows references, prompts and deltas,
no messages of a protocol.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

from manylora_gateway import tracing
from manylora_gateway.admission import Admission, Ticket
from manylora_gateway.calls import current_call
from manylora_gateway.engine import Delta, Prompt
from manylora_gateway.errors import (
    CorruptAdapterError,
    GatewayError,
    ReplicaLostError,
    UnservableError,
    from_registry,
)
from manylora_gateway.generation import (
    Generation,
    GenerationRequest,
    Started,
    collect,
    with_queue_time,
)
from manylora_gateway.metrics import Metrics, Observation
from manylora_gateway.replicas import Replicas
from manylora_gateway.routes import Routes
from manylora_gateway.shadow import Shadows
from manylora_gateway.tenants import ANONYMOUS, Tenant
from manylora_registry import Adapter, Registry, Version
from manylora_registry.errors import RegistryError

LISTED_AT_ONCE = 100
"""Adapters of a listing that are looked at in one go, which takes a millisecond."""


@dataclass(frozen=True)
class AliasState:
    """What one alias serves here, and what it should."""

    alias: str
    serving: Version | None
    pending: Version | None
    pending_error: str


@dataclass(frozen=True)
class AdapterState:
    """One adapter of the registry and what this gateway makes of it."""

    name: str
    latest: Version
    latest_fits: bool
    """Whether `latest` may be served at all."""
    aliases: tuple[AliasState, ...]


class Inference:
    """Answers requests. Lives on one event loop.

    Deadlines and vanished clients are the front's to see: it cancels the task that reads, and
    everything the request held is freed on the way out.
    """

    def __init__(
        self,
        registry: Registry,
        routes: Routes,
        replicas: Replicas,
        admission: Admission,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = metrics or Metrics()
        self.shadows = Shadows(routes, replicas, self.metrics)
        self._registry = registry
        self._routes = routes
        self._replicas = replicas
        self._admission = admission

    async def stream(
        self, request: GenerationRequest, tenant: Tenant = ANONYMOUS, *, whole: bool = False
    ) -> AsyncGenerator[Started | Delta, None]:
        """Started first, then deltas; the last of each answer has `finish`.

        A request whose replica is lost is tried once more if none of its deltas has left; with
        `whole` they all leave together at the end.

        Raises:
            GatewayError: at any point; nothing follows.
        """
        began = time.monotonic()
        request_id = request.request_id or uuid.uuid4().hex
        with self.metrics.refusals(request_id, tenant.name):
            tenant.require_adapter(request.adapter)
        name = request.adapter.partition("@")[0]
        sampling = request.sampling
        call = current_call()
        span = tracing.begin("manylora.generate", call.traceparent)
        tracing.describe(span, request_id, None)
        tokens: list[int] = []
        seen = self.metrics.observation(request_id, tenant.name, call.deadline)
        try:
            with (
                self.metrics.follow(seen),
                self._admission.enter(tenant, name, sampling.max_tokens * sampling.n) as ticket,
            ):

                def sticky() -> str:
                    return call.session or repr((request.prompt, sampling))

                async with self._routes.use(request.adapter, sticky) as version:
                    seen.resolve(version)
                    tracing.describe(span, request_id, version)
                    started = Started(request_id, version)
                    yield started
                    queued_s = time.monotonic() - began
                    traceparent = tracing.traceparent_of(span)
                    answer = self._answer(request, started, ticket, seen, traceparent, whole=whole)
                    async with aclosing(answer) as deltas:
                        async for delta in deltas:
                            if not delta.choice:
                                tokens.extend(delta.token_ids)
                            yield with_queue_time(delta, queued_s)
            self._copy(request, started, tokens)
        except BaseException as error:
            tracing.failed(span, seen.failure(error)[1])
            raise
        finally:
            span.end()

    def _copy(self, request: GenerationRequest, started: Started, tokens: list[int]) -> None:
        """Has a copy of an answered request made where its alias is shadowed by another version."""
        if (found := self._routes.rollout(request.adapter)) is None:
            return
        key, rollout = found
        version, answered = rollout.copies(key, started.request_id), started.version
        if version is None or (answered and answered.engine_name == version.engine_name):
            return
        self.shadows.copy(rollout, version, request.prompt, request.sampling, tokens)

    async def _answer(
        self,
        request: GenerationRequest,
        started: Started,
        ticket: Ticket,
        seen: Observation,
        traceparent: str,
        *,
        whole: bool,
    ) -> AsyncGenerator[Delta, None]:
        for attempt in (1, 2):
            held: list[Delta] = []
            left = False
            deltas = self._replicas.generate(
                # Two requests may bear the same name; in the engine each attempt has its own.
                f"{started.request_id}-{uuid.uuid4().hex[:8]}",
                request.prompt,
                request.sampling,
                started.version,
                ticket.share,
                traceparent,
            )
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        ticket.used += delta.prompt_tokens + len(delta.token_ids)
                        seen.delta(delta)
                        if whole:
                            held.append(delta)
                        else:
                            left = True
                            yield delta
            except ReplicaLostError:
                if left or attempt == 2:
                    raise
                self.metrics.retries.inc()
                ticket.used = 0
                continue
            except (UnservableError, CorruptAdapterError):
                if started.version is not None:
                    self._routes.doubt(started.version)
                raise
            for delta in held:
                yield delta
            return

    async def generate(self, request: GenerationRequest, tenant: Tenant = ANONYMOUS) -> Generation:
        """The whole answer at once.

        Raises:
            GatewayError: there is none.
        """
        async with aclosing(self.stream(request, tenant, whole=True)) as events:
            return await collect(events, request.sampling.n)

    def until_cut_off(self) -> AbstractAsyncContextManager[None]:
        """Around what answers a request, which the gateway's end ends in our words."""
        return self._admission.answering.around()

    async def count_tokens(self, prompt: Prompt, tenant: Tenant = ANONYMOUS) -> int:
        """Tokens of `prompt` as the engine reads it.

        Raises:
            GatewayError: the prompt is refused, or nobody is admitted.
        """
        with self._admission.enter(tenant):
            return await self._replicas.count_tokens(prompt)

    async def adapters(self, tenant: Tenant = ANONYMOUS) -> list[AdapterState]:
        """The adapters that `tenant` may use, with what this gateway serves of each.

        Raises:
            GatewayError: the registry cannot be read.
        """
        try:
            adapters = await asyncio.to_thread(self._registry.adapters)
        except RegistryError as error:
            raise from_registry(error) from error
        states: list[AdapterState] = []
        for index, adapter in enumerate(adapters):
            if index % LISTED_AT_ONCE == 0:
                # Streams go on meanwhile.
                await asyncio.sleep(0)
            if tenant.may_use(adapter.name):
                aliases = tuple(self._alias(adapter, alias) for alias in sorted(adapter.aliases))
                fits = self._problem(adapter.latest) is None
                states.append(AdapterState(adapter.name, adapter.latest, fits, aliases))
        return states

    async def resolve(self, reference: str, tenant: Tenant = ANONYMOUS) -> Version:
        """The version a request of `tenant` for `reference` would get now.

        Raises:
            GatewayError: there is none, or it may not be used.
        """
        tenant.require_adapter(reference)
        return await self._routes.resolve(reference)

    def _alias(self, adapter: Adapter, alias: str) -> AliasState:
        route = self._routes.get((adapter.name, alias))
        if route is None:
            # Nobody asked for it yet: a request would get what the registry says.
            target = adapter.targets[alias]
            if (problem := self._problem(target)) is not None:
                return AliasState(alias, None, target, str(problem))
            return AliasState(alias, target, None, "")
        error = route.pending_error
        if error is not None and not isinstance(error, GatewayError):
            error = GatewayError("Internal error; the gateway's log has the cause.")
        return AliasState(alias, route.serving, route.pending, "" if error is None else str(error))

    def _problem(self, version: Version) -> GatewayError | None:
        """Why `version` must not be served, if it must not."""
        try:
            self._routes.check(version)
        except GatewayError as error:
            return error
        return None
