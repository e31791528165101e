"""Who goes next: weighted fair queueing over tokens, among tenants and among a tenant's adapters.

Each party that waits has a start tag: the tokens it was given so far, divided by its weight. The
lowest tag goes next, and being served moves the tag on by the tokens the request may cost. A party
that begins to wait starts at the virtual time, which moves by what requests have used, once they
have ended, divided by the weights of all who wait: what they may cost is often a hundred times as
much, and would set who begins to wait meanwhile that far behind. So idling earns nothing, a flood
only lengthens its own line, and a stream of newcomers, each starting later than the one before,
cannot hold up one who waits.
(P. Goyal et al., Start-time Fair Queuing, SIGCOMM 1996; with the virtual time of the fluid model,
A. Parekh and R. Gallager 1993, because newcomers of start-time queuing can starve a party.)
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

MAX_CREDIT = 4096.0
"""Tokens a party may be behind and catch up with: it may have waited for a slot, not a turn."""
KEPT_IDLE = 1024
"""Idle parties remembered before those without a debt are forgotten."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Share:
    """On whose account a request runs, and with what weight."""

    tenant: str = ""
    tenant_weight: float = 1.0
    """Beside other tenants."""
    adapter_weight: float = 1.0
    """Of the request's adapter beside other adapters of the same tenant."""
    gives_way: bool = False
    """Runs only while nobody else waits, and ends when somebody does."""


EVERYBODY = Share()


class Flow(NamedTuple):
    """The requests of one tenant for one adapter; an empty adapter is the bare base."""

    tenant: str
    adapter: str


@dataclass
class _Party:
    start: float
    weight: float
    waiting: int = 0
    running: int = 0


class _Level(Generic[Key]):
    """Parties that share one thing."""

    def __init__(self) -> None:
        self._virtual = 0.0
        self._weights = 0.0
        self._parties: dict[Key, _Party] = {}

    def tag(self, key: Key) -> float:
        return self._parties[key].start

    def join(self, key: Key, weight: float) -> None:
        party = self._parties.get(key)
        if party is None:
            self._forget_settled()
            party = self._parties[key] = _Party(self._virtual, weight)
        if not party.waiting:
            party.start = max(party.start, self._virtual)
            party.weight = weight
            self._weights += weight
        party.waiting += 1

    def leave(self, key: Key) -> None:
        party = self._parties[key]
        party.waiting -= 1
        if not party.waiting:
            # A sum of floats that should be 0 may not be.
            self._weights = max(0.0, self._weights - party.weight)

    def charge(self, key: Key, tokens: float) -> None:
        party = self._parties[key]
        party.running += 1
        party.start = max(party.start, self._virtual - MAX_CREDIT) + tokens / party.weight

    def settle(self, key: Key, tokens: float, used: float) -> None:
        party = self._parties[key]
        party.running -= 1
        party.start -= (tokens - used) / party.weight
        self._virtual += used / max(self._weights, party.weight)

    def _forget_settled(self) -> None:
        if len(self._parties) < KEPT_IDLE:
            return
        for key, party in list(self._parties.items()):
            if not (party.waiting or party.running) and party.start <= self._virtual:
                del self._parties[key]


class FairOrder:
    """The order of flows that wait: by tenant first, then by adapter within the tenant."""

    def __init__(self) -> None:
        self._tenants: _Level[str] = _Level()
        self._flows: dict[str, _Level[Flow]] = {}

    def tag(self, flow: Flow) -> tuple[float, float]:
        """Sorts flows that wait; the lowest goes next."""
        return self._tenants.tag(flow.tenant), self._flows[flow.tenant].tag(flow)

    def join(self, flow: Flow, share: Share) -> None:
        """One more request of `flow` waits."""
        self._tenants.join(flow.tenant, share.tenant_weight)
        self._flows.setdefault(flow.tenant, _Level()).join(flow, share.adapter_weight)

    def leave(self, flow: Flow) -> None:
        """One request of `flow` waits no more, served or not."""
        self._tenants.leave(flow.tenant)
        self._flows[flow.tenant].leave(flow)

    def charge(self, flow: Flow, tokens: float) -> None:
        """A waiting request of `flow` is served; it may cost so many tokens."""
        self._tenants.charge(flow.tenant, tokens)
        self._flows[flow.tenant].charge(flow, tokens)

    def settle(self, flow: Flow, tokens: float, used: float) -> None:
        """A request that was charged `tokens` has ended and cost `used`."""
        self._tenants.settle(flow.tenant, tokens, used)
        self._flows[flow.tenant].settle(flow, tokens, used)
