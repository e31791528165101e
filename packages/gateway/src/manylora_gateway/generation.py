"""One generation as the fronts see it: what is asked, its events, and the whole of them."""

from collections.abc import AsyncIterable
from dataclasses import dataclass, replace

from manylora_gateway.engine import Delta, Finish, Prompt, Sampling, Timing, TokenLogprobs
from manylora_gateway.errors import ReplicaLostError
from manylora_registry import Version


@dataclass(frozen=True)
class GenerationRequest:
    """What a client wants generated, checked field by field."""

    adapter: str
    """An adapter reference; empty for the bare base."""
    prompt: Prompt
    sampling: Sampling
    request_id: str = ""
    """What the client calls it; empty has one made."""


@dataclass(frozen=True)
class Started:
    """The request was admitted; `version` makes its answer (None: the bare base)."""

    request_id: str
    version: Version | None


@dataclass(frozen=True)
class Answer:
    """One of the answers to a request."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    """Of all its answers."""


def usage_of(finishes: list[Finish]) -> Usage:
    """What the answers of one request used together; their prompt was read once."""
    return Usage(
        prompt_tokens=finishes[0].prompt_tokens,
        completion_tokens=sum(finish.completion_tokens for finish in finishes),
    )


@dataclass(frozen=True)
class Generation:
    """A whole request answered."""

    started: Started
    answers: tuple[Answer, ...]
    """As many as were asked for."""
    timing: Timing

    @property
    def usage(self) -> Usage:
        """Tokens of the request."""
        return usage_of([answer.finish for answer in self.answers])


class Tally:
    """Follows a stream's deltas to its end: what each answer ended with, and when."""

    def __init__(self) -> None:
        self._finishes: dict[int, Finish] = {}
        self.timing = Timing()

    def add(self, delta: Delta) -> None:
        """Takes the next delta."""
        if delta.finish is not None:
            self._finishes[delta.choice] = delta.finish
        if delta.timing is not None:
            self.timing = delta.timing

    def finishes(self, count: int) -> list[Finish]:
        """How each of `count` answers ended.

        Raises:
            ReplicaLostError: one of them did not.
        """
        if sorted(self._finishes) != list(range(count)):
            raise ReplicaLostError("The engine ended the answer before it was whole.")
        return [self._finishes[index] for index in range(count)]

    def usage(self, count: int) -> Usage:
        """What `count` answers used.

        Raises:
            ReplicaLostError: one of them did not end.
        """
        return usage_of(self.finishes(count))


async def collect(events: AsyncIterable[Started | Delta], count: int) -> Generation:
    """The whole of a stream that has `count` answers.

    Raises:
        ReplicaLostError: the stream ended before all of them had.
    """
    started: Started | None = None
    deltas: list[list[Delta]] = [[] for _ in range(count)]
    tally = Tally()
    async for event in events:
        if isinstance(event, Started):
            started = event
        else:
            deltas[event.choice].append(event)
            tally.add(event)
    finishes = tally.finishes(count)
    assert started is not None
    answers = [
        Answer(
            text="".join(delta.text for delta in parts),
            token_ids=tuple(token for delta in parts for token in delta.token_ids),
            logprobs=tuple(entry for delta in parts for entry in delta.logprobs),
            finish=finish,
        )
        for parts, finish in zip(deltas, finishes, strict=True)
    ]
    return Generation(started, tuple(answers), tally.timing)


def with_queue_time(delta: Delta, seconds: float) -> Delta:
    """The same, with time spent waiting before a replica knew of the request."""
    if delta.timing is None:
        return delta
    waited = replace(delta.timing, queue_s=delta.timing.queue_s + seconds)
    return replace(delta, timing=waited)
