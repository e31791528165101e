"""The asynchronous client; method for method the synchronous one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar, Unpack

import grpc

import manylora.inference.v1.inference_pb2 as pb
from manylora.inference.v1.inference_pb2_grpc import InferenceServiceStub
from manylora_client import wire
from manylora_client.channel import (
    DEFAULT_TIMEOUT,
    MAX_MESSAGE_BYTES,
    Attempts,
    CallMetadata,
    channel_options,
    deadline,
    resolve_credentials,
    resolve_target,
)
from manylora_client.errors import ClosedError, StatusError
from manylora_client.readers import BatchReader, StreamReader
from manylora_client.status import call_error
from manylora_client.types import (
    AdapterListing,
    AdapterVersion,
    Delta,
    Finished,
    Generation,
    Input,
    Request,
    SamplingOptions,
    Started,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from google.protobuf.message import Message

    from manylora.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub

Response = TypeVar("Response", bound="Message")


class AsyncClient:
    """Talks to one gateway from one event loop, that of its first call.

        async with AsyncClient() as client:
            answer = await client.generate("The capital of France is", max_tokens=8)

    Every method raises a StatusError of errors.py when the call fails, and InvalidInputError when
    its arguments cannot be sent. Cancelling the task that waits for a call cancels the call.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        retries: int = 0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Prepares a channel; the first call connects it.

        Args:
            target: HOST:PORT; None: MANYLORA_SERVER, or 127.0.0.1:50051.
            credentials: for TLS, from `tls_credentials`; None: those of the MANYLORA_TLS_CA, _CERT
                and _KEY variables, else plain text.
            token: says who calls; None: MANYLORA_TOKEN, if set.
            timeout: seconds for each call that names no timeout of its own; None: no deadline.
            retries: how often a call is repeated when the server says UNAVAILABLE or
                RESOURCE_EXHAUSTED and when to come back; streams and batches are never repeated.
            max_message_bytes: largest message sent or received.
        """
        self.target = resolve_target(target)
        self._credentials = resolve_credentials(credentials)
        self._metadata = CallMetadata(token)
        self._timeout = timeout
        self._retries = retries
        self._options = channel_options(max_message_bytes)
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def generate(
        self,
        input: Input,  # noqa: A002 - the protocol's word
        adapter: str = "",
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - sent to the server as the deadline
        request_id: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Returns the whole answer of `adapter` to `input`.

        Args:
            input: text, chat messages or token ids.
            adapter: an adapter reference NAME[@SELECTOR]; empty: the bare base.
            timeout: seconds; None: the client's.
            request_id: names the request in the answer and the gateway's log; None: the gateway
                makes a name.
            sampling: see SamplingOptions.
        """
        message = wire.generate_request(Request(input, adapter, **sampling))
        response = await self._call(self._stub().Generate, message, timeout, request_id)
        return wire.generation(response)

    def stream(
        self,
        input: Input,  # noqa: A002 - the protocol's word
        adapter: str = "",
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> "AsyncGenerationStream":
        """Asks as `generate` does and returns the answer while it is made."""
        message = wire.generate_request(Request(input, adapter, **sampling))
        call = self._stub().GenerateStream(
            message, timeout=self._seconds(timeout), metadata=self._metadata.of(request_id)
        )
        return AsyncGenerationStream(call, self.target, self._check_open)

    async def batch(
        self,
        requests: Sequence[Request],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - sent to the server as the deadline
    ) -> list[Generation | StatusError]:
        """Asks many requests in one call; a request that fails does not harm the others.

        Returns:
            For each request, in their order, its answer or the error it failed with.
        """
        message = pb.BatchGenerateRequest(requests=[wire.generate_request(r) for r in requests])
        collected = BatchReader(len(requests))
        try:
            async for response in self._stub().BatchGenerate(
                message, timeout=self._seconds(timeout), metadata=self._metadata.of(None)
            ):
                collected.feed(response)
        except asyncio.CancelledError:
            if not _is_cancelled():
                self._check_open()
            raise
        except grpc.RpcError as failure:
            raise call_error(failure, self.target) from failure
        return collected.results()

    async def count_tokens(
        self,
        input: Input,  # noqa: A002 - the protocol's word
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - sent to the server as the deadline
    ) -> int:
        """Returns how many prompt tokens `input`, text or chat messages, makes."""
        message = wire.count_request(input)
        return (await self._call(self._stub().CountTokens, message, timeout)).tokens

    async def list_adapters(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - sent to the server as the deadline
    ) -> list[AdapterListing]:
        """Returns the adapters the gateway knows and what it serves of each."""
        response = await self._call(self._stub().ListAdapters, pb.ListAdaptersRequest(), timeout)
        return wire.adapter_listings(response)

    async def close(self) -> None:
        """Cancels what is under way, which raises ClosedError, and closes the connection."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _stub(self) -> "InferenceServiceAsyncStub":
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._channel is None:
            # Not in __init__: a channel belongs to the event loop it is made in, and a client may
            # be made before there is one.
            self._loop = loop
            self._channel = (
                grpc.aio.insecure_channel(self.target, self._options)
                if self._credentials is None
                else grpc.aio.secure_channel(self.target, self._credentials, self._options)
            )
        if self._loop is not loop:
            raise ClosedError(
                f"the client of {self.target} belongs to another event loop: make one for each loop"
            )
        return InferenceServiceStub(self._channel)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the client of {self.target} is closed")

    async def _call(
        self,
        method: "Callable[..., Awaitable[Response]]",
        message: "Message",
        timeout: float | None,  # noqa: ASYNC109 - sent to the server as the deadline
        request_id: str | None = None,
    ) -> Response:
        metadata = self._metadata.of(request_id)
        attempts = Attempts(self._retries, self._seconds(timeout))
        while True:
            # Each time: it may be closed between two attempts.
            self._check_open()
            try:
                return await method(message, timeout=attempts.remaining(), metadata=metadata)
            except asyncio.CancelledError:
                if not _is_cancelled():
                    self._check_open()
                raise
            except grpc.RpcError as failure:
                error = call_error(failure, self.target)
                delay = attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            await asyncio.sleep(delay)

    def _seconds(self, timeout: float | None) -> float | None:
        return deadline(timeout, self._timeout)


class AsyncGenerationStream(AsyncIterator[Delta]):
    """An answer while it is made: iterates over the deltas.

        async with client.stream("Once upon a time", "tales@production") as answer:
            print(answer.adapter)
            async for delta in answer:
                print(delta.text, end="")

    Entering the `async with` waits until the server has admitted the request; leaving it, `close`
    and dropping the last reference cancel what is not made yet. Errors of the call are raised
    where the stream is read.
    """

    def __init__(self, call: "_StreamCall", target: str, check_open: Callable[[], None]) -> None:
        self._call = call
        self._check_open = check_open
        self._events = aiter(call)
        self._target = target
        self._reader = StreamReader()
        self._closed = False

    @property
    def started(self) -> Started:
        """The first event; there once the `async with` is entered or a delta has come.

        Raises:
            ClosedError: before that.
        """
        if self._reader.started is None:
            raise ClosedError("the stream has not started yet: enter it with `async with`")
        return self._reader.started

    @property
    def adapter(self) -> AdapterVersion | None:
        """The version that answers, None for the bare base; there when `started` is."""
        return self.started.adapter

    @property
    def finished(self) -> Finished | None:
        """The last event; None before it has come."""
        return self._reader.finished

    async def result(self) -> Generation:
        """Reads what is left and returns the whole answer, as `generate` would have."""
        async for _ in self:
            pass
        return self._reader.generation()

    async def close(self) -> None:
        """Cancels the call if it is still under way; iteration ends."""
        self._closed = True
        self._call.cancel()

    async def __anext__(self) -> Delta:
        while (message := await self._receive()) is not None:
            delta = self._reader.feed(message)
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        while self._reader.started is None:
            message = await self._receive()
            if message is None:
                raise ClosedError("the stream was closed before its first event")
            self._reader.feed(message)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # grpc.aio keeps a call alive that nobody reads, e.g. after a `break` out of an `async for`.
        self._call.cancel()

    async def _receive(self) -> pb.GenerateStreamResponse | None:
        """The next event; None at the end of the stream and after `close`."""
        if self._closed:
            return None
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            self._reader.end()
            return None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            if self._closed:
                return None
            self._check_open()
            raise
        except grpc.RpcError as failure:
            if self._closed:
                return None
            self._check_open()
            raise call_error(failure, self._target) from failure


def _is_cancelled() -> bool:
    """Whether this task is cancelled, and not only the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _StreamCall(Protocol):
    """What is needed of the object a server-streaming call returns."""

    def __aiter__(self) -> AsyncIterator[pb.GenerateStreamResponse]: ...

    def cancel(self) -> object: ...
