"""The servers: inference and administration over gRPC, OpenAI's API and probes over HTTP."""

# Generated modules of gRPC and protobuf; the health package has no types at all.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportAttributeAccessIssue=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUntypedBaseClass=false

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from manylora.admin.v1 import admin_pb2, admin_pb2_grpc
from manylora.inference.v1 import inference_pb2, inference_pb2_grpc
from manylora_gateway.access import Access
from manylora_gateway.calls import CallInterceptor
from manylora_gateway.config import GatewayConfig, LimitsConfig, ListenConfig
from manylora_gateway.errors import StartError
from manylora_gateway.guard import Guard, HttpAuthentication
from manylora_gateway.health import probes
from manylora_gateway.inference import Inference
from manylora_gateway.limits import Limits
from manylora_gateway.metrics import Metrics
from manylora_gateway.openai_http.app import application
from manylora_gateway.openai_http.reading import Reading
from manylora_gateway.openai_http.server import HttpServer
from manylora_gateway.operations import Operations
from manylora_gateway.requests import Requests
from manylora_gateway.servicers import AdminServicer, InferenceServicer
from manylora_gateway.tls import ServerTls

INFERENCE_SERVICE: str = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADMIN_SERVICE: str = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
KEEPALIVE_MS = 30_000
MIN_PING_MS = 5_000
MAX_PENDING_CALLS = 20_000
"""Calls that came and are not looked at yet. gRPC cancels what is beyond, and says nothing."""
MAX_PENDING_S = 3600
FLUSH_S = 1.0
"""An answer that is whole may still be on its way to the wire."""
DEFAULT_MESSAGE_BYTES = LimitsConfig().max_message_bytes


class Front:
    """All servers. Ports are taken first, so that a taken one is known before engines start."""

    def __init__(
        self,
        listen: ListenConfig,
        tls: ServerTls | None = None,
        access: Access | None = None,
        max_message_bytes: int = DEFAULT_MESSAGE_BYTES,
        metrics: Metrics | None = None,
    ) -> None:
        metrics = metrics or Metrics()
        self._tls = tls
        self._health = _Health()
        self._serving = False
        self._access = access
        self._inference, self.inference_address = _bound(
            listen.inference,
            "listen.inference",
            tls,
            Guard(access, "infer", metrics),
            max_message_bytes,
        )
        self._admin, self.admin_address = _bound(
            listen.admin, "listen.admin", tls, Guard(access, "admin", metrics), max_message_bytes
        )
        self._http = None
        if listen.http is not None:
            context = None if tls is None else tls.context
            self._http = HttpServer(listen.http, "listen.http", context)
        self._probes = None
        if listen.health is not None:
            self._probes = HttpServer(listen.health, "listen.health")

    @classmethod
    def configured(cls, config: GatewayConfig, metrics: Metrics) -> "Front":
        """The front of a gateway's file.

        Raises:
            StartError: a port is taken, or the TLS files cannot be used.
            ConfigError: the tenants' file has mistakes.
        """
        return cls(
            config.listen,
            None if config.tls is None else ServerTls(config.tls),
            None if config.tenants is None else Access(config.tenants),
            config.limits.max_message_bytes,
            metrics,
        )

    @property
    def addresses(self) -> dict[str, str]:
        """Where each server listens, as the ready line tells it."""
        addresses = {"grpc": self.inference_address, "admin": self.admin_address}
        if self._http is not None:
            addresses["http"] = self._http.address
        if self._probes is not None:
            addresses["health"] = self._probes.address
        return addresses

    async def answer_probes(self) -> None:
        """Says on the port for probes how it goes, before anything else is served."""
        if self._probes is not None:
            await self._probes.start(probes(lambda: self._serving), KEEPALIVE_MS / 1000)

    async def start(
        self, inference: Inference, operations: Operations, limits: Limits, base: str
    ) -> None:
        """Answers from here on.

        Args:
            inference: answers.
            operations: what operators ask for.
            limits: what a request may ask for.
            base: what HTTP clients call the bare base.
        """
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(inference, Requests(limits)), self._inference
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(operations), self._admin)
        for server, service in ((self._inference, INFERENCE_SERVICE), (self._admin, ADMIN_SERVICE)):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            _reflect(server, (service, health.SERVICE_NAME, reflection.SERVICE_NAME))
        if self._tls is not None:
            inference.metrics.certificate_end = self._tls.end
        await self.announce(serving=True)
        await self._inference.start()
        await self._admin.start()
        if self._http is not None:
            reading = Reading(limits, base)
            app = application(inference, reading, lambda: self._serving)
            if self._access is not None:
                app = HttpAuthentication(app, self._access, inference.metrics)
            await self._http.start(app, limits.config.stall_s)

    async def announce(self, serving: bool) -> None:
        """Tells health checks whether new requests are wanted; answers go on."""
        self._serving = serving
        status = health_pb2.HealthCheckResponse
        await self._set_health(status.SERVING if serving else status.NOT_SERVING)

    async def stop(self) -> None:
        """Closes all ports; what still runs is cut off."""
        stops = [self._inference.stop(FLUSH_S), self._admin.stop(FLUSH_S)]
        if self._http is not None:
            stops.append(self._http.stop())
        if self._probes is not None:
            stops.append(self._probes.stop())
        await asyncio.gather(*stops)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", INFERENCE_SERVICE, ADMIN_SERVICE):
            await self._health.set(service, status)


class _Health(health.aio.HealthServicer):
    """With `List`, which the package leaves out: gRPC would log a trace for each call."""

    def __init__(self) -> None:
        super().__init__()
        self._listed: dict[str, health_pb2.HealthCheckResponse] = {}

    async def set(self, service: str, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        """Has `service` be of `status`."""
        self._listed[service] = health_pb2.HealthCheckResponse(status=status)
        await super().set(service, status)

    async def List(  # noqa: N802 (as gRPC names it)
        self, request: health_pb2.HealthListRequest, context: object
    ) -> health_pb2.HealthListResponse:
        """Tells the status of every service."""
        del request, context
        return health_pb2.HealthListResponse(statuses=self._listed)


def _reflect(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """Lets clients without our protos find them, by both names of the reflection service."""
    reflection.enable_server_reflection(services, server)
    # The same messages under a name of their own, which is all that some clients ask for.
    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(services).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method}),)
    )


def _bound(
    address: str,
    field: str,
    tls: ServerTls | None,
    guard: Guard,
    max_message_bytes: int,
) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(
        interceptors=[guard, CallInterceptor()],
        options=[
            # Without this two gateways would share a port and each get half of the requests.
            ("grpc.so_reuseport", 0),
            # A client whose machine is gone says nothing; it would hold its places for hours.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
            # Clients behind load balancers ask often; gRPC would hang up on them.
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # By itself gRPC begins to cancel at 1,000, and whatever waited for 30 s: a burst would
            # get a bare CANCELLED where our queue says RESOURCE_EXHAUSTED and when to come back.
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.server_max_unrequested_time_in_server", MAX_PENDING_S),
        ],
    )
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise StartError(
            f"{field}: {address} cannot be listened on; is another server there?"
        ) from error
    host, _, _ = address.rpartition(":")
    return server, f"{host}:{port}"
