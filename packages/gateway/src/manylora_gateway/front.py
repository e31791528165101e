"""The gRPC servers: inference and administration on a port each, health and reflection on both."""

# Generated modules of gRPC and protobuf; the health package has no types at all.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportAttributeAccessIssue=false, reportUnknownArgumentType=false

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from manylora.admin.v1 import admin_pb2, admin_pb2_grpc
from manylora.inference.v1 import inference_pb2, inference_pb2_grpc
from manylora_gateway.calls import CallInterceptor
from manylora_gateway.config import ListenConfig
from manylora_gateway.errors import StartError
from manylora_gateway.servicers import AdminServicer, InferenceServicer

INFERENCE_SERVICE: str = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADMIN_SERVICE: str = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

FLUSH_S = 1.0
"""An answer that is whole may still be on its way to the wire."""
RECEIVE_LIMIT = 128 << 20
"""gRPC's own refusal of a big message names no field, so it stands above ours."""


class Front:
    """Both servers. Ports are taken first, so that a taken one is known before engines start."""

    def __init__(self, listen: ListenConfig) -> None:
        self._health = health.aio.HealthServicer()
        self._inference, self.inference_address = _bound(listen.inference, "listen.inference")
        self._admin, self.admin_address = _bound(listen.admin, "listen.admin")

    async def start(self, inference: InferenceServicer, admin: AdminServicer) -> None:
        """Answers from here on."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._inference)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._admin)
        for server, service in ((self._inference, INFERENCE_SERVICE), (self._admin, ADMIN_SERVICE)):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        await self.announce(serving=True)
        await self._inference.start()
        await self._admin.start()

    async def announce(self, serving: bool) -> None:
        """Tells health checks whether new requests are wanted; answers go on."""
        status = health_pb2.HealthCheckResponse
        await self._set_health(status.SERVING if serving else status.NOT_SERVING)

    async def stop(self) -> None:
        """Closes both ports; what still runs is cut off."""
        await asyncio.gather(self._inference.stop(FLUSH_S), self._admin.stop(FLUSH_S))

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", INFERENCE_SERVICE, ADMIN_SERVICE):
            await self._health.set(service, status)


def _bound(address: str, field: str) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(
        interceptors=[CallInterceptor()],
        options=[
            # Without this two gateways would share a port and each get half of the requests.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", RECEIVE_LIMIT),
            ("grpc.max_send_message_length", -1),
        ],
    )
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(
            f"{field}: {address} cannot be listened on; is another server there?"
        ) from error
    host, _, _ = address.rpartition(":")
    return server, f"{host}:{port}"
