"""The models that judge, behind one protocol."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeAlias

import httpx
from pydantic import BaseModel, Field, ValidationError

from manylora_client import (
    AsyncClient,
    ClientError,
    DeadlineExceededError,
    ResourceExhaustedError,
    SamplingOptions,
    UnavailableError,
)
from manylora_evaluator.errors import AttemptError
from manylora_evaluator.judge_settings import GatewayModel, JudgeModel, OpenAIModel

Chat: TypeAlias = Sequence[Mapping[str, str]]

REFUSALS = {301, 302, 307, 308, 401, 403, 404, 405}
"""HTTP statuses that tell of the key or the address."""
LARGEST_ANSWER = 4 * 1024 * 1024
"""Bytes of an HTTP answer that are read."""


@dataclass(frozen=True)
class Completion:
    """What a model answered."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Model(Protocol):
    """Completes a chat."""

    @property
    def identity(self) -> str:
        """What answers: equal for equal models."""
        ...

    async def complete(self, chat: Chat, schema: Mapping[str, Any], sample: int) -> Completion:
        """The answer to `chat`, in the form of `schema` where the model can be held to it.

        Args:
            chat: the messages.
            schema: JSON Schema of the answer.
            sample: which of several samples; seeds them.

        Raises:
            AttemptError: there is no answer.
        """
        ...


@asynccontextmanager
async def open_model(settings: JudgeModel, server: str, token: str | None) -> AsyncGenerator[Model]:
    """Connects to the model that `settings` describe.

    Args:
        settings: the model.
        server: the evaluated gateway.
        token: what that one is shown, and nobody else; None: MANYLORA_TOKEN.

    Raises:
        JudgeError: its key is not there.
        StatusError: the gateway is away or cannot serve the adapter.
    """
    match settings:
        case OpenAIModel():
            key = settings.api_key()
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(headers=headers, timeout=settings.timeout_s) as http:
                yield _OpenAI(settings, http)
        case GatewayModel():
            target, shown = (settings.server, None) if settings.server else (server, token)
            async with AsyncClient(target, token=shown, timeout=settings.timeout_s) as client:
                answer = await client.generate("?", settings.adapter, max_tokens=1)
                version = answer.adapter
                pinned = "" if version is None else f"{version.name}@{version.digest}"
                yield _Gateway(settings, client, pinned)


class _Gateway:
    def __init__(self, settings: GatewayModel, client: AsyncClient, pinned: str) -> None:
        self._settings = settings
        self._client = client
        self._pinned = pinned
        # A digest is the same adapter wherever it is served; a base is known by its gateway.
        self.identity = pinned or f"{client.target} bare base"

    async def complete(self, chat: Chat, schema: Mapping[str, Any], sample: int) -> Completion:
        options: SamplingOptions = {
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
            "seed": sample if self._settings.temperature else None,
            "json_schema": schema if self._settings.response_format == "json_schema" else None,
            "json_object": self._settings.response_format == "json_object",
        }
        try:
            answer = await self._client.generate(chat, self._pinned, **options)
        except (ResourceExhaustedError, UnavailableError) as error:
            raise AttemptError(str(error), again=True, after=error.retry_after) from error
        except DeadlineExceededError as error:
            raise AttemptError(str(error), again=True) from error
        except ClientError as error:
            raise AttemptError(str(error), again=False) from error
        return Completion(answer.text, answer.usage.prompt_tokens, answer.usage.completion_tokens)


class _OpenAI:
    def __init__(self, settings: OpenAIModel, http: httpx.AsyncClient) -> None:
        self._settings = settings
        self._http = http
        self._url = f"{settings.url.rstrip('/')}/chat/completions"
        more = json.dumps(settings.body, sort_keys=True) if settings.body else ""
        self.identity = f"{self._url} {settings.model} {more}".rstrip()

    async def complete(self, chat: Chat, schema: Mapping[str, Any], sample: int) -> Completion:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": list(chat),
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
        }
        if self._settings.temperature:
            body["seed"] = sample
        if self._settings.response_format == "json_schema":
            form = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif self._settings.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        asked = body | self._settings.body
        body = {name: value for name, value in asked.items() if value is not None}
        try:
            # httpx bounds the wait for each piece; a server that drips is bounded here.
            async with asyncio.timeout(self._settings.timeout_s):
                status, headers, content = await self._post(body)
        except TimeoutError as error:
            message = f"no answer within {self._settings.timeout_s:g} s"
            raise AttemptError(message, again=True) from error
        except httpx.TimeoutException as error:
            message = f"no answer within {self._settings.timeout_s:g} s"
            raise AttemptError(message, again=True) from error
        except httpx.HTTPError as error:
            nobody = isinstance(error, httpx.ConnectError)
            message = f"{type(error).__name__}: {error}"
            raise AttemptError(message, again=True, refused=nobody) from error
        if status != 200:
            said = content[:300].decode("utf-8", "replace")
            if "location" in headers:
                said = f"it has moved to {headers['location']}"
            raise AttemptError(
                f"HTTP {status}: {said}",
                again=status in (408, 409, 429) or status >= 500,
                after=_seconds(headers.get("retry-after")),
                refused=status in REFUSALS,
            )
        return _completion(content)

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        async with self._http.stream("POST", self._url, content=content, headers=headers) as reply:
            read = bytearray()
            async for piece in reply.aiter_bytes():
                read += piece
                if len(read) > LARGEST_ANSWER:
                    raise AttemptError("the answer is too large", again=False)
            return reply.status_code, reply.headers, bytes(read)


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    # Some endpoints send null where they do not count.
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _ChatCompletion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _completion(content: bytes) -> Completion:
    try:
        parsed = _ChatCompletion.model_validate_json(content)
    except ValidationError as error:
        raise AttemptError("the answer is no chat completion", again=False) from error
    usage = parsed.usage or _Usage()
    return Completion(
        parsed.choices[0].message.content or "",
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
    )


def _seconds(retry_after: str | None) -> float | None:
    """What `Retry-After` asks for: seconds, or a date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after):
        return float(retry_after)
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return None
