"""Who may generate, with which adapter, in one replica.

The engine takes `seats` requests and, among them, few distinct adapters at once; asked for more
it starves some of them or dies. The pool never lets it see more: a request waits here until there
is a seat for it and its adapter is loaded and has a slot.

Waiting requests stand in one line per tenant and adapter, and the lines are served in fair order
(see `fair`). Some express seats are kept for lines that hold less than their share, so that
nobody waits until a flood lets a seat go. An adapter that keeps its slot busy while another line
needs one is asked to leave when its turn is over: it takes no new requests, drains, and queues
again.
"""

import asyncio
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from manylora_gateway.errors import PoolFullError
from manylora_gateway.fair import EVERYBODY, Charge, FairOrder, Flow, Share
from manylora_registry import Version

BARE_BASE = ""
"""The adapter of requests without one: they need a seat and no slot."""

logger = logging.getLogger(__name__)
_Place = asyncio.Future[None]
_SeatPlace = asyncio.Future[Charge]


class _State(Enum):
    LOADING = auto()
    READY = auto()
    UNLOADING = auto()


@dataclass
class _Entry:
    """An adapter that is in the engine, or on its way in or out."""

    version: Version
    state: _State = _State.LOADING
    uses: int = 0
    turn_began: float = 0.0
    leaving: bool = False
    """Takes no new requests until it has drained: another line waits for the slot."""
    retiring: bool = False
    """Is unloaded once it has drained."""
    pinned: bool = False
    """Stays loaded when idle."""

    @property
    def idle(self) -> bool:
        return self.state is _State.READY and self.uses == 0

    @property
    def holds_slot(self) -> bool:
        return self.uses > 0 or self.state is _State.LOADING


@dataclass(eq=False)
class _Waiting:
    """A request that has no seat yet."""

    place: _SeatPlace
    tokens: float
    number: int
    """Of its arrival: between equals the one who came first goes first."""


@dataclass
class _Line:
    """Who waits on one tenant's account for one adapter, first come first served."""

    version: Version | None
    weight: float
    requests: deque[_Waiting] = field(default_factory=deque[_Waiting])
    seated: int = 0


@dataclass
class _Preparation:
    """Callers that want an adapter loaded and nothing more."""

    version: Version
    places: deque[_Place] = field(default_factory=deque[_Place])


@dataclass
class Seat:
    """A request's right to generate."""

    used: float
    """Tokens it cost; as many as it might have, until its holder knows better."""


@dataclass(frozen=True)
class Residency:
    """An adapter in the engine and how many requests use it."""

    version: Version
    requests: int
    pinned: bool = False


@dataclass
class PoolCounts:
    """What the pool did since it began."""

    loads: int = 0
    load_failures: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    """Idle adapters that went to make room."""
    retirements: int = 0
    """Versions unloaded because nothing serves them any more."""


class AdapterPool:
    """Seats, slots and memory of one engine, shared fairly. Lives on one event loop.

    Args:
        load: brings a version into the engine; its error goes to everyone who waits for it.
        unload: forgets a version that no request uses.
        slots: distinct adapters that generate at once. One more does so beside a version that is
            being retired or prepared: the engine must hold `slots` + 1.
        capacity: adapters kept loaded, idle ones included; above `slots`.
        seats: requests that generate at once.
        express: seats beside those, for lines that hold less than their share of `seats`.
        turn_s: seconds an adapter keeps its slot while others wait for one.
    """

    def __init__(
        self,
        load: Callable[[Version], Awaitable[None]],
        unload: Callable[[Version], Awaitable[None]],
        *,
        slots: int,
        capacity: int,
        seats: int,
        express: int = 0,
        turn_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity <= slots:
            raise ValueError("capacity must be above slots: a new version loads beside busy ones")
        self._load = load
        self._unload = unload
        self._slots = slots
        self._capacity = capacity
        self._seats = seats
        self._express = express
        self._seated = 0
        self.counts = PoolCounts()
        self._turn_s = turn_s
        self._clock = clock
        # Least recently used first: an entry moves to the end when its last use ends.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        # Lines with a request that waits or is seated; the order knows those with one that waits.
        self._lines: dict[Flow, _Line] = {}
        self._order = FairOrder()
        self._arrivals = itertools.count()
        self._preparations: dict[str, _Preparation] = {}
        # Adapters that wait for a slot, as far as the arranging under way has seen.
        self._wanting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def requests(self) -> int:
        """Requests seated or waiting."""
        return self._seated + self.waiting

    @property
    def waiting(self) -> int:
        """Requests that have no seat yet."""
        return sum(len(line.requests) for line in self._lines.values())

    def residents(self) -> list[Residency]:
        """What is loaded and usable now."""
        return [
            Residency(entry.version, entry.uses, entry.pinned)
            for entry in self._entries.values()
            if entry.state is _State.READY
        ]

    @asynccontextmanager
    async def hold(
        self, version: Version | None, share: Share = EVERYBODY, tokens: float = 1.0
    ) -> AsyncGenerator[Seat, None]:
        """A seat, with `version` loaded and in a slot; None needs no adapter.

        Args:
            version: the adapter.
            share: on whose account.
            tokens: the most that the request may cost.

        Raises:
            Exception: whatever `load` raised.
        """
        flow = Flow(share.tenant, BARE_BASE if version is None else version.digest)
        charge = await self._wait(flow, version, share, tokens)
        seat = Seat(tokens)
        try:
            yield seat
        finally:
            self._order.settle(flow, charge, seat.used)
            self._release(flow)

    async def prepare(self, version: Version) -> None:
        """Loads `version` if it is not, without taking a seat.

        Raises:
            Exception: whatever `load` raised.
        """
        self._keep(version.digest)
        preparation = self._preparations.setdefault(version.digest, _Preparation(version))
        place: _Place = asyncio.get_running_loop().create_future()
        preparation.places.append(place)
        self._arrange()
        try:
            await place
        finally:
            if place.cancelled():
                self._arrange()

    async def pin(self, version: Version) -> None:
        """Loads `version` and keeps it loaded when idle.

        Raises:
            PoolFullError: with it no idle adapter could make room for another.
            Exception: whatever `load` raised.
        """
        pinned = sum(entry.pinned for entry in self._entries.values())
        entry = self._entries.get(version.digest)
        if not (entry and entry.pinned) and pinned >= self._capacity - self._slots - 1:
            raise PoolFullError(
                f"{pinned} adapters are pinned and {self._slots + 1} places are kept for others: "
                "unpin one, or raise engine.host_adapters."
            )
        await self.prepare(version)
        if (entry := self._entries.get(version.digest)) is not None:
            entry.pinned = True

    def unpin(self, version: Version) -> bool:
        """Lets `version` go when it is idle and room is needed; says whether it was pinned."""
        entry = self._entries.get(version.digest)
        if entry is None or not entry.pinned:
            return False
        entry.pinned = False
        self._arrange()
        return True

    def retire(self, version: Version) -> bool:
        """Unloads `version` once no request uses or awaits it; says whether it was there.

        A request that asks for it later keeps it, or loads it again; a pinned one stays.
        """
        entry = self._entries.get(version.digest)
        if entry is None or entry.pinned:
            return False
        entry.retiring = True
        self._arrange()
        return True

    async def settle(self) -> None:
        """Waits until no load or unload is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _keep(self, digest: str) -> None:
        if (entry := self._entries.get(digest)) is not None:
            entry.retiring = False

    async def _wait(
        self, flow: Flow, version: Version | None, share: Share, tokens: float
    ) -> Charge:
        """Waits for a seat; returns the charge for it."""
        self._keep(flow.adapter)
        weight = share.tenant_weight * share.adapter_weight
        line = self._lines.setdefault(flow, _Line(version, weight))
        place: _SeatPlace = asyncio.get_running_loop().create_future()
        waiting = _Waiting(place, tokens, next(self._arrivals))
        line.requests.append(waiting)
        self._order.join(flow, share)
        self._arrange()
        try:
            return await waiting.place
        except asyncio.CancelledError:
            if waiting.place.cancelled():
                if waiting in line.requests:
                    line.requests.remove(waiting)
                    self._order.leave(flow)
                self._forget_empty(flow)
                # What this caller waited for may have held others back.
                self._arrange()
            elif waiting.place.exception() is None:
                self._order.settle(flow, waiting.place.result(), 0)
                self._release(flow)
            raise

    def _release(self, flow: Flow) -> None:
        self._seated -= 1
        self._lines[flow].seated -= 1
        self._forget_empty(flow)
        if flow.adapter != BARE_BASE:
            entry = self._entries[flow.adapter]
            entry.uses -= 1
            if entry.uses == 0:
                entry.leaving = False
                self._entries.move_to_end(flow.adapter)
        self._arrange()

    def _forget_empty(self, flow: Flow) -> None:
        line = self._lines.get(flow)
        if line is not None and not line.requests and not line.seated:
            del self._lines[flow]

    def _arrange(self) -> None:
        """Seats every request that can be seated and starts the loads and unloads due.

        Runs after every change and never waits, so that a free slot and a request that could use
        it always find each other.
        """
        while self._advance():
            pass
        if not self._wanting:
            for entry in self._entries.values():
                entry.leaving = False
            while self._advance():
                pass
        wanted = {flow.adapter for flow, line in self._lines.items() if line.requests}
        for key, entry in list(self._entries.items()):
            if entry.retiring and entry.idle and key not in wanted | self._preparations.keys():
                entry.state = _State.UNLOADING
                self.counts.retirements += 1
                self._start(self._take_out(key, entry))

    def _advance(self) -> bool:
        """Makes the first move there is to make, preparations first; says whether there was one."""
        self._wanting.clear()
        for key, preparation in list(self._preparations.items()):
            if self._serve_preparation(key, preparation):
                return True
        waiting = [flow for flow, line in self._lines.items() if line.requests]
        return any(self._serve(flow) for flow in sorted(waiting, key=self._rank))

    def _rank(self, flow: Flow) -> tuple[tuple[float, float], int]:
        return self._order.tag(flow), self._lines[flow].requests[0].number

    def _serve_preparation(self, key: str, preparation: _Preparation) -> bool:
        while preparation.places and preparation.places[0].done():
            preparation.places.popleft()
        if not preparation.places:
            del self._preparations[key]
            return True
        entry = self._entries.get(key)
        if entry is None:
            return self._bring_in(key, preparation.version, free=self._spare_free())
        if entry.state is not _State.READY:
            return False
        for place in preparation.places:
            if not place.done():
                place.set_result(None)
        preparation.places.clear()
        del self._preparations[key]
        return True

    def _serve(self, flow: Flow) -> bool:
        """Seats one request of a line or starts what it waits for; says whether it did."""
        line = self._lines[flow]
        if line.version is None:
            return self._seat(flow, line)
        entry = self._entries.get(flow.adapter)
        if entry is None:
            return self._bring_in(flow.adapter, line.version, free=self._slot_free())
        if entry.state is not _State.READY or entry.leaving:
            return False
        if entry.uses == 0 and not self._slot_free():
            self._ask_one_to_leave(flow.adapter)
            return False
        if not self._seat(flow, line):
            return False
        if entry.uses == 0:
            entry.turn_began = self._clock()
        entry.uses += 1
        return True

    def _seat(self, flow: Flow, line: _Line) -> bool:
        """Gives a free seat to the first request of `line`."""
        due = self._seats * line.weight / sum(other.weight for other in self._lines.values())
        express = self._express if line.seated < due else 0
        if self._seated >= self._seats + express:
            return False
        self._seated += 1
        line.seated += 1
        waiting = line.requests.popleft()
        charge = self._order.charge(flow, waiting.tokens)
        self._order.leave(flow)
        # One that was cancelled this instant gives all of it back when its task runs.
        if not waiting.place.done():
            waiting.place.set_result(charge)
            return True
        self._order.settle(flow, charge, 0)
        self._seated -= 1
        line.seated -= 1
        self._forget_empty(flow)
        return self._seat(flow, line) if line.requests else False

    def _bring_in(self, key: str, version: Version, *, free: bool) -> bool:
        """Starts loading a version if there is room for it."""
        if not free:
            self._ask_one_to_leave(key)
            return False
        leaver = None
        if len(self._entries) >= self._capacity:
            leaver = self._longest_idle()
            if leaver is None:
                return False
            leaver[1].state = _State.UNLOADING
            self.counts.evictions += 1
        entry = self._entries[key] = _Entry(version)
        self._start(self._bring(key, entry, leaver))
        return True

    def _slot_free(self) -> bool:
        """Whether an idle adapter may become busy."""
        staying = sum(entry.holds_slot and not entry.retiring for entry in self._entries.values())
        return staying < self._slots and self._spare_free()

    def _spare_free(self) -> bool:
        """Whether the engine, which has a slot more than is shared out, can take one adapter."""
        return sum(entry.holds_slot for entry in self._entries.values()) <= self._slots

    def _ask_one_to_leave(self, wanting: str) -> None:
        """Marks the busy adapter whose turn has lasted longest, if that turn is over.

        No more are marked than there are adapters that want a slot.
        """
        self._wanting.add(wanting)
        if sum(entry.leaving for entry in self._entries.values()) >= len(self._wanting):
            return
        busy = [
            entry
            for entry in self._entries.values()
            if entry.uses and not entry.retiring and not entry.leaving
        ]
        oldest = min(busy, key=lambda entry: entry.turn_began, default=None)
        if oldest is not None and self._clock() - oldest.turn_began >= self._turn_s:
            oldest.leaving = True

    def _longest_idle(self) -> tuple[str, _Entry] | None:
        wanted = {flow.adapter for flow, line in self._lines.items() if line.requests}
        idle = (
            (key, entry)
            for key, entry in self._entries.items()
            if entry.idle and not entry.pinned and key not in wanted | self._preparations.keys()
        )
        return next(idle, None)

    async def _bring(self, key: str, entry: _Entry, leaver: tuple[str, _Entry] | None) -> None:
        if leaver is not None:
            await self._take_out(*leaver)
        began = self._clock()
        try:
            await self._load(entry.version)
        except Exception as error:
            self.counts.load_failures += 1
            del self._entries[key]
            self._fail(key, error)
        else:
            self.counts.loads += 1
            self.counts.load_seconds += self._clock() - began
            entry.state = _State.READY
            self._entries.move_to_end(key)
        self._arrange()

    def _fail(self, key: str, error: Exception) -> None:
        """Gives `error` to all who wait for this adapter; a later request tries again."""
        places: list[asyncio.Future[Any]] = []
        if (preparation := self._preparations.pop(key, None)) is not None:
            places.extend(preparation.places)
        for flow in [flow for flow in self._lines if flow.adapter == key]:
            line = self._lines[flow]
            for waiting in line.requests:
                places.append(waiting.place)
                self._order.leave(flow)
            line.requests.clear()
            self._forget_empty(flow)
        for place in places:
            if not place.done():
                place.set_exception(error)

    async def _take_out(self, key: str, entry: _Entry) -> None:
        try:
            await self._unload(entry.version)
        except Exception:
            # The engine may still hold it; its name is never used for other weights, so that
            # memory is all that is lost.
            logger.exception("unloading %s failed", entry.version.engine_name)
        del self._entries[key]
        self._arrange()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        """Runs `work` on its own, so that a caller who gives up does not take it along."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
