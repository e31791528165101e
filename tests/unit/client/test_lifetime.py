"""Calls to servers that are not there or not ready, and of clients that are closed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest

from manylora_client import (
    ClientError,
    ClosedError,
    Generation,
    Request,
    StatusError,
    UnavailableError,
    UnreachableError,
)
from tests.unit.client.conftest import AnyClient
from tests.unit.client.scripted import Answer, Failure, ScriptedServer, vacant_address

Serve = Callable[..., ScriptedServer]
Connect = Callable[..., AnyClient]


@pytest.fixture
def vacant() -> Iterator[str]:
    with vacant_address() as address:
        yield address


def test_no_server_says_where_and_how_to_start_one(vacant: str, connect: Connect) -> None:
    client = connect(vacant)

    for call in (lambda: client.generate("x"), client.list_adapters):
        with pytest.raises(UnreachableError) as raised:
            call()
        assert f"no manylora server answers at {vacant}" in str(raised.value)
        assert "manylora serve" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_client_made_before_its_server_finds_it_later(
    vacant: str, serve: Serve, connect: Connect
) -> None:
    client = connect(vacant)
    with pytest.raises(UnreachableError):
        client.generate("x")

    serve({"": Answer("here")}, port=int(vacant.rpartition(":")[2]))

    assert _eventually(lambda: client.generate("x"), UnreachableError).text == "here"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_call_is_repeated_when_the_server_says_when_to_come_back(
    code: grpc.StatusCode, serve: Serve, connect: Connect
) -> None:
    not_now = Failure(code, "draining", retry_after=0.05)
    replies = [not_now, not_now, Answer("at last")]
    server = serve(lambda _: replies.pop(0))

    begun = time.monotonic()
    answer = connect(server.target, retries=2).generate("x")

    assert answer.text == "at last"
    assert len(server.service.received) == 3
    assert time.monotonic() - begun >= 0.1, "it came back before it was told to"


@pytest.mark.parametrize(
    ("settings", "failure"),
    [
        ({}, Failure(grpc.StatusCode.UNAVAILABLE, retry_after=0.01)),
        ({"retries": 3}, Failure(grpc.StatusCode.UNAVAILABLE)),
        ({"retries": 3}, Failure(grpc.StatusCode.RESOURCE_EXHAUSTED)),
        ({"retries": 3}, Failure(grpc.StatusCode.ABORTED, retry_after=0.01)),
        ({"retries": 3, "timeout": 60.0}, Failure(grpc.StatusCode.UNAVAILABLE, retry_after=600.0)),
    ],
    ids=["not asked to", "no RetryInfo", "full for good", "another status", "past the deadline"],
)
def test_a_call_is_otherwise_sent_once(
    settings: dict[str, float], failure: Failure, serve: Serve, connect: Connect
) -> None:
    server = serve({"": failure})

    with pytest.raises(StatusError):
        connect(server.target, **settings).generate("x")

    assert len(server.service.received) == 1


def test_retries_run_out(serve: Serve, connect: Connect) -> None:
    server = serve({"": Failure(grpc.StatusCode.UNAVAILABLE, retry_after=0.0)})

    with pytest.raises(UnavailableError):
        connect(server.target, retries=2).generate("x")

    assert len(server.service.received) == 3


def test_a_closed_client_says_so(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"": Answer()}).target)
    client.generate("x")
    client.close()

    for call in (
        lambda: client.generate("x"),
        lambda: client.stream("x"),
        lambda: client.batch([Request("x")]),
        client.list_adapters,
    ):
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize("kind", ["generate", "batch", "stream"])
def test_closing_a_client_ends_what_is_under_way(kind: str, serve: Serve, connect: Connect) -> None:
    """Not as if the caller's own task were cancelled, or the server had done it."""
    server = serve({"": Answer(hold_after=0)})
    client = connect(server.target)
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: client.generate("x"),
        "batch": lambda: client.batch([Request("x")]),
        "stream": lambda: list(client.stream("x")),
    }

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(calls[kind])
        _until_in_flight(server, call)
        client.close()
        with pytest.raises(ClosedError):
            call.result(timeout=60)


def test_a_stream_that_is_closed_elsewhere_ends(serve: Serve, connect: Connect) -> None:
    server = serve({"": Answer("one two", hold_after=1)})
    stream = connect(server.target).stream("x")
    assert next(stream).text == "one"

    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: list(stream))
        stream.close()
        assert rest.result(timeout=60) == []


def test_closing_a_client_ends_the_wait_for_another_attempt(serve: Serve, connect: Connect) -> None:
    later = Failure(grpc.StatusCode.UNAVAILABLE, "later", retry_after=0.5)
    server = serve({"": later, "up": Answer()})
    client = connect(server.target, retries=1000)

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, "x")
        while not (server.service.received or call.done()):
            pass
        # Its answer comes behind that of the call before it, on the same connection.
        client.generate("x", "up")
        client.close()
        with pytest.raises(ClosedError):
            call.result(timeout=60)


def _until_in_flight(server: ScriptedServer, call: Future[object]) -> None:
    while not (server.service.in_flight or call.done()):
        pass


def _eventually(call: Callable[[], Generation], error: type[ClientError]) -> Generation:
    """Calls until `error` is no longer raised, for a minute at most."""
    end = time.monotonic() + 60
    while True:
        try:
            return call()
        except error:
            if time.monotonic() > end:
                raise
