"""Making a client: light, from the environment, over TLS; many calls at once."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import grpc
import pytest

from manylora_client import (
    AsyncClient,
    Client,
    ClosedError,
    Generation,
    InvalidInputError,
    Request,
    UnimplementedError,
    UnreachableError,
    tls_credentials,
)
from tests.unit.client.conftest import AnyClient
from tests.unit.client.scripted import Answer, ScriptedServer, run

Serve = Callable[..., ScriptedServer]
Connect = Callable[..., AnyClient]


def test_importing_the_package_does_not_import_grpc() -> None:
    program = (
        "import sys, manylora_client; manylora_client.NotFoundError, manylora_client.Generation;"
        "assert not {'grpc', 'google.protobuf', 'manylora'} & set(sys.modules);"
        "manylora_client.Client; assert 'grpc' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_server_is_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    server = serve({"": Answer("found")})
    monkeypatch.setenv("MANYLORA_SERVER", server.target)

    with Client() as client:
        assert client.target == server.target
        assert client.generate("x").text == "found"
    monkeypatch.delenv("MANYLORA_SERVER")
    assert Client().target == AsyncClient().target == "127.0.0.1:50051"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("http://127.0.0.1:50051", "HOST:PORT of gRPC, not a URL"),
        ("127.0.0.1:99999", "at most 65535: 127.0.0.1:99999"),
        ("localhost", "its port is missing: localhost"),
        ("localhost:", "its port is missing: localhost:"),
        ("[::1]", "its port is missing: "),
    ],
)
def test_what_is_no_address_is_told_before_anything_is_sent(target: str, told: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(InvalidInputError, match=told):
            make(target)


class OfHttp(StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")


def test_a_server_of_http_is_told_from_none(connect: Connect) -> None:
    with ThreadingTCPServer(("127.0.0.1", 0), OfHttp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UnreachableError, match="speaks HTTP and not gRPC"):
            connect(f"127.0.0.1:{server.server_address[1]}").generate("x")
        server.shutdown()


def test_another_port_of_the_gateway_is_told(connect: Connect) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(UnimplementedError, match="tells which port is which"):
        connect(f"127.0.0.1:{port}").generate("x")
    server.stop(None)


def test_credentials_make_the_channel_secure(serve: Serve, connect: Connect) -> None:
    server = serve({"": Answer()}, credentials=grpc.local_server_credentials())
    secure = connect(server.target, credentials=grpc.local_channel_credentials())

    assert secure.generate("x").text == Answer().text


def test_a_certificate_is_asked_for_over_tls(serve: Serve, connect: Connect) -> None:
    plain = serve({"": Answer()})

    with pytest.raises(UnreachableError):
        connect(plain.target, credentials=grpc.ssl_channel_credentials(), timeout=60).generate("x")


def test_a_tls_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "ca.pem"

    with pytest.raises(InvalidInputError, match=f"^{gone} cannot be read: No such file"):
        tls_credentials(gone)


@pytest.mark.parametrize("given", ["certificate", "key"])
def test_a_certificate_and_its_key_go_together(given: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="go together"):
        tls_credentials(**{given: tmp_path / "one.pem"})


def test_threads_share_one_client(serve: Serve) -> None:
    server = serve(lambda request: Answer(request.text))

    with Client(server.target) as client, ThreadPoolExecutor(8) as pool:
        texts = [f"prompt {number}" for number in range(64)]
        assert [answer.text for answer in pool.map(client.generate, texts)] == texts


def test_tasks_share_one_client_made_before_the_loop(serve: Serve) -> None:
    server = serve(lambda request: Answer(request.text))
    client = AsyncClient(server.target)
    texts = [f"prompt {number}" for number in range(64)]

    async def ask_all() -> list[str]:
        async with client:
            answers = await asyncio.gather(*(client.generate(text) for text in texts))
        return [answer.text for answer in answers]

    assert run(ask_all()) == texts


def test_a_client_of_another_loop_says_so(serve: Serve) -> None:
    client = AsyncClient(serve({"": Answer()}).target)

    async def ask() -> Generation:
        return await client.generate("x")

    assert run(ask()).text == Answer().text
    with pytest.raises(ClosedError, match="make one for each loop"):
        asyncio.run(ask())


def test_cancelling_the_task_cancels_the_call(serve: Serve) -> None:
    server = serve({"": Answer(hold_after=0)})

    async def ask_and_give_up() -> None:
        async with AsyncClient(server.target) as client:
            call = asyncio.create_task(client.generate("x"))
            await asyncio.to_thread(until_under_way, server, call)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run(ask_and_give_up())
    assert server.service.cancelled.wait(60)


def until_under_way(server: ScriptedServer, call: asyncio.Task[Any]) -> None:
    """Until the server has it: what is cancelled before never reaches the server."""
    while not (server.service.in_flight or call.done()):
        pass


@pytest.mark.parametrize("kind", ["generate", "batch", "stream"])
def test_a_cancelled_caller_stays_cancelled_where_the_client_is_closed(
    kind: str, serve: Serve
) -> None:
    """As where one timeout ends both; ClosedError would have the caller go on."""
    server = serve({"": Answer(hold_after=0)})

    async def ask(client: AsyncClient) -> None:
        async with asyncio.TaskGroup():
            if kind == "generate":
                await client.generate("x")
            elif kind == "batch":
                await client.batch([Request("x")])
            else:
                await client.stream("x").result()

    async def both() -> None:
        client = AsyncClient(server.target)
        call = asyncio.create_task(ask(client))
        await asyncio.to_thread(until_under_way, server, call)
        call.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(both())
