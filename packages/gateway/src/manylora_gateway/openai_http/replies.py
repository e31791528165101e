"""From what the core answers to OpenAI's JSON, whole and in pieces."""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from manylora_gateway.engine import Delta, Timing, TokenLogprobs
from manylora_gateway.generation import Generation, Started, Tally, Usage
from manylora_gateway.inference import AdapterState
from manylora_registry import Version
from manylora_registry.reference import DEFAULT_SELECTOR

Kind = Literal["chat", "text"]
Json = dict[str, Any]

OWNER = "manylora"
IMPOSSIBLE = -9999.0
"""OpenAI's log-probability of what is out of question. JSON has no infinity, which a candidate has
that the form of the answer does not allow."""
DONE = b"data: [DONE]\n\n"


class Replies:
    """Makes the replies to one request.

    Args:
        kind: which of the two APIs asks.
        base: the name of the bare base.
        answers: to each prompt (n).
    """

    def __init__(self, kind: Kind, base: str, request_id: str, answers: int) -> None:
        self._kind: Kind = kind
        self._base = base
        self._answers = answers
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{request_id}"
        self._created = int(time.time())

    def whole(self, generations: list[Generation]) -> Json:
        """The one reply that has everything; one generation for each prompt."""
        choices: list[Json] = []
        for generation in generations:
            for answer in generation.answers:
                choice: Json = {"index": len(choices), "finish_reason": answer.finish.reason}
                if self._kind == "chat":
                    choice["message"] = {
                        "role": "assistant",
                        "content": answer.text,
                        "refusal": None,
                    }
                else:
                    choice["text"] = answer.text
                choice["logprobs"] = self._logprobs(answer.logprobs)
                choices.append(choice)
        started = generations[0].started
        reply = self._envelope("chat.completion" if self._kind == "chat" else "text_completion")
        reply |= self._model(started.version)
        reply["choices"] = choices
        reply["usage"] = _usage([generation.usage for generation in generations])
        reply["manylora"] = _extension(started, [generation.timing for generation in generations])
        return reply

    def _envelope(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created}

    def _model(self, version: Version | None) -> Json:
        """The version that answers, as its exact reference, and its digest as the fingerprint."""
        if version is None:
            return {"model": self._base, "system_fingerprint": None}
        model = f"{version.name}@{version.number}"
        return {"model": model, "system_fingerprint": version.digest}

    def _logprobs(self, entries: Iterable[TokenLogprobs], offset: int = 0) -> Json | None:
        entries = list(entries)
        if not entries:
            return None
        return _chat_logprobs(entries) if self._kind == "chat" else _text_logprobs(entries, offset)

    def stream(self, prompts: int, *, include_usage: bool) -> "Chunks":
        """The replies of a stream over so many prompts."""
        return Chunks(self, self._kind, prompts, self._answers, include_usage=include_usage)

    def chunk(self, version: Version | None, choices: list[Json]) -> Json:
        """One piece of a stream."""
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return self._envelope(kind) | self._model(version) | {"choices": choices}

    def piece(self, index: int, delta: Delta, offset: int) -> Json:
        """What came of one answer."""
        logprobs = self._logprobs(delta.logprobs, offset)
        choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": None}
        if self._kind == "chat":
            return choice | {"delta": {"content": delta.text}}
        return choice | {"text": delta.text}

    def end(self, index: int, reason: str) -> Json:
        """The end of one answer."""
        choice: Json = {"index": index, "logprobs": None, "finish_reason": reason}
        return choice | ({"delta": {}} if self._kind == "chat" else {"text": ""})


class Chunks:
    """Writes one stream as server-sent events.

    The first chunk of a chat names the role of every answer; each answer ends with a chunk that
    has its finish_reason; the last chunk has the usage if it was asked for, and then comes [DONE].
    """

    def __init__(
        self, replies: Replies, kind: Kind, prompts: int, answers: int, *, include_usage: bool
    ) -> None:
        self._replies = replies
        self._kind = kind
        self._answers = answers
        self._include_usage = include_usage
        self._tallies = [Tally() for _ in range(prompts)]
        self._started: list[Started | None] = [None] * prompts
        self._offsets: dict[int, int] = {}

    def of(self, prompt: int, event: Started | Delta) -> Iterator[bytes]:
        """The events for what came of one prompt."""
        first = prompt * self._answers
        if isinstance(event, Started):
            self._started[prompt] = event
            if self._kind == "chat":
                role = {"role": "assistant", "content": ""}
                yield self._event(
                    prompt,
                    [
                        {"index": first + n, "delta": role, "logprobs": None, "finish_reason": None}
                        for n in range(self._answers)
                    ],
                )
            return
        self._tallies[prompt].add(event)
        index = first + event.choice
        if event.text or event.token_ids:
            offset = self._offsets.get(index, 0)
            yield self._event(prompt, [self._replies.piece(index, event, offset)])
            # Of tokens, as in a whole reply: text that may become a stop string comes later.
            self._offsets[index] = offset + sum(len(one.chosen.text) for one in event.logprobs)
        if event.finish is not None:
            yield self._event(prompt, [self._replies.end(index, event.finish.reason)])

    def last(self) -> Iterator[bytes]:
        """The events after everything has come.

        Raises:
            ReplicaLostError: an answer did not end.
        """
        usages = [tally.usage(self._answers) for tally in self._tallies]
        if self._include_usage:
            started = self._started[0]
            assert started is not None
            extension = _extension(started, [tally.timing for tally in self._tallies])
            end = self._replies.chunk(started.version, [])
            yield _sse(end | {"usage": _usage(usages), "manylora": extension})
        yield DONE

    def _event(self, prompt: int, choices: list[Json]) -> bytes:
        started = self._started[prompt]
        assert started is not None
        chunk = self._replies.chunk(started.version, choices)
        if self._include_usage:
            chunk["usage"] = None
        return _sse(chunk)


def error_event(body: Json) -> bytes:
    """An error in the middle of a stream; nothing follows."""
    return _sse(body)


def models(adapters: Iterable[AdapterState], base: str, *, with_base: bool) -> list[Json]:
    """The listing of models: the base, and every reference that is served.

    An adapter's `production` goes by its bare name; another alias by NAME@ALIAS; an adapter that
    no alias of serves anything by its newest version, NAME@NUMBER, if that can be served.
    """
    listing: list[Json] = []
    if with_base:
        listing.append(listed(base, None, base))
    for adapter in adapters:
        served = [entry for entry in adapter.aliases if entry.serving is not None]
        for entry in served:
            default = entry.alias == DEFAULT_SELECTOR
            reference = adapter.name if default else f"{adapter.name}@{entry.alias}"
            listing.append(listed(reference, entry.serving, base))
        if not served and adapter.latest_fits:
            reference = f"{adapter.name}@{adapter.latest.number}"
            listing.append(listed(reference, adapter.latest, base))
    return listing


def listed(reference: str, version: Version | None, base: str) -> Json:
    """One model: the base, or a version of an adapter under some reference."""
    entry: Json = {"id": reference, "object": "model", "created": 0, "owned_by": OWNER}
    if version is not None:
        entry |= {"root": base, "parent": base, "manylora": _version(version)}
    return entry


def _version(version: Version | None) -> Json | None:
    if version is None:
        return None
    return {"name": version.name, "number": version.number, "digest": version.digest}


def _usage(usages: list[Usage]) -> Json:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _extension(started: Started, timings: list[Timing]) -> Json:
    """What OpenAI's reply has no place for; of several prompts the longest time of each part."""
    return {
        "adapter": _version(started.version),
        "timing": {
            part: round(max(getattr(timing, part) for timing in timings), 6)
            for part in ("queue_s", "load_s", "prefill_s", "decode_s")
        },
    }


def _chat_logprobs(entries: list[TokenLogprobs]) -> Json:
    def told(text: str, logprob: float) -> Json:
        return {"token": text, "logprob": max(logprob, IMPOSSIBLE), "bytes": list(text.encode())}

    return {
        "content": [
            told(entry.chosen.text, entry.chosen.logprob)
            | {"top_logprobs": [told(other.text, other.logprob) for other in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _text_logprobs(entries: list[TokenLogprobs], offset: int) -> Json:
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.chosen.text)
    return {
        "tokens": [entry.chosen.text for entry in entries],
        "token_logprobs": [max(entry.chosen.logprob, IMPOSSIBLE) for entry in entries],
        "top_logprobs": [
            {other.text: max(other.logprob, IMPOSSIBLE) for other in entry.top} for entry in entries
        ],
        "text_offset": offsets,
    }


def _sse(body: Json) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
