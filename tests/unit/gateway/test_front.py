"""The ports are the gateway's own."""

import asyncio
import contextlib
import resource
import socket
import subprocess
import sys

import httpx
import pytest

from manylora_gateway.config import ListenConfig
from manylora_gateway.errors import StartError
from manylora_gateway.front import Front
from manylora_gateway.health import probes
from manylora_gateway.openai_http.server import HttpServer
from tests.unit.gateway.test_observing import until


@pytest.mark.parametrize("field", ["inference", "admin", "http", "health"])
async def test_a_taken_port_is_known_before_anything_starts(field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listen = ListenConfig.model_validate(
            {"inference": "127.0.0.1:0", "admin": "127.0.0.1:0", field: address}
        )
        with pytest.raises(StartError, match=f"listen.{field}: {address}"):
            Front(listen)


async def probed(front: Front, path: str) -> int:
    async with httpx.AsyncClient(timeout=60) as http:
        return (await http.get(f"http://{front.addresses['health']}{path}")).status_code


async def test_probes_are_answered_while_the_engine_is_still_loading() -> None:
    front = Front(ListenConfig(inference="127.0.0.1:0", admin="127.0.0.1:0", health="127.0.0.1:0"))
    await front.answer_probes()
    assert (await probed(front, "/live"), await probed(front, "/health")) == (200, 503)
    await front.announce(serving=True)
    assert await probed(front, "/health") == 200
    await front.announce(serving=False)
    assert (await probed(front, "/live"), await probed(front, "/health")) == (200, 503)
    await front.stop()


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: "])
async def test_a_connection_without_a_whole_request_is_closed(sent: bytes) -> None:
    server = HttpServer("127.0.0.1:0", "listen.http", idle_s=1)
    await server.start(probes(lambda: True), stall_s=60)
    host, _, port = server.address.rpartition(":")
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()
        # Sent before it is taken, a request is there in time however slow the machine is.
        whole = socket.create_connection((host, int(port)))
        whole.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        reader, writer = await asyncio.open_connection(sock=whole)
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()
    await server.stop()


async def test_nobody_is_let_in_over_http_before_there_is_an_answer() -> None:
    first = HttpServer("127.0.0.1:0", "listen.http")
    second = HttpServer(first.address, "listen.http")
    host, _, port = first.address.partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=60)
    await first.start(probes(lambda: True), stall_s=60)
    async with httpx.AsyncClient(timeout=60) as http:
        assert (await http.get(f"http://{first.address}/health")).status_code == 200
    # Both began at the same time.
    with pytest.raises(StartError, match=f"listen.http: {first.address}"):
        await second.start(probes(lambda: True), stall_s=60)
    await second.stop()
    await first.stop()


async def test_two_gateways_do_not_share_a_port() -> None:
    first = Front(ListenConfig(inference="127.0.0.1:0", admin="127.0.0.1:0"))
    with pytest.raises(StartError):
        Front(ListenConfig(inference=first.inference_address, admin="127.0.0.1:0"))


async def test_a_want_of_files_is_one_line_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    server = HttpServer("127.0.0.1:0", "listen.http")
    await server.start(probes(lambda: True), stall_s=60)
    host, _, port = server.address.rpartition(":")
    await answered(server)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.create_connection((host, int(port)))
    # Numbers of files are taken from below: none is left.
    with contextlib.ExitStack() as taken:
        resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.enter_context(socket.socket())
            await until(lambda: bool(caplog.records))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for _ in range(30):  # asyncio takes a second look for each connection it could not take
        await answered(server)
    waiting.close()
    await server.stop()
    assert ["ulimit -n" in record.getMessage() for record in caplog.records] == [True]


async def answered(server: HttpServer) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        assert (await http.get(f"http://{server.address}/health")).status_code == 200


def test_the_gateway_takes_as_many_files_as_it_may() -> None:
    program = (
        "import resource; from manylora_gateway.environment import raise_file_limit;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); raise_file_limit();"
        "soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0];"
        "assert soft in (hard, 65536), soft"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
