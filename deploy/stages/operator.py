"""A stage's gateway as the scripts see it: its rollouts, what it serves, whether it is well."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.stages.errors import SwapError
from deploy.stages.hosting import Running
from manylora.admin.v1 import admin_pb2
from manylora.admin.v1.admin_pb2_grpc import AdminServiceStub
from manylora_client import AdapterListing, AliasListing, Client
from manylora_client.channel import CallMetadata, resolve_credentials
from manylora_client.status import call_error
from manylora_registry import Version

CALL_S = 30.0
HEALTH_S = 5.0
LOOK_S = 0.2
"""Between two looks at what a gateway serves, which it tells nobody by itself."""


@dataclass(frozen=True)
class Figures:
    """What a version did on a gateway since it started, or in a while."""

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    first_token_p95_s: float = 0.0
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])
    """The errors by reason."""


@dataclass(frozen=True)
class Share:
    """What a version gets of the requests for an alias."""

    version: int
    percent: int
    figures: Figures


@dataclass(frozen=True)
class Copies:
    """What became of the copies of requests that a version answered for nobody."""

    version: int
    percent: int
    same: int = 0
    different: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Rollout:
    """How the requests for an alias are divided."""

    shares: tuple[Share, ...]
    copies: Copies | None

    @property
    def division(self) -> dict[int, int]:
        """Percent by version."""
        return {share.version: share.percent for share in self.shares}

    def figures(self, version: int) -> Figures:
        """Of one version; nothing where it has no share."""
        found = (share.figures for share in self.shares if share.version == version)
        return next(found, Figures())


class Operator:
    """Speaks to one gateway as who operates it; a context manager.

    Every method raises a StatusError of the client's where the gateway refuses or is away.
    """

    def __init__(self, running: Running, token: str | None) -> None:
        self.target = running.admin
        self._metadata = CallMetadata(token).of(None)
        credentials = resolve_credentials(None)
        self._channel = (
            grpc.insecure_channel(self.target)
            if credentials is None
            else grpc.secure_channel(self.target, credentials)
        )
        self._stub = AdminServiceStub(self._channel)
        self._client = Client(running.inference, token=token)

    def __enter__(self) -> "Operator":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()
        self._client.close()

    def rollout(self, name: str, alias: str) -> Rollout:
        """How the requests for an alias are divided now."""
        request = admin_pb2.GetRolloutRequest(adapter=name, alias=alias)
        return _rollout(self._call("GetRollout", request, CALL_S).rollout)

    def serving(self, name: str, alias: str) -> int | None:
        """The version that the alias by itself means here, if it can be served."""
        found = self._listed(name, alias)
        return None if found is None or found.serving is None else found.serving.number

    def divide(
        self,
        name: str,
        alias: str,
        shares: Sequence[tuple[int, int]],
        copies: tuple[int, int] | None = None,
        *,
        within_s: float = CALL_S,
    ) -> Rollout:
        """Divides them among versions, each with its percent; nothing ends the division."""
        request = admin_pb2.SetRolloutRequest(adapter=name, alias=alias)
        for version, percent in shares:
            request.shares.add(version=version, percent=percent)
        if copies is not None:
            request.shadow.version, request.shadow.percent = copies
        return _rollout(self._call("SetRollout", request, within_s).rollout)

    def healthy(self) -> bool:
        """Whether it takes requests."""
        # The stubs set their methods at run time, past any type checker.
        health: Any = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def listings(self) -> list[AdapterListing]:
        """What it serves of each adapter."""
        return self._client.list_adapters(timeout=CALL_S)

    def await_serving(self, version: Version, alias: str, within_s: float) -> None:
        """Waits until the alias by itself means `version` here.

        Raises:
            SwapError: it does not come to that; says why.
        """
        deadline = time.monotonic() + within_s
        while True:
            found = self._listed(version.name, alias)
            serving = None if found is None else found.serving
            if serving is not None and serving.digest == version.digest:
                return
            # Until the gateway follows the alias it tells why another version is not served.
            pending = None if found is None else found.pending
            ours = pending is not None and pending.digest == version.digest
            error = found.pending_error if found is not None and ours else ""
            if error or time.monotonic() > deadline:
                instead = "nothing" if serving is None else f"version {serving.number}"
                raise SwapError(
                    f"the gateway at {self.target} serves {instead} as {version.name}@{alias}, "
                    f"not version {version.number}: {error or f'not after {within_s:.0f} s'}"
                )
            time.sleep(LOOK_S)

    def _listed(self, name: str, alias: str) -> AliasListing | None:
        aliases = (
            entry
            for adapter in self.listings()
            if adapter.name == name
            for entry in adapter.aliases
            if entry.alias == alias
        )
        return next(aliases, None)

    def _call(self, method: str, request: Any, within_s: float) -> Any:
        try:
            call = getattr(self._stub, method)
            return call(request, timeout=within_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise call_error(error, self.target) from None


def _rollout(message: admin_pb2.Rollout) -> Rollout:
    shares = tuple(
        Share(
            share.version.number,
            share.percent,
            Figures(
                share.figures.requests,
                share.figures.errors,
                share.figures.tokens,
                share.figures.ttft_p95_s,
                dict(share.figures.errors_by_reason),
            ),
        )
        for share in message.shares
    )
    copies = None
    if message.HasField("shadow"):
        seen = message.shadow
        copies = Copies(seen.version.number, seen.percent, seen.same, seen.different, seen.failed)
    return Rollout(shares, copies)
