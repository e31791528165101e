"""Prometheus metrics of the gateway: of requests as they pass, of replicas as they were last seen.

An adapter and its version are labels of some of them. A gateway serves more versions than a
time-series database bears, so only the first `max_versions` that are served get a label of their
own, and the rest share the label "other". A version that nothing serves any more gives its label
back, and one that nobody asked for in an hour where another needs it: of a version that is asked
for by its number nobody says that it is served no more.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from manylora_gateway.engine import Delta, Timing
from manylora_gateway.errors import (
    GatewayError,
    QueueFullError,
    ReplicaLostError,
    StartError,
)
from manylora_gateway.figures import Figures
from manylora_gateway.logs import log_request
from manylora_registry import Version

if TYPE_CHECKING:
    from manylora_gateway.replicas import ReplicaState

OTHER = ("other", "other")
BASE = ("", "")
LATENCY_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0),
    *(1.5, 2.5, 5.0, 10.0, 30.0, 60.0),
)
NOT_OURS = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "PERMISSION_DENIED", "UNAUTHENTICATED"}
)
"""Codes of requests that failed by the client's doing."""
DEADLINE_TOLERANCE_S = 0.05
"""A client whose clock began earlier ends its call by so much before our deadline."""
DEADLINE_ROUNDING = 0.01
"""And by so much of its timeout: gRPC sends three digits of it, rounded up."""

IDLE_S = 3600.0
"""So long a version keeps a label that another needs; sooner, the labels would come and go with
the requests of many, and their number in Prometheus had no bound."""

Labels = tuple[str, str]
"""Adapter and version number."""


class Observation:
    """One request on its way; see `Metrics.follow`."""

    def __init__(
        self, metrics: "Metrics", request_id: str, tenant: str, deadline: float | None = None
    ) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self._metrics = metrics
        self._clock = metrics.clock
        self._began = self._clock()
        self._late_from = math.inf
        if deadline is not None:
            rounded_s = DEADLINE_ROUNDING * (deadline - self._began)
            self._late_from = deadline - DEADLINE_TOLERANCE_S - rounded_s
        self._last: float | None = None
        self.version: Version | None = None
        self.resolved = False
        self.tokens = 0
        self.prompt_tokens = 0
        self.first_token_s: float | None = None
        self.timing: Timing | None = None

    def resolve(self, version: Version | None) -> None:
        """The request was admitted and is for `version`."""
        self.version, self.resolved = version, True

    def delta(self, delta: Delta) -> None:
        """The next part of its answer came."""
        now = self._clock()
        tokens = len(delta.token_ids)
        if self._last is None:
            self.first_token_s = now - self._began
            self._metrics.first_token.labels(*self._metrics.labels(self.version)).observe(
                self.first_token_s
            )
        elif tokens:
            self._metrics.inter_token.observe((now - self._last) / tokens)
        self._last = now
        self.tokens += tokens
        self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        self.timing = delta.timing or self.timing

    def failure(self, error: BaseException) -> tuple[str, str]:
        """The gRPC code and the reason that `error` ends the request with."""
        if isinstance(error, GatewayError):
            return error.status, error.reason
        if isinstance(error, Exception):
            return "INTERNAL", "INTERNAL"
        # The call's task was cancelled: the client went away, its deadline passed, or the gateway
        # ended, which nobody counts any more.
        late = self._clock() > self._late_from
        ending = "DEADLINE_EXCEEDED" if late else "CANCELLED"
        return ending, ending

    def told(self, code: str) -> dict[str, object]:
        """For the log: who and what, never what was said."""
        version = self.version
        return {
            "request_id": self.request_id,
            "tenant": self.tenant,
            "adapter": "" if version is None else version.name,
            "version": None if version is None else version.number,
            "code": code,
            "seconds": round(self._clock() - self._began, 4),
            "first_token_seconds": self.first_token_s and round(self.first_token_s, 4),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
        }


class Metrics:
    """All that is counted in the front, and the last known state of the replicas.

    Args:
        max_versions: adapter versions with a label of their own.
        clock: tells how long they were not asked for, and what requests take.
    """

    def __init__(
        self, max_versions: int = 100, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.figures = Figures()
        self.replicas: Sequence[ReplicaState] = ()
        """As last seen."""
        self.certificate_end: Callable[[], float] | None = None
        """See `ServerTls.end`; None without TLS."""
        self._max_versions = max_versions
        self.clock = clock
        # By digest, with when each was asked for; the longest ago first.
        self._labelled: OrderedDict[str, tuple[Labels, float]] = OrderedDict()
        self.registry = CollectorRegistry()
        version = ("adapter", "version")
        own = self.registry
        self.requests = Counter(
            "manylora_requests",
            "Requests that ended, by gRPC code.",
            (*version, "code"),
            registry=own,
        )
        self.in_flight = Gauge("manylora_requests_in_flight", "Requests inside.", registry=own)
        self.rejections = Counter(
            "manylora_rejections", "Requests that failed, by reason.", ("reason",), registry=own
        )
        self.first_token = Histogram(
            "manylora_time_to_first_token_seconds",
            "From admission to the first token.",
            version,
            buckets=LATENCY_BUCKETS,
            registry=own,
        )
        self.inter_token = Histogram(
            "manylora_inter_token_seconds",
            "Between tokens of one stream.",
            buckets=LATENCY_BUCKETS,
            registry=own,
        )
        self.queue = Histogram(
            "manylora_queue_seconds",
            "Waiting for a seat and a slot.",
            buckets=LATENCY_BUCKETS,
            registry=own,
        )
        self.load_wait = Histogram(
            "manylora_load_wait_seconds",
            "Of a request, waiting for its adapter's weights.",
            buckets=LATENCY_BUCKETS,
            registry=own,
        )
        self.prompt_tokens = Counter(
            "manylora_prompt_tokens", "Prompt tokens read.", version, registry=own
        )
        self.generated_tokens = Counter(
            "manylora_generated_tokens", "Tokens generated.", version, registry=own
        )
        self.swaps = Counter(
            "manylora_swaps", "Alias moves followed, by outcome.", ("outcome",), registry=own
        )
        self.shadows = Counter(
            "manylora_shadow_requests",
            "Copies of requests, by outcome.",
            ("outcome",),
            registry=own,
        )
        self.retries = Counter(
            "manylora_replica_retries", "Requests tried again on another replica.", registry=own
        )
        self.registry_age = Gauge(
            "manylora_registry_age_seconds", "Since the registry was last read.", registry=own
        )
        # To Prometheus a counter that begins above 0 has not increased: streams that a lost replica
        # breaks off in one moment would raise no alert.
        for error in (QueueFullError, ReplicaLostError):
            self.rejections.labels(error.reason)
        for outcome in ("served", "failed"):
            self.swaps.labels(outcome)
        self.registry.register(_Replicas(self))
        self.registry.register(_Certificate(self))

    def labels(self, version: Version | None) -> Labels:
        """The label of a version, bounded in number."""
        if version is None:
            return BASE
        found = self._labelled.get(version.digest)
        if found is None and not self._has_room():
            return OTHER
        labels = (version.name, str(version.number)) if found is None else found[0]
        self._labelled[version.digest] = (labels, self.clock())
        self._labelled.move_to_end(version.digest)
        return labels

    def forget(self, version: Version) -> None:
        """Nothing serves `version` any more: its label is free."""
        self._forget(version.digest)

    def _has_room(self) -> bool:
        """Whether another version may have a label; one that is idle gives its own up for it."""
        if len(self._labelled) < self._max_versions:
            return True
        longest, (_, asked_at) = next(iter(self._labelled.items()))
        if self.clock() - asked_at < IDLE_S:
            return False
        self._forget(longest)
        return True

    def _forget(self, digest: str) -> None:
        labels, _ = self._labelled.pop(digest, (None, 0.0))
        if labels is None:
            return
        for metric in (self.requests, self.first_token, self.prompt_tokens, self.generated_tokens):
            metric.remove_by_labels(dict(zip(("adapter", "version"), labels, strict=True)))

    def observation(
        self, request_id: str, tenant: str, deadline: float | None = None
    ) -> Observation:
        """Begins the observation of a request, whose deadline is on the monotonic clock."""
        return Observation(self, request_id, tenant, deadline)

    @contextmanager
    def follow(self, seen: Observation) -> Generator[None, None, None]:
        """Follows one request to its end, however it ends."""
        self.in_flight.inc()
        code, reason = "OK", ""
        try:
            yield
        except BaseException as error:
            code, reason = seen.failure(error)
            self.rejections.labels(reason).inc()
            raise
        finally:
            self.in_flight.dec()
            if seen.resolved:
                self._count(seen, code, reason)
            log_request("request ended", seen.told(code))

    @contextmanager
    def refusals(self, request_id: str, tenant: str = "") -> Generator[None, None, None]:
        """Around what looks at a request before anybody follows it."""
        seen = self.observation(request_id, tenant)
        try:
            yield
        except Exception as error:
            code, reason = seen.failure(error)
            self.rejections.labels(reason).inc()
            log_request("request refused", seen.told(code))
            raise

    def _count(self, seen: Observation, code: str, reason: str) -> None:
        labels = self.labels(seen.version)
        self.requests.labels(*labels, code).inc()
        self.prompt_tokens.labels(*labels).inc(seen.prompt_tokens)
        self.generated_tokens.labels(*labels).inc(seen.tokens)
        if seen.timing is not None:
            self.queue.observe(seen.timing.queue_s)
            self.load_wait.observe(seen.timing.load_s)
        figures = self.figures.of("" if seen.version is None else seen.version.digest)
        figures.requests += 1
        if code != "OK" and code not in NOT_OURS:
            figures.errors[reason] += 1
        figures.tokens += seen.tokens
        if seen.first_token_s is not None:
            figures.first_token.add(seen.first_token_s)

    def serve(self, address: str) -> tuple[str, int]:
        """Answers scrapes at `address` (HOST:PORT); says where.

        Raises:
            StartError: it cannot be listened on.
        """
        host, _, port = address.rpartition(":")
        try:
            server, _ = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise StartError(
                f"listen.metrics: {address} cannot be listened on; is another server there?"
            ) from error
        return host, server.server_port


class _Replicas(Collector):
    """The replicas' own counts, which live in their processes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        states = self._metrics.replicas
        up = GaugeMetricFamily("manylora_replicas_up", "Engine replicas that answer.")
        up.add_metric([], len(states))
        requests = GaugeMetricFamily(
            "manylora_replica_requests", "Requests in a replica.", labels=["replica", "state"]
        )
        resident = GaugeMetricFamily(
            "manylora_adapters_resident",
            "Adapters a replica holds: in a slot, in host memory (slots included), on disk.",
            labels=["replica", "tier"],
        )
        pinned = GaugeMetricFamily(
            "manylora_adapters_pinned", "Adapters kept loaded.", labels=["replica"]
        )
        counts = {
            name: CounterMetricFamily(f"manylora_{name}", text, labels=["replica"])
            for name, text in {
                "adapter_loads": "Adapters brought into an engine.",
                "adapter_load_failures": "Adapters an engine or the registry refused.",
                "adapter_load_seconds": "Seconds spent loading them.",
                "adapter_evictions": "Idle adapters that went to make room.",
                "adapter_retirements": "Versions unloaded because nothing serves them.",
            }.items()
        }
        for state in states:
            name = state.replica_id
            requests.add_metric([name, "running"], state.requests - state.waiting)
            requests.add_metric([name, "waiting"], state.waiting)
            busy = sum(entry.requests > 0 for entry in state.residents)
            resident.add_metric([name, "slot"], busy)
            resident.add_metric([name, "host"], len(state.residents))
            resident.add_metric([name, "disk"], state.on_disk)
            pinned.add_metric([name], sum(entry.pinned for entry in state.residents))
            for metric, value in (
                ("adapter_loads", state.counts.loads),
                ("adapter_load_failures", state.counts.load_failures),
                ("adapter_load_seconds", state.counts.load_seconds),
                ("adapter_evictions", state.counts.evictions),
                ("adapter_retirements", state.counts.retirements),
            ):
                counts[metric].add_metric([name], value)
        return [up, requests, resident, pinned, *counts.values()]


class _Certificate(Collector):
    """Until when the gateway's own is good, as its file says now."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        end = GaugeMetricFamily(
            "manylora_certificate_end_seconds",
            "When the gateway's certificate ends, since the epoch; 0 where clients refuse it.",
        )
        if self._metrics.certificate_end is not None:
            end.add_metric([], self._metrics.certificate_end())
        return [end]
