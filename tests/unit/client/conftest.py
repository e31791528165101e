"""The two clients behind one face, so that every test of the contract runs against both."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import pytest

from manylora_client import (
    AdapterListing,
    AsyncClient,
    AsyncGenerationStream,
    Client,
    Delta,
    Generation,
    GenerationStream,
    Input,
    Request,
    StatusError,
)
from tests.unit.client.scripted import Script, ScriptedServer, run


class AnyClient(Protocol):
    """What both clients can do, in the form of the synchronous one."""

    def generate(self, prompt: Input, /, adapter: str = "", **options: Any) -> Generation: ...

    def stream(self, prompt: Input, /, adapter: str = "", **options: Any) -> "AnyStream": ...

    def batch(self, requests: Sequence[Request]) -> list[Generation | StatusError]: ...

    def count_tokens(self, prompt: Input, /) -> int: ...

    def list_adapters(self) -> list[AdapterListing]: ...

    def close(self) -> None: ...


class DrivenClient:
    """An AsyncClient, each call of which is run to its end."""

    def __init__(self, target: str, **settings: Any) -> None:
        self._client = AsyncClient(target, **settings)

    def generate(self, prompt: Input, /, adapter: str = "", **options: Any) -> Generation:
        return run(self._client.generate(prompt, adapter, **options))

    def stream(self, prompt: Input, /, adapter: str = "", **options: Any) -> "DrivenStream":
        async def open_stream() -> AsyncGenerationStream:
            return self._client.stream(prompt, adapter, **options)

        return DrivenStream(run(open_stream()))

    def batch(self, requests: Sequence[Request]) -> list[Generation | StatusError]:
        return run(self._client.batch(requests))

    def count_tokens(self, prompt: Input, /) -> int:
        return run(self._client.count_tokens(prompt))

    def list_adapters(self) -> list[AdapterListing]:
        return run(self._client.list_adapters())

    def close(self) -> None:
        run(self._client.close())


class DrivenStream:
    """An AsyncGenerationStream, each step of which is run to its end."""

    def __init__(self, stream: AsyncGenerationStream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def result(self) -> Generation:
        return run(self._stream.result())

    def close(self) -> None:
        run(self._stream.close())

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        async def step() -> Delta | None:
            return await anext(self._stream, None)

        delta = run(step())
        if delta is None:
            raise StopIteration
        return delta

    def __enter__(self) -> Self:
        run(self._stream.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        run(self._stream.__aexit__(None, None, None))


AnyStream = GenerationStream | DrivenStream


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts scripted servers and closes them at the end."""
    servers: list[ScriptedServer] = []

    def start(script: Script, **settings: Any) -> ScriptedServer:
        servers.append(ScriptedServer(script, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., AnyClient]]:
    """Makes clients of one kind and closes them at the end."""
    clients: list[AnyClient] = []

    def make(target: str, **settings: Any) -> AnyClient:
        kind = Client if request.param == "sync" else DrivenClient
        clients.append(kind(target, **settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
