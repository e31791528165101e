"""What a caller hands in and gets back: frozen dataclasses, free of gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

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
    seed: int | None
    stop: Sequence[str]
    ignore_eos: bool
    logprobs: int | None


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
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: Sequence[str] = ()
    """Generation ends before the first of these."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the likeliest candidates to report at each position; None: none."""


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token taken at one position, and the likeliest ones there, best first."""

    chosen: Candidate
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    adapter: AdapterVersion | None
    """The version that made the answer; None: the bare base."""
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...]
    """One entry a token, if the request asked for them."""
    request_id: str


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


@dataclass(frozen=True, slots=True)
class Finished:
    """A stream's last event."""

    finish_reason: FinishReason
    usage: Usage


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
