"""Who may generate, with which adapter, in one replica.

The engine takes `seats` requests and, among them, few distinct adapters at once; asked for more
it starves some of them or dies. The pool never lets it see more: a request waits here until there
is a seat for it and its adapter is loaded and has a slot.

Waiting requests stand in one line per tenant and adapter, and the lines are served in fair order
(see `fair`). Some express seats are kept for lines that hold less than their share, so that
nobody waits until a flood lets a seat go. An adapter that keeps its slot busy while another line
needs one is asked to leave when its turn is over: it takes no new requests, drains, and queues
again. A request that gives way, a copy that nobody waits for, starts only while no other waits and
is ended when one does: a slot or a seat it held would cost that one a whole answer's time.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from manylora_gateway.errors import DisplacedError
from manylora_gateway.fair import EVERYBODY, Charge, FairOrder, Flow, Share
from manylora_gateway.slots import Entry, Residency, Slots, State
from manylora_registry import Version

BARE_BASE = ""
"""The adapter of requests without one: they need a seat and no slot."""

logger = logging.getLogger(__name__)
_Place = asyncio.Future[None]
_SeatPlace = asyncio.Future[Charge]


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
    gives_way: bool
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
        self._load = load
        self._unload = unload
        self._slots = Slots(slots, capacity, turn_s, clock)
        self._seats = seats
        self._express = express
        self._seated = 0
        self.counts = PoolCounts()
        self._clock = clock
        # Lines with a request that waits or is seated; the order knows those with one that waits.
        self._lines: dict[Flow, _Line] = {}
        self._order = FairOrder()
        self._arrivals = itertools.count()
        self._preparations: dict[str, _Preparation] = {}
        self._giving_way: set[asyncio.Timeout] = set()
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
        return self._slots.residents()

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
            DisplacedError: the share gives way, and another request waits.
            Exception: whatever `load` raised.
        """
        flow = Flow(share.tenant, BARE_BASE if version is None else version.digest)
        charge = await self._wait(flow, version, share, tokens)
        seat = Seat(tokens)
        try:
            if share.gives_way:
                async with self._until_displaced():
                    yield seat
            else:
                yield seat
        finally:
            self._order.settle(flow, charge, seat.used)
            self._release(flow)

    @asynccontextmanager
    async def _until_displaced(self) -> AsyncGenerator[None, None]:
        running = asyncio.timeout(None)
        try:
            async with running:
                self._giving_way.add(running)
                self._displace()
                yield
        except TimeoutError as error:
            if not running.expired():
                raise
            raise DisplacedError("Another request waited.") from error
        finally:
            self._giving_way.discard(running)

    def _displace(self) -> None:
        """Ends what gives way, where somebody waits who does not."""
        if not self._giving_way:
            return
        if any(line.requests and not line.gives_way for line in self._lines.values()):
            now = asyncio.get_running_loop().time()
            for running in self._giving_way:
                running.reschedule(now)
            self._giving_way.clear()

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
        entry = self._slots.get(version.digest)
        if entry is None or not entry.pinned:
            self._slots.require_pin()
        await self.prepare(version)
        if (entry := self._slots.get(version.digest)) is not None:
            entry.pinned = True

    def unpin(self, version: Version) -> bool:
        """Lets `version` go when it is idle and room is needed; says whether it was pinned."""
        entry = self._slots.get(version.digest)
        if entry is None or not entry.pinned:
            return False
        entry.pinned = False
        self._arrange()
        return True

    def retire(self, version: Version) -> bool:
        """Unloads `version` once no request uses or awaits it; says whether it was there.

        A request that asks for it later keeps it, or loads it again; a pinned one stays.
        """
        entry = self._slots.get(version.digest)
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
        if (entry := self._slots.get(digest)) is not None:
            entry.retiring = False

    async def _wait(
        self, flow: Flow, version: Version | None, share: Share, tokens: float
    ) -> Charge:
        """Waits for a seat; returns the charge for it."""
        self._keep(flow.adapter)
        weight = share.tenant_weight * share.adapter_weight
        line = self._lines.setdefault(flow, _Line(version, weight, share.gives_way))
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
            self._slots.give_back(flow.adapter)
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
        if self._slots.nobody_wants():
            while self._advance():
                pass
        wanted = {flow.adapter for flow, line in self._lines.items() if line.requests}
        for key, entry in self._slots.retired(wanted | self._preparations.keys()):
            entry.state = State.UNLOADING
            self.counts.retirements += 1
            self._start(self._take_out(key, entry))
        self._displace()

    def _advance(self) -> bool:
        """Makes the first move there is to make, preparations first; says whether there was one."""
        self._slots.wanting.clear()
        for key, preparation in list(self._preparations.items()):
            if self._serve_preparation(key, preparation):
                return True
        waiting = [flow for flow, line in self._lines.items() if line.requests]
        first = [flow for flow in waiting if not self._lines[flow].gives_way]
        return any(self._serve(flow) for flow in sorted(first or waiting, key=self._rank))

    def _rank(self, flow: Flow) -> tuple[tuple[float, float], int]:
        return self._order.tag(flow), self._lines[flow].requests[0].number

    def _serve_preparation(self, key: str, preparation: _Preparation) -> bool:
        while preparation.places and preparation.places[0].done():
            preparation.places.popleft()
        if not preparation.places:
            del self._preparations[key]
            return True
        entry = self._slots.get(key)
        if entry is None:
            return self._bring_in(key, preparation.version, free=self._slots.spare_free())
        if entry.state is not State.READY:
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
        entry = self._slots.get(flow.adapter)
        if entry is None:
            return self._bring_in(flow.adapter, line.version, free=self._slots.free())
        if entry.state is not State.READY or entry.leaving:
            return False
        if entry.uses == 0 and not self._slots.free():
            self._slots.ask_one_to_leave(flow.adapter)
            return False
        if not self._seat(flow, line):
            return False
        self._slots.take(entry)
        return True

    def _seat(self, flow: Flow, line: _Line) -> bool:
        """Gives a free seat to the first request of `line`."""
        due = self._seats * line.weight / sum(other.weight for other in self._lines.values())
        express = self._express if line.seated < due and not line.gives_way else 0
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
            self._slots.ask_one_to_leave(key)
            return False
        leaver = None
        if self._slots.full:
            wanted = {flow.adapter for flow, line in self._lines.items() if line.requests}
            leaver = self._slots.longest_idle(wanted | self._preparations.keys())
            if leaver is None:
                return False
            leaver[1].state = State.UNLOADING
            self.counts.evictions += 1
        entry = self._slots.add(key, version)
        self._start(self._bring(key, entry, leaver))
        return True

    async def _bring(self, key: str, entry: Entry, leaver: tuple[str, Entry] | None) -> None:
        if leaver is not None:
            await self._take_out(*leaver)
        began = self._clock()
        try:
            await self._load(entry.version)
        except Exception as error:
            self.counts.load_failures += 1
            self._slots.remove(key)
            self._fail(key, error)
        else:
            self.counts.loads += 1
            self.counts.load_seconds += self._clock() - began
            self._slots.ready(key)
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

    async def _take_out(self, key: str, entry: Entry) -> None:
        try:
            await self._unload(entry.version)
        except Exception:
            # The engine may still hold it; its name is never used for other weights, so that
            # memory is all that is lost.
            logger.exception("unloading %s failed", entry.version.engine_name)
        self._slots.remove(key)
        self._arrange()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        """Runs `work` on its own, so that a caller who gives up does not take it along."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
