"""A real gRPC server whose answers a test writes down beforehand.

with ScriptedServer({"spelling": Answer("receive")}) as server:
    Client(server.target).generate("recieve", "spelling")
"""

import asyncio
import contextlib
import functools
import hashlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

import manylora.inference.v1.inference_pb2 as pb
from manylora.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from manylora.registry.v1.adapter_pb2 import AdapterVersion

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What the server generates: one token and one delta a word."""

    text: str = "a scripted answer"
    version: int = 1
    finish_reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP
    hold_after: int | None = None
    """Waits for ever after so many words; 0 also holds back the stream's first event."""
    together: int = 1
    """Waits until so many requests with such an answer are there."""
    drop_after: int | None = None
    """Ends a stream without a last event after so many words."""


@dataclass(frozen=True)
class Failure:
    """A status the server answers with, its details as the gateway sends them."""

    code: grpc.StatusCode
    message: str = "scripted failure"
    reason: str = "SCRIPTED"
    violations: Mapping[str, str] = field(default_factory=dict[str, str])
    retry_after: float | None = None
    after: int = 0
    """Words of a stream that come first."""

    def status(self) -> Status:
        details = [ErrorInfo(reason=self.reason, domain="manylora"), *self._more()]
        packed = [AnyMessage() for _ in details]
        for container, detail in zip(packed, details, strict=True):
            container.Pack(detail)
        number, _ = self.code.value
        return Status(code=number, message=self.message, details=packed)

    def _more(self) -> Iterator[BadRequest | RetryInfo]:
        if self.violations:
            yield BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field=name, description=description)
                    for name, description in self.violations.items()
                ]
            )
        if self.retry_after is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_after * 1000))
            yield RetryInfo(retry_delay=delay)


Reply = Answer | Failure
Script = Mapping[str, Reply] | Callable[[pb.GenerateRequest], Reply]


def version(name: str, number: int) -> AdapterVersion:
    """The version `number` of `name`, with a digest made up from the two."""
    digest = hashlib.sha256(f"{name}@{number}".encode()).hexdigest()
    return AdapterVersion(name=name, number=number, digest=f"sha256:{digest}")


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread, for servers and for asynchronous clients under test.

    One and never closed: grpc.aio has a single poller a process, which loses events of every loop
    when it meets one for a loop that is gone.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs `coroutine` in the background loop and waits for its result."""
    return asyncio.run_coroutine_threadsafe(coroutine, _background_loop()).result(timeout=60)


@contextlib.contextmanager
def vacant_address() -> Iterator[str]:
    """Where nobody listens, and nobody else can meanwhile but a server that is told to."""
    with socket.socket() as held:
        # As gRPC's servers set it, which may then be bound beside this.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


class ScriptedService(InferenceServiceServicer):
    """Answers by the request's adapter reference, or as a function of the request says."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.received: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        """What came with each call that generates."""
        self.in_flight = 0
        self.most_in_flight = 0
        self._barriers: dict[int, asyncio.Barrier] = {}
        self.cancelled = threading.Event()
        """A call was cancelled before it had its whole answer."""

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GenerateResponse:
        self._note(context)
        with self._counted(request):
            reply = self._reply(request)
            if isinstance(reply, Failure):
                await _abort(context, reply)
            else:
                await self._hold(reply.hold_after is not None)
                await self._gather(reply.together)
                return _response(request, reply)
        raise AssertionError

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        self._note(context)
        with self._counted(request):
            reply = self._reply(request)
            words = reply.text.split(" ") if isinstance(reply, Answer) else ["word"] * reply.after
            if isinstance(reply, Failure) and not words:
                await _abort(context, reply)
            stops = None if isinstance(reply, Failure) else reply.hold_after
            await self._hold(stops == 0)
            served = _version(request, reply.version if isinstance(reply, Answer) else 1)
            started = pb.GenerateStarted(request_id="request-1", adapter=served)
            yield pb.GenerateStreamResponse(started=started)
            answers = max(request.sampling.n, 1)
            for index, word in enumerate(words):
                if isinstance(reply, Answer) and index == reply.drop_after:
                    return
                await self._hold(index > 0 and index == stops)
                text = word if index == 0 else f" {word}"
                for choice in range(answers):
                    delta = pb.GenerateDelta(
                        text=text,
                        token_ids=[index],
                        logprobs=_logprobs(request, index, 1),
                        choice=choice,
                    )
                    yield pb.GenerateStreamResponse(delta=delta)
            if isinstance(reply, Failure):
                await _abort(context, reply)
            else:
                response = _response(request, reply)
                for choice, ended in enumerate(response.choices):
                    last = pb.GenerateDelta(
                        text=f" {choice}", token_ids=ended.token_ids[-1:], choice=choice
                    )
                    yield pb.GenerateStreamResponse(delta=last)
                finished = pb.GenerateFinished(
                    finish_reason=response.finish_reason,
                    usage=response.usage,
                    timing=response.timing,
                    finish_reasons=[choice.finish_reason for choice in response.choices],
                )
                yield pb.GenerateStreamResponse(finished=finished)

    async def BatchGenerate(  # noqa: N802
        self, request: pb.BatchGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.BatchGenerateResponse]:
        self._note(context)
        # Last first: the order of the results is the server's to choose.
        for index, entry in reversed(list(enumerate(request.requests))):
            reply = self._reply(entry)
            if isinstance(reply, Answer):
                with self._counted(entry):
                    await self._hold(reply.hold_after is not None)
                if reply.drop_after is None:
                    yield pb.BatchGenerateResponse(index=index, response=_response(entry, reply))
            else:
                status = reply.status()
                error = pb.BatchGenerateError(
                    code=status.code, message=status.message, details=status.details
                )
                yield pb.BatchGenerateResponse(index=index, error=error)

    async def CountTokens(  # noqa: N802
        self, request: pb.CountTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CountTokensResponse:
        chat = " ".join(message.content for message in request.chat.messages)
        return pb.CountTokensResponse(tokens=len((request.text or chat).split()))

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListAdaptersResponse:
        spelling = pb.AdapterListing(
            name="spelling",
            latest=version("spelling", 2),
            aliases=[
                pb.AliasListing(
                    alias="production",
                    serving=version("spelling", 1),
                    pending=version("spelling", 2),
                    pending_error="rank 64 is above the engine's maximum of 16",
                ),
                pb.AliasListing(alias="staging"),
            ],
        )
        return pb.ListAdaptersResponse(adapters=[spelling])

    def _note(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        received = context.invocation_metadata() or ()
        self.metadata.append({key: str(value) for key, value in received})

    def _reply(self, request: pb.GenerateRequest) -> Reply:
        if callable(self._script):
            return self._script(request)
        unknown = Failure(grpc.StatusCode.NOT_FOUND, f"no adapter {request.adapter!r}")
        return self._script.get(request.adapter, unknown)

    @contextlib.contextmanager
    def _counted(self, request: pb.GenerateRequest) -> Iterator[None]:
        self.received.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            # The second is what a stream gets whose last delta was still being sent.
            self.cancelled.set()
            raise
        finally:
            self.in_flight -= 1

    async def _gather(self, parties: int) -> None:
        barrier = self._barriers.setdefault(parties, asyncio.Barrier(parties))
        await barrier.wait()
        if parties > 1:
            # Time for requests that should not have been sent to be counted too.
            await asyncio.sleep(0.05)

    async def _hold(self, hold: bool) -> None:
        if hold:
            await asyncio.Event().wait()


class ScriptedServer:
    """A `grpc.aio` server with a ScriptedService, in the background loop."""

    def __init__(
        self,
        script: Script,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.service = ScriptedService(script)
        self._server, bound = run(self._start(port, credentials))
        self.target = f"127.0.0.1:{bound}"

    async def _start(
        self, port: int, credentials: grpc.ServerCredentials | None
    ) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        add_InferenceServiceServicer_to_server(self.service, server)
        address = f"127.0.0.1:{port}"
        bound = (
            server.add_secure_port(address, credentials)
            if credentials
            else server.add_insecure_port(address)
        )
        await server.start()
        return server, bound

    def close(self) -> None:
        """Breaks off what is under way and frees the port."""
        run(self._server.stop(None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _version(request: pb.GenerateRequest, number: int) -> AdapterVersion | None:
    return version(request.adapter.partition("@")[0], number) if request.adapter else None


def _response(request: pb.GenerateRequest, answer: Answer) -> pb.GenerateResponse:
    """The answer; each of several ends with a word of its own, its index."""
    several = request.sampling.n > 1
    answers = range(request.sampling.n if several else 1)
    texts = [f"{answer.text} {choice}" if several else answer.text for choice in answers]
    words = len(texts[0].split(" "))
    choices = [
        pb.Choice(text=text, token_ids=range(words), finish_reason=answer.finish_reason)
        for text in texts
    ]
    timing = pb.Timing()
    for part, milliseconds in (("queue", 250), ("load", 500), ("prefill", 1000), ("decode", 2000)):
        getattr(timing, part).FromMilliseconds(milliseconds)
    return pb.GenerateResponse(
        request_id="request-1",
        adapter=_version(request, answer.version),
        text=texts[0],
        token_ids=range(words),
        finish_reason=answer.finish_reason,
        usage=pb.Usage(prompt_tokens=3, completion_tokens=words * len(texts)),
        logprobs=_logprobs(request, 0, words),
        choices=choices if several else (),
        timing=timing,
    )


def _logprobs(request: pb.GenerateRequest, first: int, count: int) -> list[pb.TokenLogprobs]:
    if not request.sampling.HasField("logprobs"):
        return []
    return [
        pb.TokenLogprobs(
            chosen=pb.Candidate(token_id=token, logprob=-0.25),
            top=[
                pb.Candidate(token_id=token + rank, logprob=-0.25 - rank)
                for rank in range(request.sampling.logprobs)
            ],
        )
        for token in range(first, first + count)
    ]


async def _abort(context: grpc.aio.ServicerContext[Any, Any], failure: Failure) -> None:
    status = failure.status()
    await context.abort(
        failure.code,
        failure.message,
        (("grpc-status-details-bin", status.SerializeToString()),),
    )
