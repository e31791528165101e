"""An error as OpenAI's API tells it: an HTTP status and {"error": {message, type, param, code}}."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from manylora_gateway.constraints import FIELDS
from manylora_gateway.errors import GatewayError, InvalidRequestError, Violation
from manylora_gateway.status import stated

HTTP_STATUS: Mapping[str, tuple[int, str]] = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "UNAUTHENTICATED": (401, "authentication_error"),
    "PERMISSION_DENIED": (403, "permission_error"),
    "NOT_FOUND": (404, "invalid_request_error"),
    # Not 409: OpenAI's clients would try again, and it would fail again.
    "FAILED_PRECONDITION": (400, "invalid_request_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "UNAVAILABLE": (503, "server_error"),
    "DEADLINE_EXCEEDED": (504, "server_error"),
    "DATA_LOSS": (500, "server_error"),
    "INTERNAL": (500, "server_error"),
}
"""Status and type for each gRPC status of our errors."""

CORE_FIELDS = {
    "adapter": "model",
    "chat.messages": "messages",
    "text": "prompt",
    "tokens.ids": "prompt",
}
"""What a replica names as the gRPC request does, and the parameter it came from."""


@dataclass(frozen=True)
class Problem:
    """An error ready to be sent."""

    status: int
    message: str
    type: str
    param: str | None
    code: str
    retry_after_s: float | None = None

    def body(self) -> dict[str, object]:
        """The JSON of it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 415:
            headers["accept-encoding"] = "identity"
        return headers


class BodyTooBigError(InvalidRequestError):
    """A body beyond `limits.max_request_bytes`."""

    def __init__(self, limit: int) -> None:
        super().__init__([Violation("", f"the body has more than {limit} bytes")])


class BodyEncodedError(InvalidRequestError):
    """A body that is compressed: its size would say nothing of what it unpacks to."""

    def __init__(self, coding: str) -> None:
        text = f"{coding} is not read here: send the body as it is, without this header"
        super().__init__([Violation("content-encoding", text)])


class BodyCutOffError(GatewayError):
    """The client left before its body was whole: counted, and nobody is there to be told."""

    status = "CANCELLED"
    reason = "CANCELLED"


def problem_of(error: Exception, form: str = "") -> Problem:
    """What a client is told of `error`; of one that is not ours no more than an id in the log.

    Args:
        error: what went wrong.
        form: the parameter that holds answers to a form, where one does.
    """
    error = stated(error)
    fields = CORE_FIELDS | dict.fromkeys(FIELDS.values(), form)
    status, kind = HTTP_STATUS[error.status]
    message, param = str(error), None
    if isinstance(error, BodyTooBigError):
        status = 413
    if isinstance(error, BodyEncodedError):
        status = 415
    if isinstance(error, InvalidRequestError):
        told = InvalidRequestError(
            [
                Violation(fields.get(violation.field, violation.field), violation.message)
                for violation in error.violations
            ]
        )
        message, param = str(told), told.violations[0].field or None
    elif error.status == "NOT_FOUND":
        param = "model"
    return Problem(status, message, kind, param, error.reason.lower(), error.retry_after_s)
