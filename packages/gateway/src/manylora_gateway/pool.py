"""Who may generate, with which adapter, in one replica.

The engine takes `seats` requests and, among them, few distinct adapters at once; asked for more
it starves some of them or dies. The pool never lets it see more: a request waits here until there
is a seat for it and its adapter is loaded and has a slot.

Waiting requests stand in one line per adapter and the lines take turns, so that a flood on one
adapter does not delay another. An adapter that keeps its slot busy while another line needs one
is asked to leave when its turn is over: it takes no new requests, drains, and queues again.
"""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from manylora_registry import Version

BARE_BASE = ""
"""The line of requests without an adapter: they need a seat and no slot."""

logger = logging.getLogger(__name__)
_Place = asyncio.Future[None]


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

    @property
    def idle(self) -> bool:
        return self.state is _State.READY and self.uses == 0

    @property
    def holds_slot(self) -> bool:
        return self.uses > 0 or self.state is _State.LOADING


@dataclass
class _Line:
    """Who waits for one adapter, first come first served."""

    version: Version | None
    requests: deque[_Place] = field(default_factory=deque[_Place])
    preparing: deque[_Place] = field(default_factory=deque[_Place])
    """Callers that want the adapter loaded and nothing more."""


@dataclass(frozen=True)
class Residency:
    """An adapter in the engine and how many requests use it."""

    version: Version
    requests: int


class AdapterPool:
    """Seats, slots and memory of one engine, shared fairly. Lives on one event loop.

    Args:
        load: brings a version into the engine; its error goes to everyone who waits for it.
        unload: forgets a version that no request uses.
        slots: distinct adapters that generate at once. One more does so beside a version that is
            being retired or prepared: the engine must hold `slots` + 1.
        capacity: adapters kept loaded, idle ones included; above `slots`.
        seats: requests that generate at once.
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
        self._seated = 0
        self._turn_s = turn_s
        self._clock = clock
        # Least recently used first: an entry moves to the end when its last use ends.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        # In the order of their turns: a line moves to the end when one of its requests is seated.
        self._lines: OrderedDict[str, _Line] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def requests(self) -> int:
        """Requests seated or waiting."""
        return self._seated + sum(len(line.requests) for line in self._lines.values())

    def residents(self) -> list[Residency]:
        """What is loaded and usable now."""
        return [
            Residency(entry.version, entry.uses)
            for entry in self._entries.values()
            if entry.state is _State.READY
        ]

    @asynccontextmanager
    async def hold(self, version: Version | None) -> AsyncGenerator[None, None]:
        """A seat, with `version` loaded and in a slot; None needs no adapter.

        Raises:
            Exception: whatever `load` raised.
        """
        await self._wait(version, preparing=False)
        try:
            yield
        finally:
            self._release(version)

    async def prepare(self, version: Version) -> None:
        """Loads `version` if it is not, without taking a seat.

        Raises:
            Exception: whatever `load` raised.
        """
        await self._wait(version, preparing=True)

    def retire(self, version: Version) -> bool:
        """Unloads `version` once no request uses or awaits it; says whether it was there.

        A request that asks for it later keeps it, or loads it again.
        """
        entry = self._entries.get(version.digest)
        if entry is None:
            return False
        entry.retiring = True
        self._arrange()
        return True

    async def settle(self) -> None:
        """Waits until no load or unload is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _wait(self, version: Version | None, *, preparing: bool) -> None:
        key = BARE_BASE if version is None else version.digest
        if (entry := self._entries.get(key)) is not None:
            entry.retiring = False
        line = self._lines.setdefault(key, _Line(version))
        queue = line.preparing if preparing else line.requests
        place: _Place = asyncio.get_running_loop().create_future()
        queue.append(place)
        self._arrange()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                if place in queue:
                    queue.remove(place)
                # What this caller waited for may have held others back.
                self._arrange()
            elif place.exception() is None and not preparing:
                self._release(version)
            raise

    def _release(self, version: Version | None) -> None:
        self._seated -= 1
        if version is not None:
            entry = self._entries[version.digest]
            entry.uses -= 1
            if entry.uses == 0:
                entry.leaving = False
                self._entries.move_to_end(version.digest)
        self._arrange()

    def _arrange(self) -> None:
        """Seats every request that can be seated and starts the loads and unloads due.

        Runs after every change and never waits, so that a free slot and a request that could use
        it always find each other.
        """
        changed = True
        while changed:
            changed = False
            for key, line in list(self._lines.items()):
                changed = self._serve(key, line) or changed
                if not line.requests and not line.preparing:
                    del self._lines[key]
        for key, entry in list(self._entries.items()):
            if entry.retiring and entry.idle and key not in self._lines:
                entry.state = _State.UNLOADING
                self._start(self._take_out(key, entry))

    def _serve(self, key: str, line: _Line) -> bool:
        """Seats at most one request of `line`; says whether anything changed."""
        for queue in (line.requests, line.preparing):
            while queue and queue[0].done():
                queue.popleft()
        if line.version is None:
            return self._seat(key, line)
        entry = self._entries.get(key)
        if entry is None:
            return self._bring_in(key, line, line.version)
        if entry.state is not _State.READY:
            return False
        while line.preparing:
            line.preparing.popleft().set_result(None)
        if entry.leaving or not line.requests:
            return False
        if entry.uses == 0 and not self._slot_free():
            self._ask_one_to_leave()
            return False
        if not self._seat(key, line):
            return False
        if entry.uses == 0:
            entry.turn_began = self._clock()
        entry.uses += 1
        return True

    def _seat(self, key: str, line: _Line) -> bool:
        """Gives a free seat to the first request of `line`, which then goes last."""
        if self._seated == self._seats or not line.requests:
            return False
        self._seated += 1
        line.requests.popleft().set_result(None)
        self._lines.move_to_end(key)
        return True

    def _bring_in(self, key: str, line: _Line, version: Version) -> bool:
        """Starts loading what `line` waits for, if there is room for it."""
        if not line.preparing and not line.requests:
            return False
        if not (self._spare_free() if line.preparing else self._slot_free()):
            self._ask_one_to_leave()
            return False
        leaver = None
        if len(self._entries) >= self._capacity:
            leaver = self._longest_idle()
            if leaver is None:
                return False
            leaver[1].state = _State.UNLOADING
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

    def _ask_one_to_leave(self) -> None:
        """Marks the busy adapter whose turn has lasted longest, if that turn is over."""
        if any(entry.leaving for entry in self._entries.values()):
            return
        busy = [item for item in self._entries.items() if item[1].uses and not item[1].retiring]
        if not busy:
            return
        key, oldest = min(busy, key=lambda item: item[1].turn_began)
        if self._clock() - oldest.turn_began >= self._turn_s:
            oldest.leaving = True
            if key in self._lines:
                self._lines.move_to_end(key)

    def _longest_idle(self) -> tuple[str, _Entry] | None:
        idle = (
            (key, entry)
            for key, entry in self._entries.items()
            if entry.idle and key not in self._lines
        )
        return next(idle, None)

    async def _bring(self, key: str, entry: _Entry, leaver: tuple[str, _Entry] | None) -> None:
        if leaver is not None:
            await self._take_out(*leaver)
        try:
            await self._load(entry.version)
        except Exception as error:
            del self._entries[key]
            self._fail(key, error)
        else:
            entry.state = _State.READY
            self._entries.move_to_end(key)
        self._arrange()

    def _fail(self, key: str, error: Exception) -> None:
        """Gives `error` to all who wait for this adapter; a later request tries again."""
        line = self._lines.pop(key, None)
        if line is None:
            return
        for place in (*line.requests, *line.preparing):
            if not place.done():
                place.set_exception(error)
        line.requests.clear()
        line.preparing.clear()

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
