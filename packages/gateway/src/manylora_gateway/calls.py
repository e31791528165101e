"""What a caller says beside the request: its session, and the trace it belongs to."""

# The interceptor's types are generic over messages that do not matter here.
# pyright: reportMissingTypeStubs=false

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

SESSION_KEY = "manylora-session"
TRACEPARENT_KEY = "traceparent"
"""W3C Trace Context."""
MAX_SESSION = 256
"""Characters of a session that count."""


@dataclass(frozen=True)
class Call:
    """Of one call."""

    session: str = ""
    """Requests of one session go to one version of a rollout."""
    traceparent: str = ""
    deadline: float | None = None
    """On the clock of `time.monotonic`."""


NO_CALL = Call()
_call = ContextVar("call", default=NO_CALL)


def current_call() -> Call:
    """The call that this task answers."""
    return _call.get()


def set_call(call: Call) -> None:
    """Has `current_call` say `call` in this task and those it starts."""
    _call.set(call)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Notes it for the task that gRPC makes for each call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Passes the call on."""
        said = {
            str(key): str(value)
            for key, value in handler_call_details.invocation_metadata or ()
            if key in (SESSION_KEY, TRACEPARENT_KEY)
        }
        set_call(Call(said.get(SESSION_KEY, "")[:MAX_SESSION], said.get(TRACEPARENT_KEY, "")))
        return await continuation(handler_call_details)
