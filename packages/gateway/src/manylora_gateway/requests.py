"""From request messages to what the core takes: every field checked, every mistake named."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

from google.protobuf.message import Message as ProtoMessage

from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.engine import (
    ChatPrompt,
    Constraint,
    Grammar,
    JsonObject,
    JsonSchema,
    Message,
    OneOf,
    Prompt,
    Regex,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from manylora_gateway.errors import InvalidRequestError, Violation
from manylora_gateway.generation import GenerationRequest
from manylora_gateway.limits import Limits

PROMPT_FIELDS = {"messages": "chat.messages", "text": "text", "ids": "tokens.ids"}
"""Field of a prompt's dataclass -> its path in the message."""


class Requests:
    """Reads request messages under the limits of one gateway."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._config = limits.config

    def generation(self, message: pb.GenerateRequest, request_id: str = "") -> GenerationRequest:
        """What `message` asks for.

        Raises:
            InvalidRequestError: with every field that is wrong.
        """
        violations: list[Violation] = []
        prompt = self._prompt(message, violations)
        sampling = self._sampling(message.sampling, violations)
        if violations or prompt is None:
            raise InvalidRequestError(violations)
        return GenerationRequest(message.adapter, prompt, sampling, request_id)

    def prompt(self, message: pb.CountTokensRequest) -> Prompt:
        """The prompt whose tokens are to be counted.

        Raises:
            InvalidRequestError: with every field that is wrong.
        """
        violations: list[Violation] = []
        prompt = self._prompt(message, violations)
        if violations or prompt is None:
            raise InvalidRequestError(violations)
        return prompt

    def batch(self, message: pb.BatchGenerateRequest) -> list[pb.GenerateRequest]:
        """The requests of a batch, themselves still unread.

        Raises:
            InvalidRequestError: there are none or too many.
        """
        count, most = len(message.requests), self._config.max_batch
        if not count:
            raise InvalidRequestError([Violation("requests", "must not be empty")])
        if count > most:
            text = f"has {count} requests; the most is {most}"
            raise InvalidRequestError([Violation("requests", text)])
        return list(message.requests)

    def _prompt(
        self, message: pb.GenerateRequest | pb.CountTokensRequest, violations: list[Violation]
    ) -> Prompt | None:
        size, limit = message.ByteSize(), self._config.max_request_bytes
        if size > limit:
            text = f"the request has {size} bytes; the most is {limit}"
            violations.append(Violation(_biggest_field(message), text))
            return None
        prompt: Prompt
        match message.WhichOneof("input"):
            case "chat":
                turns = message.chat.messages
                prompt = ChatPrompt(tuple(Message(turn.role, turn.content) for turn in turns))
            case "text":
                prompt = TextPrompt(message.text)
            case "tokens":
                assert isinstance(message, pb.GenerateRequest)
                prompt = TokenPrompt(tuple(message.tokens.ids))
            case _:
                violations.append(Violation("input", "give one of chat, text and tokens"))
                return None

        def say(field: str, text: str) -> None:
            name = field.partition("[")[0]
            violations.append(Violation(field.replace(name, PROMPT_FIELDS[name], 1), text))

        self.limits.check_prompt(prompt, say)
        return prompt

    def _sampling(self, message: pb.Sampling, violations: list[Violation]) -> Sampling:
        structured = message.structured_output
        constraint = _constraint(structured)
        if constraint is None and message.HasField("structured_output"):
            text = "give one of json_schema, regex, choice, grammar and json_object"
            violations.append(Violation("sampling.structured_output", text))

        def say(field: str, text: str) -> None:
            if field == "constraint":
                field = f"structured_output.{structured.WhichOneof('constraint')}"
            violations.append(Violation(f"sampling.{field}", text))

        default = self._config.default_max_tokens
        sampling = Sampling(
            max_tokens=(
                message.max_tokens
                if message.HasField("max_tokens")
                else min(default, self.limits.max_tokens)
            ),
            temperature=message.temperature,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            top_k=message.top_k,
            min_p=message.min_p,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            repetition_penalty=(
                message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
            ),
            n=message.n if message.HasField("n") else 1,
            seed=message.seed if message.HasField("seed") else None,
            stop=tuple(message.stop),
            ignore_eos=message.ignore_eos,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            constraint=constraint,
        )
        self.limits.check_sampling(sampling, say)
        return sampling


def _constraint(message: pb.StructuredOutput) -> Constraint | None:
    match message.WhichOneof("constraint"):
        case "json_schema":
            return JsonSchema(message.json_schema)
        case "regex":
            return Regex(message.regex)
        case "choice":
            return OneOf(tuple(message.choice.values))
        case "grammar":
            return Grammar(message.grammar)
        case "json_object":
            return JsonObject()
        case _:
            return None


def _biggest_field(message: ProtoMessage) -> str:
    sizes = {
        field.name: len(value) if isinstance(value, str) else value.ByteSize()
        for field, value in message.ListFields()
    }
    # Bytes of fields this gateway does not know belong to none.
    return max(sizes, key=lambda name: sizes[name], default="")
