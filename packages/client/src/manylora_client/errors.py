"""Every error the client raises.

ClientError
├── InvalidInputError            the call cannot be put into a request; nothing was sent
├── ClosedError                  the client was closed, before the call or under it
├── ProtocolError                the server's answer breaks the protocol
└── StatusError                  the call ended with a gRPC status
    ├── InvalidArgumentError     INVALID_ARGUMENT: bad fields, named in `violations`
    ├── NotFoundError            NOT_FOUND: no such adapter, version or alias
    ├── FailedPreconditionError  FAILED_PRECONDITION: that version cannot be served here
    ├── ResourceExhaustedError   RESOURCE_EXHAUSTED: queue full or over quota
    ├── UnavailableError         UNAVAILABLE: the server is draining or lost a replica
    │   └── UnreachableError     UNAVAILABLE without a word from the server: no connection
    ├── DeadlineExceededError    DEADLINE_EXCEEDED
    ├── CancelledCallError       CANCELLED, though not by closing the stream
    ├── UnauthenticatedError     UNAUTHENTICATED
    ├── PermissionDeniedError    PERMISSION_DENIED
    ├── DataLossError            DATA_LOSS: an adapter's bytes do not match its digest
    ├── UnimplementedError       UNIMPLEMENTED: the server does not know this call
    └── InternalError            INTERNAL: the message holds an id to look up in its log

A status without a class of its own (ABORTED, UNKNOWN ...) is a plain StatusError.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class ClientError(Exception):
    """Base of all; its text is one line a user can act on."""

    reason = "CLIENT"
    """UPPER_SNAKE; of a StatusError the reason the server gave, where it gave one."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception by itself is made again from its text alone, and a pool of processes hangs
        # on one that cannot be.
        return Exception.__new__, (type(self), *self.args), vars(self)


class InvalidInputError(ClientError):
    """The arguments of a call cannot be put into a request; nothing was sent."""

    reason = "INPUT_INVALID"


class ClosedError(ClientError):
    """The client was closed, before the call or under it."""

    reason = "CLIENT_CLOSED"


class ProtocolError(ClientError):
    """The server's answer breaks the protocol, e.g. a stream that ends without its last event."""

    reason = "PROTOCOL_BROKEN"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field the server refused."""

    field: str
    """Dotted path in the request, e.g. `sampling.temperature`."""
    description: str


class StatusError(ClientError):
    """A call ended with a gRPC status other than OK.

    Attributes:
        code: name of the status, e.g. `NOT_FOUND`.
        reason: of the server's ErrorInfo; the class's own where the server gave none.
        message: what the server said.
        violations: the fields it refused; empty unless it named some.
        retry_after: seconds the server asks to wait before a retry; None if it named none.
    """

    reason = "STATUS"

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        self.message = message
        self.code = code
        self.reason = reason or type(self).reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        super().__init__(message)

    def __str__(self) -> str:
        # Servers may put line breaks in their words; a terminal and a log get one line.
        line = " ".join((self.message or self.code).split())
        for violation in self.violations:
            refused = f"{violation.field}: {' '.join(violation.description.split())}"
            # The gateway's message names them already.
            if refused not in line:
                line += f"; {refused}"
        if self.retry_after is not None:
            line += f" (try again in {self.retry_after:g} s)"
        return line


class InvalidArgumentError(StatusError):
    """The server refused a field."""

    reason = "INVALID_ARGUMENT"


class NotFoundError(StatusError):
    """There is no such adapter, version or alias."""

    reason = "NOT_FOUND"


class FailedPreconditionError(StatusError):
    """The version exists but cannot be served here: another base, yanked, rank too high."""

    reason = "FAILED_PRECONDITION"


class ResourceExhaustedError(StatusError):
    """The server's queue is full or the caller is over its quota."""

    reason = "RESOURCE_EXHAUSTED"


class UnavailableError(StatusError):
    """The server is draining or lost the replica that worked on the call."""

    reason = "UNAVAILABLE"


class UnreachableError(UnavailableError):
    """No server answers at the address, or the connection to it broke."""

    reason = "UNREACHABLE"


class DeadlineExceededError(StatusError):
    """The deadline passed before the answer was there."""

    reason = "DEADLINE_EXCEEDED"


class CancelledCallError(StatusError):
    """The call was cancelled by the server or something in between."""

    reason = "CANCELLED"


class UnauthenticatedError(StatusError):
    """The server does not know who is calling."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(StatusError):
    """The caller may not do that."""

    reason = "PERMISSION_DENIED"


class DataLossError(StatusError):
    """The bytes of an adapter do not match its digest."""

    reason = "DATA_LOSS"


class UnimplementedError(StatusError):
    """The server does not know this call: it is older than the client, or another service."""

    reason = "UNIMPLEMENTED"


class InternalError(StatusError):
    """The server failed; the message holds an id to look up in its log."""

    reason = "INTERNAL"
