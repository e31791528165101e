"""The narrow edge to what generates: prompts and sampling in, deltas out.

Everything on this side of the edge runs without torch or vLLM; a replica and its tests see
engines only through `Engine`.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Rendered with the base's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Tokenised as it stands, with the special tokens the tokenizer adds by itself."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Passed on untouched."""

    ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


TURN_CHARACTERS = 32
"""About what a chat template writes around each message."""


def characters(prompt: Prompt) -> int:
    """How much text there is to tokenise, about."""
    match prompt:
        case ChatPrompt(messages):
            return sum(TURN_CHARACTERS + len(message.content) for message in messages)
        case TextPrompt(text):
            return len(text)
        case TokenPrompt():
            return 0


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that is valid by a schema."""

    schema: str
    """Itself JSON."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these strings."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A sentence of a context-free grammar."""

    text: str
    """In EBNF (GBNF) or Lark notation."""


Constraint = JsonSchema | JsonObject | Regex | OneOf | Grammar
"""What the text of an answer is held to."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and where they end."""

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all candidates."""
    min_p: float = 0.0
    """Cuts candidates below this share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.0
    """The same, once for each time it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens of the prompt and the answer, multiplies negative ones."""
    n: int = 1
    """Answers to sample."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Candidates to report at each position; None reports nothing."""
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have been taken, with its natural log-probability."""

    token_id: int
    logprob: float
    text: str = ""
    """The token decoded by itself."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token that was taken, and the likeliest ones, best first."""

    chosen: Candidate
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """How one answer ended and what it used, in tokens."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went, in seconds, one part after the other."""

    queue_s: float = 0.0
    """Waiting for admission, a seat and a slot."""
    load_s: float = 0.0
    """Waiting for the adapter's weights."""
    prefill_s: float = 0.0
    """To the first token."""
    decode_s: float = 0.0
    """From the first token to the last."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What came of one answer since its delta before; its last one has `finish`."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    choice: int = 0
    """Index of the answer, below `Sampling.n`."""
    timing: Timing | None = None
    """With the last delta of all."""
    prompt_tokens: int = 0
    """With the first delta of all, which proves that the prompt was read; else 0."""


class Engine(Protocol):
    """One copy of the base with adapters beside it.

    Adapters are known by `Version.engine_name`, which is never reused for other weights.
    """

    async def load(self, name: str, directory: Path) -> None:
        """Brings the adapter of `directory` into memory.

        Raises:
            AdapterLoadError: it is refused; the engine goes on as if it had not been asked.
        """
        ...

    async def unload(self, name: str) -> None:
        """Forgets an adapter that no generation uses; nothing if it is not loaded."""
        ...

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The prompt as the engine reads it. Called on any thread, on two at once too.

        Raises:
            InvalidRequestError: it is empty, too long, or the chat template refuses it.
        """
        ...

    def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Sampling,
        adapter: str | None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """Generates `sampling.n` answers after `token_ids`; ends when the last of them has.

        Of prompts that wait to be computed, one with a lower `priority` goes first.

        Closing the generator frees what it held.

        Raises:
            InvalidRequestError: the engine cannot hold an answer to `sampling.constraint`.
            ReplicaLostError: the engine died.
        """
        ...

    def check_health(self) -> None:
        """Raises ReplicaLostError once the engine cannot recover."""
        ...

    async def close(self) -> None:
        """Ends the engine and its processes."""
        ...
