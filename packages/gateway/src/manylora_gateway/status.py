"""The one place where an error becomes a gRPC status."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

import logging
import uuid
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from manylora_gateway.errors import GatewayError, InvalidRequestError, told

DOMAIN = "manylora"
DETAILS_KEY = "grpc-status-details-bin"
"""Where gRPC carries a google.rpc.Status."""
MOST_OF_A_MESSAGE = 2000
"""Characters: clients take 8 KiB of all that ends a call."""
REQUEST_ID_KEY = "x-request-id"
CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

logger = logging.getLogger(__name__)


def to_status(error: Exception) -> status_pb2.Status:
    """The google.rpc.Status of `error`."""
    error = stated(error)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if isinstance(error, InvalidRequestError):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.message
                    )
                    for violation in told(error.violations)
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code: int = grpc.StatusCode[error.status].value[0]
    return status_pb2.Status(
        code=code,
        message=str(error)[:MOST_OF_A_MESSAGE],
        details=[_packed(detail) for detail in details],
    )


async def abort(
    context: "grpc.aio.ServicerContext[Any, Any]", error: Exception, request_id: str
) -> NoReturn:
    """Ends a call with the status of `error`."""
    status = to_status(error)
    trailing = ((DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id))
    await context.abort(CODES[status.code], status.message, trailing)
    raise AssertionError("abort raises")


def said_request_id(context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """What the client calls the request, unchecked; empty if it does not."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""


def stated(error: Exception) -> GatewayError:
    """`error` as a client may be told it; the log has the rest.

    What is not one of ours is logged with its trace and becomes INTERNAL with an opaque id: its
    text may hold paths or a neighbour's data.
    """
    if isinstance(error, GatewayError):
        if error.detail:
            logger.warning("%s: %s", error.reason, error.detail)
        return error
    incident = uuid.uuid4().hex[:12]
    logger.error("incident %s", incident, exc_info=error)
    return GatewayError(f"Internal error {incident}; the gateway's log has the cause.")


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
