"""The order of replicas as Ray Serve asks for it; Serve sends, counts and retries."""

# Serve's extension interface is typed in part.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections import Counter

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from manylora_gateway.affinity import ranked
from manylora_registry import Version


class AdapterRouter(RequestRouter):
    """Prefers the replica that should hold the adapter of a call; see `affinity`.

    The adapter is the `version` a method is called with by name.
    """

    def initialize_state(self, **kwargs: object) -> None:
        """Called by Serve in place of a constructor."""
        super().initialize_state(**kwargs)
        self._loads: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each rank holds one replica; Serve takes the first that is not full."""
        version = None if pending_request is None else pending_request.kwargs.get("version")
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._loads[replica.replica_id] for name, replica in replicas.items()}
        order = ranked(version.digest if isinstance(version, Version) else None, loads)
        return [[replicas[name]] for name in order]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Counts a request in."""
        super().on_send_request(replica_id)
        self._loads[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Counts a request out, however it ended."""
        super().on_request_completed(replica_id, internal_request_id)
        self._loads[replica_id] -= 1
        if self._loads[replica_id] <= 0:
            del self._loads[replica_id]
