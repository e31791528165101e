"""Synchronous and asynchronous gRPC client of a manylora gateway.

    from manylora_client import Client

    with Client("127.0.0.1:50051") as client:
        answer = client.generate([{"role": "user", "content": "Correct: recieve"}], "spelling")
        print(answer.text, answer.adapter)

gRPC is imported when `Client` or `AsyncClient` is first named, so that importing the package for
its result and error types stays light.
"""

from typing import TYPE_CHECKING

from manylora_client.errors import (
    CancelledCallError,
    ClientError,
    ClosedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ResourceExhaustedError,
    StatusError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UnreachableError,
)
from manylora_client.types import (
    AdapterListing,
    AdapterVersion,
    AliasListing,
    Candidate,
    Choice,
    Delta,
    Finished,
    FinishReason,
    Generation,
    Input,
    Request,
    SamplingOptions,
    Started,
    Timing,
    TokenLogprobs,
    Usage,
)

if TYPE_CHECKING:
    from manylora_client.asynchronous import AsyncClient, AsyncGenerationStream
    from manylora_client.channel import tls_credentials
    from manylora_client.synchronous import Client, GenerationStream

__all__ = [
    "AdapterListing",
    "AdapterVersion",
    "AliasListing",
    "AsyncClient",
    "AsyncGenerationStream",
    "CancelledCallError",
    "Candidate",
    "Choice",
    "Client",
    "ClientError",
    "ClosedError",
    "DataLossError",
    "DeadlineExceededError",
    "Delta",
    "FailedPreconditionError",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "Generation",
    "GenerationStream",
    "Input",
    "InternalError",
    "InvalidArgumentError",
    "InvalidInputError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProtocolError",
    "Request",
    "ResourceExhaustedError",
    "SamplingOptions",
    "Started",
    "StatusError",
    "Timing",
    "TokenLogprobs",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnreachableError",
    "Usage",
    "tls_credentials",
]


def __getattr__(name: str) -> object:
    """Imports the clients, and with them gRPC, when what needs it is first named."""
    if name in {"Client", "GenerationStream"}:
        from manylora_client import synchronous

        return getattr(synchronous, name)
    if name in {"AsyncClient", "AsyncGenerationStream"}:
        from manylora_client import asynchronous

        return getattr(asynchronous, name)
    if name == "tls_credentials":
        from manylora_client import channel

        return channel.tls_credentials
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
