"""Every error the gateway states.

GatewayError
├── InvalidRequestError      a field is wrong; carries every violation     INVALID_ARGUMENT
├── UnauthenticatedError     who calls is not known                        UNAUTHENTICATED
├── PermissionDeniedError    who calls may not do that                     PERMISSION_DENIED
├── UnknownAdapterError      no such adapter, version or alias             NOT_FOUND
├── UnservableError          a version this gateway may not serve          FAILED_PRECONDITION
│   ├── WrongBaseError       made for another base
│   ├── RankTooHighError     rank above the engine's maximum
│   ├── YankedAdapterError   withdrawn from the registry
│   └── AdapterLoadError     the engine refused it
├── CorruptAdapterError      a blob does not match its digest              DATA_LOSS
├── ExhaustedError           too much is asked for at once                 RESOURCE_EXHAUSTED
│   ├── QueueFullError       as many requests as the gateway takes
│   ├── ConcurrencyError     as many requests as one tenant or adapter may have
│   ├── TokenRateError       as many tokens as one tenant or adapter may use
│   └── PoolFullError        no adapter can be pinned any more
├── UnavailableError         may work in a moment                          UNAVAILABLE
│   ├── DrainingError        the gateway is shutting down
│   ├── ReplicaLostError     the replica died under the request
│   ├── RegistryLostError    the registry cannot be reached
│   ├── CacheError           a copy of the version cannot be written
│   └── DisplacedError       a copy of a request gave way to a client's (never sent to a client)
├── DeadlineError            the request's deadline passed                 DEADLINE_EXCEEDED
│   └── StalledError         the client left its answer unread
└── StartError               the gateway could not start (never sent to a client)

All of them pickle, as they cross from a replica's process to the front's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora_registry import errors as registry_errors


class GatewayError(Exception):
    """Base of all; its text is one line a user can act on."""

    status = "INTERNAL"
    """Name of the grpc.StatusCode it becomes at the edge."""
    reason = "INTERNAL"
    """For google.rpc.ErrorInfo, in UPPER_SNAKE."""
    retry_after_s: float | None = None
    """Seconds after which another try makes sense; None where it never does."""
    detail = ""
    """For the operator's log: what is no client's business, e.g. a path or a database's URL."""


@dataclass(frozen=True)
class Violation:
    """One field of a request that is wrong."""

    field: str
    """Its path in the request message, e.g. `sampling.top_p`; empty for the whole of it."""
    message: str


MOST_TOLD = 1500
"""Bytes of the violations that a client is told."""
MOST_OF_ONE = 400
"""Characters of each."""


class InvalidRequestError(GatewayError):
    """Fields of a request are wrong; `violations` holds them all."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__(tuple(violations))
        self.violations = tuple(violations)

    def __str__(self) -> str:
        return "; ".join(
            f"{violation.field}: {violation.message}" if violation.field else violation.message
            for violation in told(self.violations)
        )


def told(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """As many as fit into an error, and how many more there are.

    gRPC's clients take 8 KiB of trailers (Java) or 16 (the others); with more, the call fails in
    the client with a RESOURCE_EXHAUSTED of its own. There each violation is twice, once in base64.
    """
    fit: list[Violation] = []
    size = 0
    for violation in violations:
        message = violation.message
        if len(message) > MOST_OF_ONE:
            message = f"{message[:MOST_OF_ONE]}…"
        size += len(f"{violation.field}{message}".encode(errors="replace"))
        if fit and size > MOST_TOLD:
            return (*fit, Violation("", f"and {len(violations) - len(fit)} more"))
        fit.append(Violation(violation.field, message))
    return tuple(fit)


class UnauthenticatedError(GatewayError):
    """The call carries no credential that is known here."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDeniedError(GatewayError):
    """The caller is known and may not do that."""

    status = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class UnknownAdapterError(GatewayError):
    """The registry has no such adapter, version or alias; the reason says which of them."""

    status = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"


class UnservableError(GatewayError):
    """The version exists but this gateway may not serve it."""

    status = "FAILED_PRECONDITION"
    reason = "ADAPTER_UNSERVABLE"


class WrongBaseError(UnservableError):
    """The version was made for another base."""

    reason = "ADAPTER_WRONG_BASE"


class RankTooHighError(UnservableError):
    """The version's rank is above the engine's maximum."""

    reason = "ADAPTER_RANK_TOO_HIGH"


class YankedAdapterError(UnservableError):
    """The version was withdrawn."""

    reason = "ADAPTER_YANKED"


class AdapterLoadError(UnservableError):
    """The engine refused the version."""

    reason = "ADAPTER_LOAD_FAILED"


class CorruptAdapterError(GatewayError):
    """Stored bytes of the version do not match their digest."""

    status = "DATA_LOSS"
    reason = "ADAPTER_CORRUPT"


class ExhaustedError(GatewayError):
    """More is asked for than there is, or than one may have."""

    status = "RESOURCE_EXHAUSTED"
    reason = "EXHAUSTED"
    retry_after_s = 1.0


class QueueFullError(ExhaustedError):
    """The gateway has as many requests as it takes."""

    reason = "QUEUE_FULL"


class ConcurrencyError(ExhaustedError):
    """A tenant or an adapter has as many requests as it may have."""

    reason = "CONCURRENCY_LIMIT"


class TokenRateError(ExhaustedError):
    """A tenant or an adapter used more tokens than its rate allows; says when to come back."""

    reason = "TOKEN_RATE_LIMIT"

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class PoolFullError(ExhaustedError):
    """As many adapters are pinned as can be."""

    reason = "PINS_EXHAUSTED"
    retry_after_s = None


class UnavailableError(GatewayError):
    """Cannot be answered now."""

    status = "UNAVAILABLE"
    reason = "UNAVAILABLE"
    retry_after_s = 1.0


class DrainingError(UnavailableError):
    """The gateway is shutting down."""

    reason = "DRAINING"
    retry_after_s = 5.0


class ReplicaLostError(UnavailableError):
    """The engine replica died or cannot be reached."""

    reason = "REPLICA_LOST"


class RegistryLostError(UnavailableError):
    """The registry cannot be read."""

    reason = "REGISTRY_UNAVAILABLE"


class DisplacedError(UnavailableError):
    """A request that gives way ended because another one waited."""

    reason = "DISPLACED"


class CacheError(UnavailableError):
    """The directory of verified copies cannot be written, e.g. because its disk is full."""

    reason = "CACHE_UNAVAILABLE"


class DeadlineError(GatewayError):
    """The request's deadline passed before its answer was whole."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class StalledError(DeadlineError):
    """The client left its answer unread, so that it could not be made to the end."""

    reason = "CLIENT_STALLED"


class StartError(GatewayError):
    """The gateway could not start."""

    reason = "START_FAILED"


def from_registry(error: Exception) -> GatewayError:
    """What a failure of the registry means to a client of the gateway."""
    text = str(error)
    match error:
        case registry_errors.NotFoundError():
            unknown = UnknownAdapterError(text)
            unknown.reason = error.reason
            return unknown
        case registry_errors.InvalidReferenceError() | registry_errors.InvalidNameError():
            return InvalidRequestError([Violation("adapter", text)])
        case registry_errors.WrongBaseError():
            return WrongBaseError(text)
        case registry_errors.YankedError():
            return YankedAdapterError(text)
        case registry_errors.CorruptBlobError():
            return CorruptAdapterError(text)
        case registry_errors.DestinationError():
            why = getattr(error.__cause__, "strerror", None) or "it cannot be written"
            no_place = CacheError(f"There is no place here for a copy of the version: {why}.")
            no_place.detail = text
            return no_place
        case registry_errors.UnsignedError():
            unsigned = UnservableError(text)
            unsigned.reason = error.reason
            return unsigned
        case registry_errors.InvalidAdapterError():
            return AdapterLoadError(text)
        case _:
            lost = RegistryLostError("The registry cannot be read.")
            lost.detail = text
            return lost
