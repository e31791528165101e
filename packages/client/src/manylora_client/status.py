"""From a gRPC status and its details to a typed error, for calls and for entries of a batch."""

from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

import manylora.inference.v1.inference_pb2 as pb
from manylora_client import errors
from manylora_client.errors import FieldViolation, StatusError

_CLASSES: dict[str, type[StatusError]] = {
    "INVALID_ARGUMENT": errors.InvalidArgumentError,
    "NOT_FOUND": errors.NotFoundError,
    "FAILED_PRECONDITION": errors.FailedPreconditionError,
    "RESOURCE_EXHAUSTED": errors.ResourceExhaustedError,
    "UNAVAILABLE": errors.UnavailableError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "CANCELLED": errors.CancelledCallError,
    "UNAUTHENTICATED": errors.UnauthenticatedError,
    "PERMISSION_DENIED": errors.PermissionDeniedError,
    "DATA_LOSS": errors.DataLossError,
    "UNIMPLEMENTED": errors.UnimplementedError,
    "INTERNAL": errors.InternalError,
}
_NO_COMMON_TLS = ("handshake", "addresses; last error: UNAVAILABLE")
"""In gRPC's words where one side speaks TLS and the other does not, or refuses its certificate."""
_HTTP_1 = "http1.x"
"""In gRPC's words where a server of HTTP answers."""
_READY = "the ready line of `manylora serve` tells which port is which"
_DETAILS = "grpc-status-details-bin"


def call_error(call: grpc.RpcError, target: str) -> StatusError:
    """The typed error of a call to `target` that failed."""
    code, message, details = call.code().name, call.details() or "", _details(call)
    if details:
        return _typed(code, message, details)
    # Without details gRPC itself is speaking, not the gateway.
    if code == "UNAVAILABLE" and _HTTP_1 in message:
        return errors.UnreachableError(
            f"{target} speaks HTTP and not gRPC: {_READY} ({message})", code=code
        )
    if code == "UNAVAILABLE" and any(words in message for words in _NO_COMMON_TLS):
        return errors.UnreachableError(
            f"something listens at {target} and no connection comes about: check whether it speaks "
            f"TLS, whom its certificate is from, and whether it asks for yours ({message})",
            code=code,
        )
    if code == "UNAVAILABLE":
        return errors.UnreachableError(
            f"no manylora server answers at {target}: is one running there? "
            f"`manylora serve CONFIG` starts one ({message})",
            code=code,
        )
    if code == "UNIMPLEMENTED":
        message = f"{target} answers and knows no such call: {_READY} ({message})"
    if code == "DEADLINE_EXCEEDED":
        message = f"{target} did not answer before the deadline"
    return _typed(code, message, details)


def batch_error(entry: pb.BatchGenerateError) -> StatusError:
    """The typed error of one request of a batch."""
    names = {number: name for name, number in Code.items()}
    return _typed(names.get(entry.code, "UNKNOWN"), entry.message, entry.details)


def _details(call: grpc.RpcError) -> Iterable[Any]:
    # The two kinds of gRPC disagree about the type, and a call that never left has none.
    metadata = cast("Iterable[tuple[str, str | bytes]] | None", call.trailing_metadata())
    for key, value in metadata or ():
        if key == _DETAILS and isinstance(value, bytes):
            return Status.FromString(value).details
    return ()


def _typed(code: str, message: str, details: Iterable[Any]) -> StatusError:
    reason: str | None = None
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in details:
        info = ErrorInfo()
        bad_request = BadRequest()
        retry = RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad_request):
            violations += [
                FieldViolation(violation.field, violation.description)
                for violation in bad_request.field_violations
            ]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return _CLASSES.get(code, StatusError)(
        message, code=code, reason=reason, violations=violations, retry_after=retry_after
    )
