"""The synchronous client."""

import time
from collections.abc import Callable, Iterator, Sequence
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
    from google.protobuf.message import Message

Response = TypeVar("Response", bound="Message")


class Client:
    """Talks to one gateway; safe to share between threads, not with a process forked after a call.

        with Client() as client:
            print(client.generate("The capital of France is", max_tokens=8).text)

    Every method raises a StatusError of errors.py when the call fails, and InvalidInputError when
    its arguments cannot be sent.
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
        self._timeout = timeout
        self._retries = retries
        self._closed = False
        options = channel_options(max_message_bytes)
        self._metadata = CallMetadata(token)
        credentials = resolve_credentials(credentials)
        if credentials is None:
            self._channel = grpc.insecure_channel(self.target, options)
        else:
            self._channel = grpc.secure_channel(self.target, credentials, options)
        self._stub = InferenceServiceStub(self._channel)

    def generate(
        self,
        input: Input,  # noqa: A002 - the protocol's word
        adapter: str = "",
        *,
        timeout: float | None = None,
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
        return wire.generation(self._call(self._stub.Generate, message, timeout, request_id))

    def stream(
        self,
        input: Input,  # noqa: A002 - the protocol's word
        adapter: str = "",
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> "GenerationStream":
        """Asks as `generate` does and returns the answer while it is made."""
        message = wire.generate_request(Request(input, adapter, **sampling))
        self._check_open()
        call = self._stub.GenerateStream(
            message, timeout=self._seconds(timeout), metadata=self._metadata.of(request_id)
        )
        return GenerationStream(call, self.target, self._check_open)

    def batch(
        self, requests: Sequence[Request], *, timeout: float | None = None
    ) -> list[Generation | StatusError]:
        """Asks many requests in one call; a request that fails does not harm the others.

        Returns:
            For each request, in their order, its answer or the error it failed with.
        """
        message = pb.BatchGenerateRequest(requests=[wire.generate_request(r) for r in requests])
        self._check_open()
        collected = BatchReader(len(requests))
        try:
            for response in self._stub.BatchGenerate(
                message, timeout=self._seconds(timeout), metadata=self._metadata.of(None)
            ):
                collected.feed(response)
        except grpc.RpcError as failure:
            self._check_open()
            raise call_error(failure, self.target) from failure
        return collected.results()

    def count_tokens(
        self,
        input: Input,  # noqa: A002 - the protocol's word
        *,
        timeout: float | None = None,
    ) -> int:
        """Returns how many prompt tokens `input`, text or chat messages, makes."""
        message = wire.count_request(input)
        return self._call(self._stub.CountTokens, message, timeout).tokens

    def list_adapters(self, *, timeout: float | None = None) -> list[AdapterListing]:
        """Returns the adapters the gateway knows and what it serves of each."""
        response = self._call(self._stub.ListAdapters, pb.ListAdaptersRequest(), timeout)
        return wire.adapter_listings(response)

    def close(self) -> None:
        """Cancels what is under way, which raises ClosedError, and closes the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self,
        method: Callable[..., Response],
        message: "Message",
        timeout: float | None,
        request_id: str | None = None,
    ) -> Response:
        metadata = self._metadata.of(request_id)
        attempts = Attempts(self._retries, self._seconds(timeout))
        while True:
            # Each time: it may be closed between two attempts.
            self._check_open()
            try:
                return method(message, timeout=attempts.remaining(), metadata=metadata)
            except grpc.RpcError as failure:
                self._check_open()
                error = call_error(failure, self.target)
                delay = attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            time.sleep(delay)

    def _seconds(self, timeout: float | None) -> float | None:
        return deadline(timeout, self._timeout)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the client of {self.target} is closed")


class GenerationStream(Iterator[Delta]):
    """An answer while it is made: iterates over the deltas.

        with client.stream("Once upon a time", "tales@production") as answer:
            print(answer.adapter)
            for delta in answer:
                print(delta.text, end="")

    Entering the `with` waits until the server has admitted the request; leaving it, `close` and
    dropping the last reference cancel what is not made yet. Errors of the call are raised where
    the stream is read.
    """

    def __init__(self, call: "_StreamCall", target: str, check_open: Callable[[], None]) -> None:
        self._call = call
        self._target = target
        self._check_open = check_open
        self._reader = StreamReader()
        self._closed = False

    @property
    def started(self) -> Started:
        """The first event; waits for it."""
        while self._reader.started is None:
            message = self._receive()
            if message is None:
                raise ClosedError("the stream was closed before its first event")
            self._reader.feed(message)
        return self._reader.started

    @property
    def adapter(self) -> AdapterVersion | None:
        """The version that answers, None for the bare base; waits for the first event."""
        return self.started.adapter

    @property
    def finished(self) -> Finished | None:
        """The last event; None before it has come."""
        return self._reader.finished

    def result(self) -> Generation:
        """Reads what is left and returns the whole answer, as `generate` would have."""
        for _ in self:
            pass
        return self._reader.generation()

    def close(self) -> None:
        """Cancels the call if it is still under way; iteration ends."""
        self._closed = True
        self._call.cancel()

    def __next__(self) -> Delta:
        while (message := self._receive()) is not None:
            delta = self._reader.feed(message)
            if delta is not None:
                return delta
        raise StopIteration

    def __enter__(self) -> Self:
        _ = self.started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> pb.GenerateStreamResponse | None:
        """The next event; None at the end of the stream and after `close`."""
        if self._closed:
            return None
        try:
            return next(self._call)
        except StopIteration:
            self._reader.end()
            return None
        except grpc.RpcError as failure:
            if self._closed:
                return None
            self._check_open()
            raise call_error(failure, self._target) from failure


class _StreamCall(Protocol):
    """What is needed of the object a server-streaming call returns."""

    def __next__(self) -> pb.GenerateStreamResponse: ...

    def cancel(self) -> object: ...
