"""Who may generate, with which adapter, in one replica.

The engine takes `seats` requests and, among them, few distinct adapters at once; asked for more
it starves some of them or dies. The pool never lets it see more: a request waits here until there
is a seat for it (see `seats`) and its adapter is loaded and has a slot (see `slots`).

An adapter that keeps its slot busy while another line needs one is asked to leave when its turn
is over: it takes no new requests, drains, and queues again. A request that gives way, a copy that
nobody waits for, starts only while no other waits and is ended when one does: a slot or a seat it
held would cost that one a whole answer's time.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from manylora_gateway.cutoff import CutOff
from manylora_gateway.errors import DisplacedError
from manylora_gateway.fair import EVERYBODY, Share
from manylora_gateway.seats import BARE_BASE, Line, Place, Seats
from manylora_gateway.slots import Entry, Residency, Slots, State
from manylora_registry import Version

logger = logging.getLogger(__name__)


@dataclass
class _Preparation:
    """Callers that want an adapter loaded and nothing more."""

    version: Version
    callers: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]])

    @property
    def awaited(self) -> bool:
        """Whether one of them has not given up."""
        return not all(caller.done() for caller in self.callers)


@dataclass
class Seat:
    """A request's right to generate."""

    used: float
    """Tokens it cost; as many as it might have, until its holder knows better."""
    priority: int = 0
    """A hundred times the seats that its line has for its weight. Where prompts wait in the engine
    to be computed the lowest goes first, so that a flood's are not before another's."""


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
        self._seats = Seats(seats, express)
        self.counts = PoolCounts()
        self._clock = clock
        self._preparations: dict[str, _Preparation] = {}
        # Who waits for pins that hold so far because of them alone.
        self._pinning: dict[str, set[object]] = {}
        self._giving_way = CutOff(lambda: DisplacedError("Another request waited."))
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def requests(self) -> int:
        """Requests seated or waiting."""
        return self._seats.requests

    @property
    def waiting(self) -> int:
        """Requests that have no seat yet."""
        return self._seats.waiting

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
        if version is not None:
            self._slots.keep(version.digest)
        place = self._seats.join(version, share, tokens)
        seat = Seat(0)
        self._arrange()
        try:
            await place.granted
            seat.used, seat.priority = tokens, place.priority
            async with self._giving_way.around() if share.gives_way else nullcontext():
                self._displace()
                yield seat
        finally:
            self._leave(place, seat.used)

    def _leave(self, place: Place, used: float) -> None:
        if self._seats.leave(place, used) and place.line.adapter != BARE_BASE:
            self._slots.give_back(place.line.adapter)
        # What it held, or waited for, may have held others back.
        self._arrange()

    def _displace(self) -> None:
        """Ends what gives way, where somebody waits who does not."""
        if self._seats.somebody_waits:
            self._giving_way.end()

    async def prepare(self, version: Version) -> None:
        """Loads `version` if it is not, without taking a seat.

        Raises:
            Exception: whatever `load` raised.
        """
        self._slots.keep(version.digest)
        preparation = self._preparations.setdefault(version.digest, _Preparation(version))
        caller = asyncio.get_running_loop().create_future()
        preparation.callers.append(caller)
        self._arrange()
        try:
            await caller
        finally:
            if caller.cancelled():
                self._arrange()

    async def pin(self, version: Version) -> None:
        """Loads `version` and keeps it loaded when idle.

        Raises:
            PoolFullError: with it no idle adapter could make room for another.
            Exception: whatever `load` raised.
        """
        key, caller = version.digest, object()
        # Pinned before it is loaded: nobody takes its place meanwhile, and as many as ask at once
        # are counted.
        if self._slots.pin(key):
            self._pinning[key] = set()
        callers = self._pinning.get(key, set())
        callers.add(caller)
        try:
            await self.prepare(version)
        except BaseException:
            callers.remove(caller)
            if not callers and self._pinning.get(key) is callers:
                self.unpin(version)
            raise
        if self._pinning.get(key) is callers:
            del self._pinning[key]

    def unpin(self, version: Version) -> bool:
        """Lets `version` go when it is idle and room is needed; says whether it was pinned.

        One that still loads for a pin stays no longer than others.
        """
        self._pinning.pop(version.digest, None)
        if not self._slots.unpin(version.digest):
            return False
        self._arrange()
        return True

    def retire(self, version: Version) -> bool:
        """Unloads `version` once no request uses or awaits it; says whether it was there.

        A request that asks for it later keeps it, or loads it again; a pinned one stays.
        """
        entry = self._slots.get(version.digest)
        if entry is None or self._slots.pinned(version.digest):
            return False
        entry.retiring = True
        self._arrange()
        return True

    async def settle(self) -> None:
        """Waits until no load or unload is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _arrange(self) -> None:
        """Seats every request that can be seated and starts the loads and unloads due.

        Runs after every change and never waits, so that a free slot and a request that could use
        it always find each other.
        """
        while self._advance():
            pass
        for key, entry in self._slots.retired(self._ranks(self._seats.lines())):
            entry.state = State.UNLOADING
            self.counts.retirements += 1
            self._start(self._take_out(key, entry))
        self._displace()

    def _advance(self) -> bool:
        """Makes the first move there is to make, preparations first; says whether there was one."""
        lines = self._seats.lines()
        ranks = self._ranks(lines)
        free, spare_free = self._slots.free(), self._slots.spare_free()
        self._end_turns([] if free else lines, [] if spare_free else list(self._preparations))
        return any(
            self._serve_preparation(key, preparation, spare_free, ranks)
            for key, preparation in list(self._preparations.items())
        ) or any(self._serve(line, free, ranks) for line in lines)

    def _end_turns(self, lines: list[Line], preparations: list[str]) -> None:
        """Has as many adapters leave their slots as `lines` and `preparations` find none for."""
        wanting = {line.adapter for line in lines if self._slots.needs_slot(line.adapter)}
        wanting.update(key for key in preparations if self._slots.get(key) is None)
        self._slots.end_turns(len(wanting - {BARE_BASE}))

    def _ranks(self, lines: list[Line]) -> dict[str, int]:
        """The adapters that somebody waits for, the first to be served with the lowest rank."""
        ranks = dict.fromkeys(self._preparations, 0)
        for rank, line in enumerate(lines, start=1):
            ranks.setdefault(line.adapter, rank)
        return ranks

    def _serve_preparation(
        self, key: str, preparation: _Preparation, free: bool, ranks: dict[str, int]
    ) -> bool:
        """Ends a preparation, or starts what it waits for; says whether it did."""
        entry = self._slots.get(key)
        if preparation.awaited:
            if entry is None:
                return free and self._bring_in(key, preparation.version, ranks)
            if entry.state is not State.READY:
                return False
        del self._preparations[key]
        for caller in preparation.callers:
            if not caller.done():
                caller.set_result(None)
        return True

    def _serve(self, line: Line, free: bool, ranks: dict[str, int]) -> bool:
        """Seats one request of a line or starts what it waits for; says whether it did."""
        entry = None
        if line.version is not None:
            entry = self._slots.get(line.adapter)
            if entry is None:
                return free and self._bring_in(line.adapter, line.version, ranks)
            if entry.state is not State.READY or entry.leaving or not (entry.uses or free):
                return False
        if not self._seats.free(line):
            return False
        self._seats.grant(line)
        if entry is not None:
            self._slots.take(entry)
        return True

    def _bring_in(self, key: str, version: Version, ranks: dict[str, int]) -> bool:
        """Starts loading a version if there is room for it in memory."""
        leaver = None
        if self._slots.full:
            leaver = self._slots.leaver(ranks[key], ranks)
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
        if (preparation := self._preparations.pop(key, None)) is not None:
            for caller in preparation.callers:
                if not caller.done():
                    caller.set_exception(error)
        self._seats.refuse(key, error)

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
