"""What the front needs of the engines, however many there are and wherever they run."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from manylora_gateway.engine import Delta, Prompt, Sampling
from manylora_gateway.fair import EVERYBODY, Share
from manylora_gateway.pool import PoolCounts
from manylora_gateway.slots import Residency
from manylora_registry import Version


@dataclass(frozen=True)
class ReplicaState:
    """What one replica holds and does now."""

    replica_id: str
    """New after every restart."""
    slots: int
    requests: int
    """Running or waiting in this replica."""
    residents: tuple[Residency, ...]
    waiting: int = 0
    """Of `requests`, those that have no seat yet."""
    counts: PoolCounts = field(default_factory=PoolCounts)
    on_disk: int = 0
    """Verified copies of versions in the cache directory that it shares with its neighbours."""


class Replicas(Protocol):
    """All engine replicas as one."""

    def generate(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        version: Version | None,
        share: Share = EVERYBODY,
        traceparent: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Generates on the replica that suits best; closing the generator frees its seat."""
        ...

    async def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of `prompt` as the engine reads it."""
        ...

    async def prepare(self, version: Version) -> None:
        """Loads `version` on every replica.

        Raises:
            GatewayError: it failed on one of them; some may hold it.
        """
        ...

    async def pin(self, version: Version) -> None:
        """Loads `version` on every replica and keeps it loaded.

        Raises:
            GatewayError: it failed on one of them; some may hold it.
        """
        ...

    async def unpin(self, version: Version) -> int:
        """Ends a pin; says on how many replicas there was one."""
        ...

    async def retire(self, version: Version) -> int:
        """Unloads `version` wherever it is, once drained; says on how many replicas it was."""
        ...

    async def states(self) -> Sequence[ReplicaState]:
        """The state of every replica that answers."""
        ...
