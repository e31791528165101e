"""What each version did since the gateway started: for rollouts, and for whoever drives them."""

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

NEWEST = 1000
"""Requests over which latencies are told."""
VERSIONS_KEPT = 1024


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
    errors: int = 0
    """Of the requests, those that failed for a reason that was not the client's."""
    tokens: int = 0
    first_token: Latencies = field(default_factory=Latencies)


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
    compared_at: float = field(default_factory=time.monotonic)
    """When one was last compared, or began to wait its turn; before, when the rollout began."""


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
