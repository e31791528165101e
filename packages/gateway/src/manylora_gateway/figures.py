"""What each version did since the gateway started: for rollouts, and for whoever drives them."""

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

NEWEST = 1000
"""Requests over which latencies are told."""
VERSIONS_KEPT = 1024
PATIENCE_S = 30.0
"""Seconds without a copy that was compared, after which one waits its turn."""
REST = 15
"""A turn has requests for one adapter wait for an answer or two, and is followed by a rest so many
times as long. With two slots and two busy adapters clients' 95th percentile of the time to first
token stays as it was; with rests of 30 s it became a whole answer where these take 5 s."""


@dataclass
class Latencies:
    """The newest of a kind of latency, in seconds."""

    newest: deque[float] = field(default_factory=lambda: deque[float](maxlen=NEWEST))

    def add(self, seconds: float) -> None:
        """Takes one."""
        self.newest.append(seconds)

    def quantile(self, share: float) -> float:
        """What `share` of them stay at or below; 0 where there are none."""
        ordered = sorted(self.newest)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class VersionFigures:
    """What one version did."""

    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter[str])
    """By reason; of the requests, those that failed for one that was not the client's."""
    tokens: int = 0
    first_token: Latencies = field(default_factory=Latencies)


class Turns:
    """When a copy no longer gives way, so that a gateway that is never idle compares something too.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.due_at = clock() + PATIENCE_S

    def take(self) -> bool:
        """Whether a copy that is made now waits its turn like a client's request; one at a time."""
        if self._clock() < self.due_at:
            return False
        self.due_at = math.inf
        return True

    def end(self, took_s: float) -> None:
        """The turn is over, and took so long from when the copy began to wait."""
        self.due_at = self._clock() + max(PATIENCE_S, REST * took_s)

    def put_off(self) -> None:
        """A copy was compared."""
        self.due_at = max(self.due_at, self._clock() + PATIENCE_S)


@dataclass
class ShadowFigures:
    """What became of the copies of requests that a version answered for nobody."""

    same: int = 0
    different: int = 0
    failed: int = 0
    skipped: int = 0
    agreeing_tokens: int = 0
    """At the start of answers that differed, summed."""
    first_token: Latencies = field(default_factory=Latencies)
    turns: Turns = field(default_factory=Turns)


class Figures:
    """Figures by version digest; the empty digest is the bare base."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, VersionFigures] = OrderedDict()

    def of(self, digest: str) -> VersionFigures:
        """The figures of a version, made if there are none; the longest unasked-for go."""
        found = self._versions.setdefault(digest, VersionFigures())
        self._versions.move_to_end(digest)
        if len(self._versions) > VERSIONS_KEPT:
            self._versions.popitem(last=False)
        return found
