"""The adapters in one engine: which are loaded, which are busy, and which go when others come.

What waits for them is the pool's to know.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from manylora_gateway.errors import PoolFullError
from manylora_registry import Version


class State(Enum):
    """Where an adapter is on its way through the engine."""

    LOADING = auto()
    READY = auto()
    UNLOADING = auto()


@dataclass
class Entry:
    """An adapter that is in the engine, or on its way in or out."""

    version: Version
    state: State = State.LOADING
    uses: int = 0
    turn_began: float = 0.0
    leaving: bool = False
    """Takes no new requests until it has drained: another line waits for the slot."""
    retiring: bool = False
    """Is unloaded once it has drained."""

    @property
    def idle(self) -> bool:
        """Whether it is loaded and nobody uses it."""
        return self.state is State.READY and self.uses == 0

    @property
    def holds_slot(self) -> bool:
        """Whether the engine must have a slot for it."""
        return self.uses > 0 or self.state is State.LOADING


@dataclass(frozen=True)
class Residency:
    """An adapter in the engine and how many requests use it."""

    version: Version
    requests: int
    pinned: bool = False


class Slots:
    """The entries by digest, under the engine's limits.

    Args:
        slots: distinct adapters that generate at once. One more does so beside a version that is
            being retired or prepared: the engine must hold `slots` + 1.
        capacity: adapters kept loaded, idle ones included; above `slots`.
        turn_s: seconds an adapter keeps its slot while others wait for one.
    """

    def __init__(
        self,
        slots: int,
        capacity: int,
        turn_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity <= slots:
            raise ValueError("capacity must be above slots: a new version loads beside busy ones")
        self._slots = slots
        self._capacity = capacity
        self._turn_s = turn_s
        self._clock = clock
        # Least recently used first: an entry moves to the end when its last use ends.
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        # Those that stay loaded when idle, once they are.
        self._pinned: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether one must go before another comes."""
        return len(self._entries) >= self._capacity

    def get(self, key: str) -> Entry | None:
        """The entry of a digest."""
        return self._entries.get(key)

    def residents(self) -> list[Residency]:
        """What is loaded and usable now."""
        return [
            Residency(entry.version, entry.uses, key in self._pinned)
            for key, entry in self._entries.items()
            if entry.state is State.READY
        ]

    def add(self, key: str, version: Version) -> Entry:
        """An entry that begins to load."""
        entry = self._entries[key] = Entry(version)
        return entry

    def ready(self, key: str) -> None:
        """It is loaded."""
        self._entries[key].state = State.READY
        self._entries.move_to_end(key)

    def remove(self, key: str) -> None:
        """It is out of the engine."""
        del self._entries[key]

    def take(self, entry: Entry) -> None:
        """One more request uses it."""
        if entry.uses == 0:
            entry.turn_began = self._clock()
        entry.uses += 1

    def give_back(self, key: str) -> None:
        """One request uses it no more."""
        entry = self._entries[key]
        entry.uses -= 1
        if entry.uses == 0:
            entry.leaving = False
            self._entries.move_to_end(key)

    def keep(self, key: str) -> None:
        """Somebody asks for it: it is retired no more."""
        if (entry := self._entries.get(key)) is not None:
            entry.retiring = False

    def pinned(self, key: str) -> bool:
        """Whether it stays loaded when idle."""
        return key in self._pinned

    def pin(self, key: str) -> bool:
        """Keeps it loaded when idle, once it is; says whether it was not pinned before.

        Raises:
            PoolFullError: with one more pin no idle adapter could make room for another.
        """
        if key in self._pinned:
            return False
        if len(self._pinned) >= self._capacity - self._slots - 1:
            raise PoolFullError(
                f"{len(self._pinned)} adapters are pinned and {self._slots + 1} places are kept "
                "for others: unpin one, or raise engine.host_adapters."
            )
        self._pinned.add(key)
        return True

    def unpin(self, key: str) -> bool:
        """Lets it go when it is idle; says whether it was pinned."""
        was = key in self._pinned
        self._pinned.discard(key)
        return was

    def free(self) -> bool:
        """Whether an idle adapter may become busy."""
        staying = sum(entry.holds_slot and not entry.retiring for entry in self._entries.values())
        return staying < self._slots and self.spare_free()

    def spare_free(self) -> bool:
        """Whether the engine, which has a slot more than is shared out, can take one adapter."""
        return sum(entry.holds_slot for entry in self._entries.values()) <= self._slots

    def needs_slot(self, key: str) -> bool:
        """Whether it must get a slot before a request can use it."""
        entry = self._entries.get(key)
        return entry is None or entry.idle

    def end_turns(self, wanting: int) -> None:
        """Has those busy adapters leave whose turns have lasted longest and are over.

        Args:
            wanting: adapters that need a slot where none is free; no more than so many leave.
        """
        busy = [entry for entry in self._entries.values() if entry.uses and not entry.retiring]
        busy.sort(key=lambda entry: entry.turn_began)
        for index, entry in enumerate(busy):
            over = self._clock() - entry.turn_began >= self._turn_s
            entry.leaving = index < wanting and over

    def leaver(self, ahead: int, ranks: Mapping[str, int]) -> tuple[str, Entry] | None:
        """Who goes to make room: the longest idle that nobody waits for, or who is waited for last.

        Args:
            ahead: the rank of who needs the room; nobody of a lower one goes.
            ranks: of the adapters that are waited for, the first ones lowest.
        """
        idle = [
            (key, entry)
            for key, entry in self._entries.items()
            if entry.idle and key not in self._pinned and ranks.get(key, math.inf) > ahead
        ]
        return max(idle, key=lambda one: ranks.get(one[0], math.inf), default=None)

    def retired(self, wanted: Container[str]) -> list[tuple[str, Entry]]:
        """Entries that nothing serves any more and nobody waits for."""
        return [
            (key, entry)
            for key, entry in self._entries.items()
            if entry.retiring and entry.idle and key not in wanted
        ]
