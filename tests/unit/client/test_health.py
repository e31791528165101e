"""`manylora health`, asked of gRPC's own health service."""

# The health package has no types at all.
# pyright: reportMissingTypeStubs=false

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

STATUS: Any = health_pb2.HealthCheckResponse


@dataclass
class HealthServer:
    """What a gateway answers to probes, without the gateway."""

    target: str
    service: Any

    def say(self, status: int) -> None:
        self.service.set("", status)


@pytest.fixture
def server() -> Iterator[HealthServer]:
    served = grpc.server(futures.ThreadPoolExecutor(1))
    service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(service, served)
    port = served.add_insecure_port("127.0.0.1:0")
    served.start()
    yield HealthServer(f"127.0.0.1:{port}", service)
    served.stop(None)


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manylora_cli", "health", "--timeout", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_gateway_that_serves_is_exit_0(server: HealthServer) -> None:
    server.say(STATUS.SERVING)
    done = ask("--server", server.target)
    assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr


def test_a_gateway_that_drains_is_exit_1(server: HealthServer) -> None:
    server.say(STATUS.NOT_SERVING)
    done = ask("--server", server.target, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout) == {"server": server.target, "status": "NOT_SERVING"}


def test_nobody_there_is_one_line_and_exit_1(server: HealthServer) -> None:
    done = ask("--server", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("manylora: no manylora server answers at 127.0.0.1:1")
    assert done.stderr.count("\n") == 1
