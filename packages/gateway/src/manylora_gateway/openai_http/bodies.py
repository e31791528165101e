"""The bodies of requests, as OpenAI's API reference gives them, and what of them is supported.

A parameter that is not here is refused, as ignoring it would change the answer; but for those of
IGNORED, which do not, and for values of NEUTRAL, which ask for nothing. null is the same as absent.
Beside OpenAI's own there are the extensions that vLLM's server knows too: top_k, min_p,
repetition_penalty, ignore_eos and structured_outputs.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from manylora_gateway.errors import InvalidRequestError, Violation

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Parameters that change nothing about an answer."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
"""Parameters that are not supported, and the values with which they ask for nothing."""

EMPTY_IN_REPLIES = ("annotations", "tool_calls")
"""Lists in a reply's message that OpenAI's and vLLM's servers leave empty: a client that sends the
reply back as a turn of the chat asks for nothing with them."""


TYPES = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "int_type": "must be an integer",
    "list_type": "must be an array",
    "literal_error": "must be text",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_type": "must be a string",
}
"""What pydantic calls a value of another type, and what we say."""

EITHER = {
    "content": "must be a string or an array of text parts",
    "json": "must be an object or a string",
    "prompt": "must be a string, or an array of strings, of token ids or of arrays of them",
    "stop": "must be a string or an array of strings",
}
"""Fields of several types: pydantic tells of one of them."""

MOST_MEMBERS = 200
"""Of one object that has parameters; pydantic takes seconds to tell of 100,000 unknown ones."""


class _First(FailFast):
    """Of a list the first mistake is told: there can be half a million in a body."""

    def __hash__(self) -> int:
        """As a member of a union."""
        return id(self)


FIRST = _First()
Texts = Annotated[list[str], FIRST]
TokenIds = Annotated[list[int], FIRST]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        """Null is OpenAI's default."""
        if not isinstance(data, dict):
            return data
        items = cast("dict[str, Any]", data).items()
        if len(items) > MOST_MEMBERS:
            text = "has {count} members; the most is {most}"
            raise PydanticCustomError("too_many", text, {"count": len(items), "most": MOST_MEMBERS})
        return {name: value for name, value in items if value is not None}


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a chat."""

    role: str
    content: str | Annotated[list[TextPart], FIRST]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        items = cast("dict[str, Any]", data).items()
        return {name: value for name, value in items if name not in EMPTY_IN_REPLIES or value != []}

    def text(self) -> str:
        """Its pieces put together."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Body):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; no padding is ever sent."""


class NamedSchema(_Body):
    """A JSON Schema, and what it is called, which nothing depends on."""

    name: str = ""
    description: str = ""
    strict: bool = True
    """Accepted; answers are always held to the schema."""
    schema_: dict[str, Any] = Field(alias="schema")


class TextFormat(_Body):
    """An answer of any form."""

    type: Literal["text"]


class JsonObjectFormat(_Body):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Body):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(_Body):
    """vLLM's extension: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None


class _Completion(_Body):
    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: str | Texts = Field(default_factory=list[str])
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat = TextFormat(type="text")
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None


class ChatBody(_Completion):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FIRST]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class CompletionBody(_Completion):
    """POST /v1/completions."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], FIRST]
    logprobs: int | None = None


Body = TypeVar("Body", ChatBody, CompletionBody)


def read_body(kind: type[Body], data: object) -> Body:
    """The body in `data`, parsed JSON.

    Raises:
        InvalidRequestError: with every parameter that is wrong or not supported.
    """
    if not isinstance(data, dict):
        raise InvalidRequestError([Violation("", "the body must be a JSON object")])
    parameters = cast("dict[str, Any]", data)
    try:
        return kind.model_validate(
            {name: value for name, value in parameters.items() if not _asks_nothing(name, value)}
        )
    except ValidationError as error:
        raise InvalidRequestError(list(_violations(error))) from error


def _asks_nothing(name: str, value: object) -> bool:
    return name in IGNORED or any(
        type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ())
    )


def _violations(error: ValidationError) -> Iterator[Violation]:
    entries = error.errors(include_url=False, include_input=False, include_context=False)
    fields = [_path(entry["loc"]) for entry in entries]
    # Each branch of a union tells what it would have wanted: the one that got furthest is meant,
    # and one mistake of a field is enough.
    passed = {field[: at.start()] for field in fields for at in DEEPER.finditer(field)}
    for field, entry in zip(fields, entries, strict=True):
        if field in passed:
            continue
        passed.add(field)
        match entry["type"]:
            case "extra_forbidden":
                text = "is not supported"
            case "missing":
                text = "is required"
            case kind if kind in TYPES:
                text = EITHER.get(field.rpartition(".")[2], TYPES[kind])
            case "union_tag_invalid" | "union_tag_not_found":
                text = "its type must be text, json_object or json_schema"
            case _:
                text = entry["msg"]
        yield Violation(field, text)


DEEPER = re.compile(r"[.[]")
"""Where the path of a field goes on from one that holds it."""


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`, without what pydantic adds to tell the branches of a union."""
    if location[:1] == ("response_format",):
        location = (*location[:1], *location[2:])
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part != "str":
            path += f".{part}" if path else part
    return path
