"""What operators and their tools find: the admin service, health and reflection."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from manylora.admin.v1 import admin_pb2
from manylora.admin.v1.admin_pb2_grpc import AdminServiceStub
from tests.e2e.harness import SLOTS, Gateway, wait_until


def test_an_operator_loads_and_unloads_versions(gateway: Gateway) -> None:
    with grpc.insecure_channel(gateway.admin) as channel:
        admin = AdminServiceStub(channel)
        loaded = admin.Load(admin_pb2.LoadRequest(adapter="grey@1"), timeout=300)
        assert (loaded.adapter.name, loaded.adapter.number) == ("grey", 1)
        assert wait_until(lambda: ("grey", 1) in gateway.loaded(), within_s=120)
        unloaded = admin.Unload(admin_pb2.UnloadRequest(adapter="grey@1"), timeout=300)
        assert unloaded.replicas == 1
        assert wait_until(lambda: ("grey", 1) not in gateway.loaded(), within_s=120)
    (replica,) = gateway.replicas()
    assert replica.slots == SLOTS


def test_both_ports_answer_health_and_reflection(gateway: Gateway) -> None:
    services = {
        gateway.inference: "manylora.inference.v1.InferenceService",
        gateway.admin: "manylora.admin.v1.AdminService",
    }
    for address, service in services.items():
        with grpc.insecure_channel(address) as channel:
            # The stubs of both services set their methods at run time, past any type checker.
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", service):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            listing = reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=60
            )
            names = {entry.name for entry in next(listing).list_services_response.service}
            assert service in names
