"""What stands before the services: nobody passes whom the tenants' file does not name.

Health alone is open.
"""

# gRPC's handlers are typed by their messages, which do not matter here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora_gateway.access import Access, bearer_token
from manylora_gateway.errors import GatewayError, InvalidRequestError, Violation
from manylora_gateway.health import HEALTH_PATH
from manylora_gateway.limits import check_request_id, request_id_to_tell
from manylora_gateway.metrics import Metrics
from manylora_gateway.openai_http.app import tell
from manylora_gateway.openai_http.problems import problem_of
from manylora_gateway.openai_http.server import PEER_CERTIFICATE
from manylora_gateway.status import REQUEST_ID_KEY, abort, said_request_id
from manylora_gateway.tenants import Role, set_caller
from manylora_gateway.tls import names_in_auth_context, names_in_peer_certificate

HEALTH_METHODS = "/grpc.health.v1.Health/"

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""A grpc.RpcMethodHandler."""


class Guard(grpc.aio.ServerInterceptor):
    """Stands before every method of a gRPC server, reflection included.

    Lets tenants with `role` pass; without `access` everybody. Bytes that are no message are
    refused as such, where gRPC would log a trace and answer UNKNOWN.
    """

    def __init__(self, access: Access | None, role: Role, metrics: Metrics) -> None:
        self._access = access
        self._role: Role = role
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The method's handler, guarded."""
        handler = await continuation(handler_call_details)
        if handler is None:
            # gRPC itself answers.
            self._metrics.rejections.labels("UNIMPLEMENTED").inc()
            return None
        method = cast("str", cast("Any", handler_call_details).method)
        open_to_all = method.startswith(HEALTH_METHODS)
        # The client's certificate is known to the call's context only, so all is checked there.
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            inner = getattr(handler, kind)
            if inner is not None:
                make = getattr(grpc, f"{kind}_rpc_method_handler")
                read = handler.request_deserializer
                return make(
                    self._guarded(inner, open_to_all=open_to_all),
                    read if handler.request_streaming else _readable(read),
                    handler.response_serializer,
                )
        return handler

    def _guarded(self, inner: Callable[..., Any], *, open_to_all: bool) -> Callable[..., Any]:
        async def check(request: Any, context: Context) -> None:
            said = said_request_id(context)
            request_id = request_id_to_tell(said)
            try:
                with self._metrics.refusals(request_id):
                    if not open_to_all:
                        if self._access is not None:
                            self._admit(self._access, context)
                        check_request_id(said)
                    if isinstance(request, InvalidRequestError):
                        raise request
            except GatewayError as error:
                await abort(context, error, request_id)

        async def call(request: Any, context: Context) -> Any:
            await check(request, context)
            return await inner(request, context)

        async def generate(request: Any, context: Context) -> Any:
            await check(request, context)
            async for reply in inner(request, context):
                yield reply

        return generate if inspect.isasyncgenfunction(inner) else call

    def _admit(self, access: Access, context: Context) -> None:
        """Has the call's task know its tenant.

        Raises:
            GatewayError: it has none, or one that may not call here.
        """
        metadata = dict(context.invocation_metadata() or ())
        header = metadata.get("authorization")
        if isinstance(header, bytes):
            header = header.decode("latin-1")
        names = names_in_auth_context(context.auth_context())
        tenant = access.identify(bearer_token(header), names)
        tenant.require_role(self._role)
        set_caller(tenant)


def _readable(read: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer that gives what is wrong with bytes in the place of the message."""
    if read is None:
        return None

    def readable(serialized: bytes) -> Any:
        try:
            return read(serialized)
        except DecodeError:
            return InvalidRequestError(
                [
                    Violation(
                        "", "the bytes are not a message of this method, or a string is not UTF-8"
                    )
                ]
            )

    return readable


class HttpAuthentication:
    """The same in front of an HTTP application."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what a tenant with the role `infer` asks."""
        if scope["path"] != HEALTH_PATH:
            headers = Request(scope).headers
            certificate = scope.get("state", {}).get(PEER_CERTIFICATE) or {}
            request_id = request_id_to_tell(headers.get(REQUEST_ID_KEY, ""))
            try:
                with self._metrics.refusals(request_id):
                    names = names_in_peer_certificate(certificate)
                    token = bearer_token(headers.get("authorization"))
                    tenant = self._access.identify(token, names)
                    tenant.require_role("infer")
            except GatewayError as error:
                await tell(problem_of(error), request_id)(scope, receive, send)
                return
            set_caller(tenant)
        await self._app(scope, receive, send)
