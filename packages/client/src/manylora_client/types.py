"""What a caller hands in and gets back: frozen dataclasses, free of gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

Input: TypeAlias = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Plain text; or chat messages `{"role": ..., "content": ...}`, rendered with the base's chat
template; or token ids, passed on untouched."""

FinishReason: TypeAlias = Literal["stop", "length", "unknown"]
"""`stop`: a stop token or string came; `length`: max_tokens or the context's end was reached;
`unknown`: a reason this client has no word for."""


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; see Request for their meaning."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    n: int | None
    seed: int | None
    stop: Sequence[str]
    ignore_eos: bool
    logprobs: int | None
    json_schema: Mapping[str, Any] | str | None
    json_object: bool
    regex: str | None
    choice: Sequence[str]
    grammar: str | None


@dataclass(frozen=True, slots=True)
class Request:
    """One generation to ask for; `batch` takes many."""

    input: Input
    adapter: str = ""
    """Adapter reference NAME[@SELECTOR]; empty: the bare base."""
    max_tokens: int | None = None
    """Most tokens to generate; None: the gateway's default."""
    temperature: float | None = None
    """None or 0: greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    """Cuts candidates below this share of the likeliest one's probability."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    """Answers to sample; more than one needs a temperature."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: Sequence[str] = ()
    """Generation ends before the first of these."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the likeliest candidates to report at each position; None: none."""
    json_schema: Mapping[str, Any] | str | None = None
    """The answer is JSON that is valid by this JSON Schema. At most one of this and the following
    may be given."""
    json_object: bool = False
    """The answer is a JSON object."""
    regex: str | None = None
    """The answer matches this regular expression as a whole."""
    choice: Sequence[str] = ()
    """The answer is one of these."""
    grammar: str | None = None
    """The answer is a sentence of this grammar, in EBNF (GBNF) or Lark notation."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An immutable version of an adapter."""

    name: str
    number: int
    digest: str
    """`sha256:` and 64 hexadecimal digits: the version's identity."""

    def __str__(self) -> str:
        return f"{self.name}@{self.number} ({self.digest[:19]})"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    """Of all choices together."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went in the gateway, in seconds, one part after the other."""

    queue: float = 0.0
    """Waiting: to be admitted, for a seat in an engine and a slot of the adapter's."""
    load: float = 0.0
    """Waiting for the adapter's weights."""
    prefill: float = 0.0
    """To the first token."""
    decode: float = 0.0
    """From the first token to the last."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float
    text: str = ""
    """The token decoded by itself."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token taken at one position, and the likeliest ones there, best first."""

    chosen: Candidate
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several answers to a request."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer; of several, the first."""

    text: str
    token_ids: tuple[int, ...]
    adapter: AdapterVersion | None
    """The version that made the answer; None: the bare base."""
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...]
    """One entry a token, if the request asked for them."""
    request_id: str
    choices: tuple[Choice, ...] = ()
    """All answers, if the request asked for more than one."""
    timing: Timing = field(default=Timing(), compare=False)


@dataclass(frozen=True, slots=True)
class Started:
    """A stream's first event: the request was admitted and its adapter resolved."""

    request_id: str
    adapter: AdapterVersion | None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a stream; one delta may hold several tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    choice: int = 0
    """Index of the answer this belongs to."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A stream's last event."""

    finish_reason: FinishReason
    """Of the first choice."""
    usage: Usage
    finish_reasons: tuple[FinishReason, ...] = ()
    """Of every choice, by index."""
    timing: Timing = field(default=Timing(), compare=False)


@dataclass(frozen=True, slots=True)
class AliasListing:
    """What a request for an alias gets now."""

    alias: str
    serving: AdapterVersion | None
    """None: the gateway serves nothing under this alias yet."""
    pending: AdapterVersion | None
    """What the registry's alias points at, where the gateway does not serve it (yet)."""
    pending_error: str
    """Why `pending` could not be loaded; empty while it loads."""


@dataclass(frozen=True, slots=True)
class AdapterListing:
    """One adapter of the registry, as the gateway serves it."""

    name: str
    latest: AdapterVersion
    aliases: tuple[AliasListing, ...]
