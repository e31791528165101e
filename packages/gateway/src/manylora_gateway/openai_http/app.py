"""The HTTP application: OpenAI's endpoints, models and health.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{reference}
    GET /health

Every completion bears `x-request-id`: the client's own, or one that is made here.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora_gateway.calls import MAX_SESSION, SESSION_KEY, TRACEPARENT_KEY, Call, set_call
from manylora_gateway.engine import Delta
from manylora_gateway.errors import (
    GatewayError,
    InvalidRequestError,
    StalledError,
    Violation,
)
from manylora_gateway.generation import GenerationRequest, Started
from manylora_gateway.health import health_route
from manylora_gateway.inference import Inference
from manylora_gateway.limits import check_request_id, request_id_to_tell
from manylora_gateway.openai_http.bodies import ChatBody, CompletionBody, read_body
from manylora_gateway.openai_http.problems import (
    BodyCutOffError,
    BodyEncodedError,
    BodyTooBigError,
    Problem,
    problem_of,
)
from manylora_gateway.openai_http.reading import Asked, Reading
from manylora_gateway.openai_http.replies import Kind, Replies, error_event, listed, models
from manylora_gateway.openai_http.server import HANG_UP
from manylora_gateway.stalls import patience
from manylora_gateway.tenants import caller

BODY_TIMEOUT_S = 30.0
"""A client that sends its body slower than this keeps a connection from others."""
ENDPOINTS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{reference}",
    "GET /health",
)
MAX_PATH_TOLD = 100
"""Characters of a wrong path that its error repeats."""
REQUEST_ID_HEADER = "x-request-id"
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}

Event = Started | Delta


def application(
    inference: Inference,
    reading: Reading,
    healthy: Callable[[], bool],
) -> ASGIApp:
    """The application.

    Args:
        inference: answers.
        reading: reads bodies.
        healthy: whether new requests are wanted.
    """
    routes = [
        health_route(healthy),
        Route("/v1/chat/completions", _Completions("chat", inference, reading), methods=["POST"]),
        Route("/v1/completions", _Completions("text", inference, reading), methods=["POST"]),
        Route("/v1/models", _list_models(inference, reading), methods=["GET"]),
        Route("/v1/models/{reference:path}", _show_model(inference, reading), methods=["GET"]),
    ]
    # Starlette raises again, for the server to log, what has a handler as Exception alone.
    handlers: dict[Any, Any] = {
        HTTPException: _http_error,
        GatewayError: _error,
        Exception: _error,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


class _Completions:
    """An endpoint that generates. It speaks ASGI itself: it must hear of a client that leaves."""

    def __init__(self, kind: Kind, inference: Inference, reading: Reading) -> None:
        self._kind: Kind = kind
        self._inference = inference
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; what it held is freed as soon as its client is gone."""
        request = Request(scope, receive)
        said = request.headers.get(REQUEST_ID_HEADER, "")
        request_id = request_id_to_tell(said)
        try:
            with self._inference.metrics.refusals(request_id, caller().name):
                check_request_id(said)
                asked = await self._read(request, request_id)
        except BodyCutOffError:
            return
        except Exception as error:
            await tell(problem_of(error), request_id)(scope, receive, send)
            return
        hang_up = scope["state"][HANG_UP]
        send = _patient(send, self._reading.limits.config.stall_s, hang_up)
        answering = asyncio.create_task(self._answer(asked, request_id, scope, receive, send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _read(self, request: Request, request_id: str) -> Asked:
        headers = request.headers
        set_call(Call(headers.get(SESSION_KEY, "")[:MAX_SESSION], headers.get(TRACEPARENT_KEY, "")))
        data = await _json(request, self._reading.limits.config.max_request_bytes)
        if self._kind == "chat":
            return self._reading.chat(read_body(ChatBody, data), request_id)
        return self._reading.completion(read_body(CompletionBody, data), request_id)

    async def _answer(
        self, asked: Asked, request_id: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answers = asked.requests[0].sampling.n
        replies = Replies(self._kind, self._reading.base, request_id, answers)
        try:
            if asked.stream:
                await self._stream(asked, replies, request_id, send)
                return
            tenant = caller()
            async with self._inference.until_cut_off(), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._inference.generate(request, tenant))
                    for request in asked.requests
                ]
            body = replies.whole([task.result() for task in tasks])
            response = JSONResponse(body, headers={REQUEST_ID_HEADER: request_id})
        except Exception as error:
            response = tell(problem_of(_first(error), asked.form), request_id)
        await response(scope, receive, send)

    async def _stream(self, asked: Asked, replies: Replies, request_id: str, send: Send) -> None:
        """Sends events; the status waits for the first token, so that it tells what went wrong.

        Raises:
            Exception: before anything was sent.
        """
        chunks = replies.stream(len(asked.requests), include_usage=asked.include_usage)
        held: list[bytes] = []
        open_ = False
        try:
            async with self._inference.until_cut_off(), aclosing(self._events(asked)) as events:
                async for prompt, event in events:
                    held += chunks.of(prompt, event)
                    if isinstance(event, Started):
                        continue
                    if not open_:
                        await send(_head(request_id))
                        open_ = True
                    await send(_part(b"".join(held)))
                    held.clear()
            await send(_part(b"".join(chunks.last()), last=True))
        except Exception as error:
            if not open_:
                raise
            body = problem_of(_first(error), asked.form).body()
            await send(_part(error_event(body), last=True))

    async def _events(self, asked: Asked) -> AsyncGenerator[tuple[int, Event], None]:
        """What comes of each prompt, in the order it comes."""
        tenant = caller()
        if len(asked.requests) == 1:
            async with aclosing(self._inference.stream(asked.requests[0], tenant)) as events:
                async for event in events:
                    yield 0, event
            return
        # Small: prompts whose answers nobody reads yet wait.
        queue: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue(1)

        async def follow(prompt: int, request: GenerationRequest) -> None:
            try:
                async with aclosing(self._inference.stream(request, tenant)) as events:
                    async for event in events:
                        await queue.put((prompt, event))
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(None)

        tasks = [
            asyncio.create_task(follow(prompt, request))
            for prompt, request in enumerate(asked.requests)
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _list_models(inference: Inference, reading: Reading) -> Callable[..., Awaitable[Response]]:
    async def endpoint(_request: Request) -> Response:
        adapters = await inference.adapters(caller())
        with_base = caller().may_use("")

        def listing() -> Response:
            data = models(adapters, reading.base, with_base=with_base)
            return JSONResponse({"object": "list", "data": data})

        return await asyncio.to_thread(listing)

    return endpoint


def _show_model(inference: Inference, reading: Reading) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        reference: str = request.path_params["reference"]
        if reference == reading.base:
            caller().require_adapter("")
            return JSONResponse(listed(reference, None, reading.base))
        version = await inference.resolve(reference, caller())
        return JSONResponse(listed(reference, version, reading.base))

    return endpoint


async def _json(request: Request, limit: int) -> object:
    """The body, parsed.

    Raises:
        InvalidRequestError: it is too long, too slow, compressed, or not JSON.
        BodyCutOffError: the client left.
    """
    coding = ", ".join(request.headers.getlist("content-encoding"))
    if coding.strip().lower() not in ("", "identity"):
        raise BodyEncodedError(coding)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise BodyTooBigError(limit)
    except ClientDisconnect as error:
        raise BodyCutOffError from error
    except TimeoutError as error:
        text = f"the body was not whole after {BODY_TIMEOUT_S:g} s"
        raise InvalidRequestError([Violation("", text)]) from error
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        text = f"the body is not JSON: {_why(error)}"
        raise InvalidRequestError([Violation("", text)]) from error


def _no_constant(name: str) -> object:
    raise InvalidRequestError([Violation("", f"the body is not JSON: it has no {name}")])


def _why(error: ValueError | RecursionError) -> str:
    """What is wrong with a body, without what Python says of itself."""
    match error:
        case json.JSONDecodeError():
            return str(error)
        case UnicodeDecodeError():
            return f"byte {error.start} is not {error.encoding.upper()}"
        case RecursionError():
            return "objects and arrays are too deep in one another"
        case _:
            return "a number has too many digits"


def _patient(send: Send, stall_s: float, hang_up: Callable[[], None]) -> Send:
    """The same for a client that may stop reading; once it has, nothing more is tried."""
    stalled: StalledError | None = None

    async def patient(message: Message) -> None:
        nonlocal stalled
        if stalled is not None:
            raise stalled
        try:
            async with patience(stall_s):
                await send(message)
        except StalledError as error:
            stalled = error
            # A response that is left unfinished is an error to the server, a client that is gone
            # is not.
            hang_up()
            raise

    return patient


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _head(request_id: str) -> Message:
    headers = EVENT_STREAM | {REQUEST_ID_HEADER: request_id}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def _part(content: bytes, *, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": not last}


def tell(problem: Problem, request_id: str) -> Response:
    """The response of `problem`; the request's id goes with it where it is known."""
    headers = problem.headers()
    if request_id:
        headers[REQUEST_ID_HEADER] = request_id
    return JSONResponse(problem.body(), problem.status, headers)


def _first(error: Exception) -> Exception:
    """Of several prompts that failed, the first failure."""
    if isinstance(error, ExceptionGroup):
        return cast("ExceptionGroup[Exception]", error).exceptions[0]
    return error


async def _http_error(request: Request, error: HTTPException) -> Response:
    """A path or a method that is not there."""
    kind = "invalid_request_error"
    asked = f"{request.method} {request.scope['path'][:MAX_PATH_TOLD]}"
    message = f"{error.detail}: {asked}. There are {', '.join(ENDPOINTS)}."
    response = tell(Problem(error.status_code, message, kind, None, kind), "")
    response.headers.update(error.headers or {})
    return response


async def _error(_request: Request, error: Exception) -> Response:
    return tell(problem_of(error), "")
