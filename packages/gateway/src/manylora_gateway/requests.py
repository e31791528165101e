"""From request messages to what the core takes: every field checked, every mistake named."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Callable

from google.protobuf.message import Message as ProtoMessage

from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.config import LimitsConfig
from manylora_gateway.engine import ChatPrompt, Message, Prompt, Sampling, TextPrompt, TokenPrompt
from manylora_gateway.errors import InvalidRequestError, Violation
from manylora_gateway.inference import GenerationRequest

ROLES = ("system", "user", "assistant")
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256

_Say = Callable[[str, str], None]


class Requests:
    """Reads requests under the limits of one gateway.

    Args:
        max_context: tokens of prompt and answer together.
    """

    def __init__(self, limits: LimitsConfig, max_context: int) -> None:
        self._limits = limits
        self._max_context = max_context

    def generation(self, message: pb.GenerateRequest) -> GenerationRequest:
        """What `message` asks for.

        Raises:
            InvalidRequestError: with every field that is wrong.
        """
        violations: list[Violation] = []
        say = _collector(violations)
        if message.ByteSize() > self._limits.max_request_bytes:
            self._too_big(message, say)
        prompt = None if violations else self._prompt(message, say)
        sampling = self._sampling(message.sampling, say)
        if violations or prompt is None:
            raise InvalidRequestError(violations)
        return GenerationRequest(message.adapter, prompt, sampling)

    def prompt(self, message: pb.CountTokensRequest) -> Prompt:
        """The prompt whose tokens are to be counted.

        Raises:
            InvalidRequestError: with every field that is wrong.
        """
        violations: list[Violation] = []
        say = _collector(violations)
        if message.ByteSize() > self._limits.max_request_bytes:
            self._too_big(message, say)
        prompt = None if violations else self._prompt(message, say)
        if violations or prompt is None:
            raise InvalidRequestError(violations)
        return prompt

    def batch(self, message: pb.BatchGenerateRequest) -> list[pb.GenerateRequest]:
        """The requests of a batch, themselves still unread.

        Raises:
            InvalidRequestError: there are none or too many.
        """
        count = len(message.requests)
        if not count:
            raise InvalidRequestError([Violation("requests", "must not be empty")])
        if count > self._limits.max_batch:
            text = f"has {count} requests; the most is {self._limits.max_batch}"
            raise InvalidRequestError([Violation("requests", text)])
        return list(message.requests)

    def _too_big(self, message: ProtoMessage, say: _Say) -> None:
        fields = {field.name: value for field, value in message.ListFields()}
        sizes = {
            name: len(value) if isinstance(value, str) else value.ByteSize()
            for name, value in fields.items()
        }
        biggest = max(sizes, key=lambda name: sizes[name])
        limit = self._limits.max_request_bytes
        say(biggest, f"the request has {message.ByteSize()} bytes; the most is {limit}")

    def _prompt(
        self, message: pb.GenerateRequest | pb.CountTokensRequest, say: _Say
    ) -> Prompt | None:
        match message.WhichOneof("input"):
            case "chat":
                return _chat(message.chat, say)
            case "text":
                if not message.text:
                    say("text", "must not be empty")
                return TextPrompt(message.text)
            case "tokens":
                assert isinstance(message, pb.GenerateRequest)
                ids = tuple(message.tokens.ids)
                if not ids:
                    say("tokens.ids", "must not be empty")
                elif len(ids) >= self._max_context:
                    say(
                        "tokens.ids",
                        f"has {len(ids)} tokens; with the answer the most is {self._max_context}",
                    )
                return TokenPrompt(ids)
            case _:
                say("input", "give one of chat, text and tokens")
                return None

    def _sampling(self, message: pb.Sampling, say: _Say) -> Sampling:
        limits = self._limits
        max_tokens = limits.default_max_tokens
        if message.HasField("max_tokens"):
            max_tokens = message.max_tokens
            if not 1 <= max_tokens <= self._max_context:
                say("sampling.max_tokens", f"must be from 1 to {self._max_context}")
        temperature = message.temperature if message.HasField("temperature") else 0.0
        if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
            say("sampling.temperature", f"must be from 0 to {MAX_TEMPERATURE:g}")
        top_p = message.top_p if message.HasField("top_p") else 1.0
        if not (math.isfinite(top_p) and 0 < top_p <= 1):
            say("sampling.top_p", "must be above 0 and at most 1")
        if len(message.stop) > MAX_STOP_STRINGS:
            say("sampling.stop", f"has {len(message.stop)} strings; the most is {MAX_STOP_STRINGS}")
        for index, stop in enumerate(message.stop):
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                say(f"sampling.stop[{index}]", f"must have 1 to {MAX_STOP_LENGTH} characters")
        logprobs = message.logprobs if message.HasField("logprobs") else None
        if logprobs is not None and logprobs > limits.max_logprobs:
            say("sampling.logprobs", f"must be at most {limits.max_logprobs}")
        return Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=message.top_k,
            seed=message.seed if message.HasField("seed") else None,
            stop=tuple(message.stop),
            ignore_eos=message.ignore_eos,
            logprobs=logprobs,
        )


def _chat(message: pb.Chat, say: _Say) -> ChatPrompt:
    if not message.messages:
        say("chat.messages", "must not be empty")
    for index, turn in enumerate(message.messages):
        if turn.role not in ROLES:
            say(f"chat.messages[{index}].role", f"must be one of {', '.join(ROLES)}")
    return ChatPrompt(tuple(Message(turn.role, turn.content) for turn in message.messages))


def _collector(violations: list[Violation]) -> _Say:
    def say(field: str, message: str) -> None:
        violations.append(Violation(field, message))

    return say
