"""Nobody gets past the front whom the tenants' file does not name; health alone is open."""

# gRPC's handlers are typed by their messages, which do not matter here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora_gateway.access import Access, bearer_token
from manylora_gateway.errors import GatewayError
from manylora_gateway.openai_http.app import HEALTH_PATH, tell
from manylora_gateway.openai_http.problems import problem_of
from manylora_gateway.openai_http.server import PEER_CERTIFICATE
from manylora_gateway.status import abort
from manylora_gateway.tenants import Role, set_caller
from manylora_gateway.tls import names_in_auth_context, names_in_peer_certificate

HEALTH_METHODS = "/grpc.health.v1.Health/"

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""A grpc.RpcMethodHandler."""


class GrpcAuthentication(grpc.aio.ServerInterceptor):
    """Lets tenants with `role` through to every method of a server, reflection included."""

    def __init__(self, access: Access, role: Role) -> None:
        self._access = access
        self._role: Role = role

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The method's handler, behind a check of who calls."""
        handler = await continuation(handler_call_details)
        method = cast("str", cast("Any", handler_call_details).method)
        if handler is None or method.startswith(HEALTH_METHODS):
            return handler
        # The client's certificate is known to the call's context only, so the check is made there.
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            inner = getattr(handler, kind)
            if inner is not None:
                make = getattr(grpc, f"{kind}_rpc_method_handler")
                return make(
                    self._guarded(inner), handler.request_deserializer, handler.response_serializer
                )
        return handler

    def _guarded(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> Any:
            await self._admit(context)
            return await inner(request, context)

        async def generate(request: Any, context: Context) -> Any:
            await self._admit(context)
            async for reply in inner(request, context):
                yield reply

        return generate if inspect.isasyncgenfunction(inner) else call

    async def _admit(self, context: Context) -> None:
        """Has the call's task know its tenant, or ends the call."""
        metadata = dict(context.invocation_metadata() or ())
        header = metadata.get("authorization")
        if isinstance(header, bytes):
            header = header.decode("latin-1")
        try:
            names = names_in_auth_context(context.auth_context())
            tenant = self._access.identify(bearer_token(header), names)
            tenant.require_role(self._role)
        except GatewayError as error:
            await abort(context, error)
        else:
            set_caller(tenant)


class HttpAuthentication:
    """The same in front of an HTTP application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what a tenant with the role `infer` asks."""
        if scope["path"] != HEALTH_PATH:
            header = Request(scope).headers.get("authorization")
            certificate = scope.get("state", {}).get(PEER_CERTIFICATE) or {}
            try:
                names = names_in_peer_certificate(certificate)
                tenant = self._access.identify(bearer_token(header), names)
                tenant.require_role("infer")
            except GatewayError as error:
                await tell(problem_of(error), "")(scope, receive, send)
                return
            set_caller(tenant)
        await self._app(scope, receive, send)
