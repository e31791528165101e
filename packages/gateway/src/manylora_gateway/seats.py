"""Who has a seat in the engine, who waits for one, and who goes next.

Waiting requests stand in one line per tenant and adapter, and the lines are served in fair order
(see `fair`). Some express seats are kept for lines that hold less than their share, so that
nobody waits until a flood lets a seat go.
"""

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass, field

from manylora_gateway.fair import FairOrder, Flow, Share
from manylora_registry import Version

BARE_BASE = ""
"""The adapter of requests without one: they need a seat and no slot."""
LOAD_TOKENS = 64.0
"""What a load that failed is taken to have cost: it had a slot, and others waited for it. At no
cost, adapters that cannot be loaded, asked for again and again, would keep a slot from the rest."""
LAST = 1_000_000.0
"""Seats for its weight that one who gives way is taken to have."""


@dataclass(eq=False)
class Place:
    """A request's place in its line, then its seat."""

    line: "Line"
    tokens: float
    """The most that it may cost."""
    number: int
    """Of its arrival: between equals the one who came first goes first."""
    granted: asyncio.Future[None]
    seated: bool = False
    """Whether it has a seat."""
    priority: int = 0
    """In the engine, among those with a seat; see `Seat`."""


@dataclass(eq=False)
class Line:
    """Who waits on one tenant's account for one adapter, first come first served."""

    flow: Flow
    version: Version | None
    share: Share
    places: deque[Place] = field(default_factory=deque[Place])
    seated: int = 0

    @property
    def adapter(self) -> str:
        """The digest of its version, or `BARE_BASE`."""
        return self.flow.adapter


class Seats:
    """The lines before the seats, and how many of these are taken.

    Args:
        seats: requests that generate at once.
        express: seats beside those, for lines that hold less than their share of `seats`.
    """

    def __init__(self, seats: int, express: int) -> None:
        self._seats = seats
        self._express = express
        self._seated = 0
        # Lines with a request that waits or is seated; the order knows those with one that waits.
        self._lines: dict[Flow, Line] = {}
        self._order = FairOrder()
        self._arrivals = itertools.count()

    @property
    def requests(self) -> int:
        """Requests seated or waiting."""
        return self._seated + self.waiting

    @property
    def waiting(self) -> int:
        """Requests that have no seat yet."""
        return sum(len(line.places) for line in self._lines.values())

    @property
    def somebody_waits(self) -> bool:
        """Whether a request waits that does not give way."""
        return any(line.places and not line.share.gives_way for line in self._lines.values())

    def join(self, version: Version | None, share: Share, tokens: float) -> Place:
        """One more request waits."""
        flow = Flow(share.tenant, BARE_BASE if version is None else version.digest)
        line = self._lines.setdefault(flow, Line(flow, version, share))
        granted = asyncio.get_running_loop().create_future()
        place = Place(line, tokens, next(self._arrivals), granted)
        line.places.append(place)
        self._order.join(flow, share)
        return place

    def leave(self, place: Place, used: float) -> bool:
        """A request has ended, seated or not, and cost `used` tokens; says whether it was."""
        line = place.line
        if place.seated:
            self._order.settle(line.flow, place.tokens, used)
            self._seated -= 1
            line.seated -= 1
        elif place in line.places:
            line.places.remove(place)
            self._order.leave(line.flow)
        self._forget_empty(line)
        return place.seated

    def lines(self) -> list[Line]:
        """The lines to serve, first ones first; those that give way where there are no others."""
        waiting = [line for line in self._lines.values() if line.places]
        first = [line for line in waiting if not line.share.gives_way]
        return sorted(
            first or waiting,
            key=lambda line: (self._order.tag(line.flow), line.places[0].number),
        )

    def free(self, line: Line) -> bool:
        """Whether there is a seat for the next of `line`."""
        if self._seated < self._seats:
            return True
        if line.share.gives_way or self._seated >= self._seats + self._express:
            return False
        tenants = {other.flow.tenant: other.share.tenant_weight for other in self._lines.values()}
        return line.seated < self._seats * self._weight(line) / sum(tenants.values())

    def _weight(self, line: Line) -> float:
        """Its tenant's weight, of which it has a part as others of the tenant are there."""
        adapters = sum(
            other.share.adapter_weight
            for other in self._lines.values()
            if other.flow.tenant == line.flow.tenant
        )
        return line.share.tenant_weight * line.share.adapter_weight / adapters

    def grant(self, line: Line) -> None:
        """Gives a seat to the first of `line`."""
        place = line.places.popleft()
        place.seated = True
        self._order.charge(line.flow, place.tokens)
        self._order.leave(line.flow)
        self._seated += 1
        line.seated += 1
        use = LAST if line.share.gives_way else line.seated / self._weight(line)
        place.priority = round(100 * min(use, LAST))
        # One that was cancelled this instant gives all of it back when its task runs.
        if not place.granted.done():
            place.granted.set_result(None)

    def refuse(self, adapter: str, error: Exception) -> None:
        """Gives `error` to all who wait for an adapter."""
        for line in [line for line in self._lines.values() if line.adapter == adapter]:
            if line.places:
                self._order.charge(line.flow, LOAD_TOKENS)
                self._order.settle(line.flow, LOAD_TOKENS, LOAD_TOKENS)
            for place in line.places:
                self._order.leave(line.flow)
                if not place.granted.done():
                    place.granted.set_exception(error)
            line.places.clear()

    def _forget_empty(self, line: Line) -> None:
        if not line.places and not line.seated and self._lines.get(line.flow) is line:
            del self._lines[line.flow]
