"""Who may come in: a bounded number of requests, quotas of tenants and adapters, and the end.

What is refused here has touched nothing. The order among those inside is made where the seats
are, in the replicas (see `pool`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from manylora_gateway.config import AdapterLimits, LimitsConfig
from manylora_gateway.cutoff import CutOff
from manylora_gateway.errors import (
    ConcurrencyError,
    DrainingError,
    QueueFullError,
    ReplicaLostError,
    TokenRateError,
)
from manylora_gateway.fair import Flow, Share
from manylora_gateway.tenants import Tenant

BURST_S = 10.0
"""Seconds of a token rate that may be spent at once."""

ALL = "*"
"""In place of a name: the requests of a tenant for all adapters, or of all tenants for one."""
KEPT_BUCKETS = 4096
"""Buckets remembered before the full ones, which say nothing, are forgotten."""


@dataclass
class Ticket:
    """One admitted request."""

    share: Share
    used: int = 0
    """Tokens of prompt and answer it cost so far."""


class TokenBucket:
    """Tokens to spend, refilled at a steady rate.

    A request is let in while anything is left, and reserves what it may cost: so the bucket can
    be overdrawn by one request and no more, and one that wants more than a burst is not refused
    for ever.
    """

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._level = rate * BURST_S
        self._at = clock()

    def retry_after_s(self, rate: float) -> float:
        """Seconds until a request may come in; 0 where one may now.

        Args:
            rate: at which it refills from here on; what was spent at another stays spent.
        """
        now = self._clock()
        refilled = min(self._rate * BURST_S, self._level + (now - self._at) * self._rate)
        self._rate, self._at = rate, now
        self._level = min(rate * BURST_S, refilled)
        return 0.0 if self._level > 0 else (1 - self._level) / rate

    @property
    def full(self) -> bool:
        """Whether nothing was spent for a while."""
        return self._level + (self._clock() - self._at) * self._rate >= self._rate * BURST_S

    def take(self, tokens: float) -> None:
        """Spends `tokens`; a negative number gives them back."""
        self._level -= tokens


class Admission:
    """Counts the requests inside, refuses what is too much, and knows when all have left."""

    def __init__(self, limits: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._inside = 0
        self._counts: Counter[Flow] = Counter()
        self._buckets: dict[tuple[str, str], TokenBucket] = {}
        self.lost: ReplicaLostError | None = None
        """Why nobody can be served now, if so."""
        self._draining = False
        self.answering = CutOff(
            lambda: DrainingError("The gateway ended before the answer was whole.")
        )
        """Around what answers a request: what is not whole when the gateway ends."""
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Requests that run or wait."""
        return self._inside

    @property
    def draining(self) -> bool:
        """Whether nobody is admitted any more."""
        return self._draining

    @contextmanager
    def enter(
        self, tenant: Tenant, adapter: str = "", tokens: int = 0
    ) -> Generator[Ticket, None, None]:
        """One request's stay.

        Args:
            tenant: who asks.
            adapter: name of the adapter it is for; empty for the bare base.
            tokens: the most it may generate.

        Raises:
            DrainingError: nobody is admitted any more.
            ReplicaLostError: no replica runs.
            QueueFullError: there is no place, or none for another request of this kind.
            ConcurrencyError: the tenant or the adapter has as many requests as it may have.
            TokenRateError: the tenant or the adapter has used up its tokens.
        """
        limits = self._limits.adapters.get(adapter, self._limits.each_adapter)
        flow = Flow(tenant.name, adapter)
        buckets = self._check(tenant, flow, limits)
        ticket = Ticket(Share(tenant.name, tenant.limits.weight, limits.weight))
        self._inside += 1
        self._empty.clear()
        counted = (flow, flow._replace(adapter=ALL), flow._replace(tenant=ALL))
        self._counts.update(counted)
        for bucket in buckets:
            bucket.take(tokens)
        try:
            yield ticket
        finally:
            for bucket in buckets:
                bucket.take(ticket.used - tokens)
            for key in counted:
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def drain(self) -> None:
        """Admits nobody any more and waits until all inside have left."""
        self._draining = True
        await self._empty.wait()

    def _check(self, tenant: Tenant, flow: Flow, limits: AdapterLimits) -> list[TokenBucket]:
        """The buckets this request draws from; raises where it may not come in."""
        if self._draining:
            raise DrainingError("The gateway is draining; ask another one.")
        if self.lost is not None:
            raise ReplicaLostError(str(self.lost))
        places = self._limits.max_requests
        if self._inside >= places:
            raise QueueFullError(f"{places} requests are running or waiting already.")
        # The rest stays free for others: a flood fills half of the places at most, two floods a
        # third each (A. Choudhury and E. Hahne, Dynamic Queue Length Thresholds, 1998).
        if self._counts[flow] > places - self._inside:
            raise QueueFullError(
                f"{self._counts[flow]} requests for {flow.adapter or 'the base'} are running or "
                "waiting already; the places left are kept for others."
            )
        named = flow.adapter or "the bare base"
        for who, key, most in (
            (
                f"tenant {tenant.name}",
                flow._replace(adapter=ALL),
                tenant.limits.concurrent_requests,
            ),
            (named, flow._replace(tenant=ALL), limits.concurrent_requests),
        ):
            count = self._counts[key]
            if most is not None and count >= most:
                raise ConcurrencyError(f"{who} has {count} requests running or waiting; the most.")
        found: list[TokenBucket] = []
        for kind, name, rate in (
            ("tenant", tenant.name, tenant.limits.tokens_per_second),
            ("adapter", flow.adapter, limits.tokens_per_second),
        ):
            if rate is None:
                continue
            key = (kind, name)
            bucket = self._buckets.get(key)
            if bucket is None:
                self._forget_full_buckets()
                bucket = self._buckets[key] = TokenBucket(rate, self._clock)
            if wait_s := bucket.retry_after_s(rate):
                raise TokenRateError(
                    f"{kind} {name or 'base'} used its {rate:g} tokens/s; "
                    f"{wait_s:.1f} s from now there are some again.",
                    wait_s,
                )
            found.append(bucket)
        return found

    def _forget_full_buckets(self) -> None:
        """Names come from clients: what is kept of them must have a bound."""
        if len(self._buckets) >= KEPT_BUCKETS:
            self._buckets = {key: one for key, one in self._buckets.items() if not one.full}
