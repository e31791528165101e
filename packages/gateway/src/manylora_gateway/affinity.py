"""Which replica a request goes to: the one that should hold its adapter, unless it is too busy.

Rendezvous hashing gives every adapter an order of the replicas that changes for nobody else when
one comes or goes (D. Thaler and C. Ravishankar 1998). The first of them that is not above the
bound takes the request (consistent hashing with bounded loads, V. Mirrokni et al. 2018): a cold
adapter stays on one replica, a hot one spreads over as many as it needs, and no replica has more
than `BOUND` times the average and one. Nothing is remembered, so a replica that dies and comes
back is in its place at once.
"""

import hashlib
import math
from collections.abc import Mapping

BOUND = 1.25
"""Requests on one replica over the average of all."""


def ranked(adapter: str | None, loads: Mapping[str, int]) -> list[str]:
    """The replicas for a request, best first.

    Args:
        adapter: digest of its version; None for the bare base, which every replica holds.
        loads: requests on each replica now, by its id.
    """
    if adapter is None:
        return sorted(loads, key=lambda replica: loads[replica])
    most = math.ceil(BOUND * (sum(loads.values()) + 1) / max(1, len(loads)))
    return sorted(
        loads,
        key=lambda replica: (
            max(0, loads[replica] + 1 - most),
            hashlib.blake2b(f"{adapter} {replica}".encode(), digest_size=8).digest(),
        ),
    )
