"""Conversion between the protocol's messages and the client's types, shared by both clients."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import manylora.inference.v1.inference_pb2 as pb
from manylora.registry.v1.adapter_pb2 import AdapterVersion as AdapterVersionMessage
from manylora_client.errors import InvalidInputError
from manylora_client.types import (
    AdapterListing,
    AdapterVersion,
    AliasListing,
    Candidate,
    Choice,
    Delta,
    Finished,
    FinishReason,
    Generation,
    Input,
    Request,
    Started,
    Timing,
    TokenLogprobs,
    Usage,
)

_FINISH_REASONS: Mapping[pb.FinishReason.ValueType, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


def generate_request(request: Request) -> pb.GenerateRequest:
    """The message for `request`.

    Raises:
        InvalidInputError: where a value does not fit its field.
    """
    try:
        message = pb.GenerateRequest(
            adapter=request.adapter,
            sampling=pb.Sampling(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                repetition_penalty=request.repetition_penalty,
                n=request.n,
                seed=request.seed,
                stop=_strings("stop", request.stop),
                ignore_eos=request.ignore_eos,
                logprobs=request.logprobs,
                structured_output=_structured_output(request),
            ),
        )
        match prompt(request.input):
            case str() as text:
                message.text = text
            case pb.Chat() as chat:
                message.chat.CopyFrom(chat)
            case tokens:
                message.tokens.CopyFrom(tokens)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the request cannot be sent: {error}") from error
    return message


def count_request(source: Input) -> pb.CountTokensRequest:
    """The message that counts the prompt tokens of `source`.

    Raises:
        InvalidInputError: for token ids, which are counted already, and for malformed messages.
    """
    try:
        match prompt(source):
            case str() as text:
                return pb.CountTokensRequest(text=text)
            case pb.Chat() as chat:
                return pb.CountTokensRequest(chat=chat)
            case _:
                raise InvalidInputError("token ids need no counting: their number is their length")
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the request cannot be sent: {error}") from error


def prompt(source: Input) -> str | pb.Chat | pb.Tokens:
    """The input of a request: text as it stands, chat messages or token ids as messages."""
    if isinstance(source, str):
        return source
    if isinstance(source, bytes | bytearray):
        # A sequence of integers too, and would be taken for token ids.
        raise InvalidInputError("the input is bytes: decode it to text")
    # An array is no sequence, and a generator is empty once it was looked at.
    is_sequence = isinstance(cast("object", source), Sequence)
    parts: Sequence[object] = source if is_sequence else ()
    if is_sequence and not parts:
        raise InvalidInputError("the input is empty: give text, chat messages or token ids")
    if parts and all(isinstance(part, int) for part in parts):
        return pb.Tokens(ids=cast("Sequence[int]", source))
    if parts and all(_is_message(part) for part in parts):
        messages = cast("Sequence[Mapping[str, str]]", source)
        return pb.Chat(
            messages=[pb.Message(role=m["role"], content=m["content"]) for m in messages]
        )
    raise InvalidInputError(
        "the input must be text, a list of token ids, or a list of chat messages with the keys "
        "'role' and 'content', both text"
    )


def _is_message(part: object) -> bool:
    if not isinstance(part, Mapping):
        return False
    message = cast("Mapping[object, object]", part)
    return set(message) == {"role", "content"} and all(
        isinstance(value, str) for value in message.values()
    )


def _strings(name: str, value: Sequence[str]) -> Sequence[str]:
    if isinstance(value, str):
        # A string is a sequence of strings, so each of its letters would be taken for one.
        raise InvalidInputError(f"{name} must be a list of strings, e.g. [{value!r}]")
    return value


def _structured_output(request: Request) -> pb.StructuredOutput | None:
    """The one form the answer is held to, if any."""
    asked = pb.StructuredOutput()
    given: list[str] = []
    if request.json_schema is not None:
        given.append("json_schema")
        schema = request.json_schema
        asked.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
    if request.json_object:
        given.append("json_object")
        asked.json_object.SetInParent()
    if request.regex is not None:
        given.append("regex")
        asked.regex = request.regex
    if request.choice:
        given.append("choice")
        asked.choice.values.extend(_strings("choice", request.choice))
    if request.grammar is not None:
        given.append("grammar")
        asked.grammar = request.grammar
    if len(given) > 1:
        raise InvalidInputError(f"give only one of {', '.join(given)}")
    return asked if given else None


def generation(response: pb.GenerateResponse) -> Generation:
    """The answer in `response`."""
    return Generation(
        text=response.text,
        token_ids=tuple(response.token_ids),
        adapter=adapter(response),
        finish_reason=_finish_reason(response.finish_reason),
        usage=_usage(response.usage),
        logprobs=_logprobs(response.logprobs),
        request_id=response.request_id,
        choices=tuple(map(_choice, response.choices)),
        timing=_timing(response.timing),
    )


def _choice(message: pb.Choice) -> Choice:
    return Choice(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason),
        logprobs=_logprobs(message.logprobs),
    )


def adapter(message: pb.GenerateResponse | pb.GenerateStarted) -> AdapterVersion | None:
    """The version that answers; None for the bare base."""
    return _version(message.adapter) if message.HasField("adapter") else None


def adapter_listings(response: pb.ListAdaptersResponse) -> list[AdapterListing]:
    """The adapters in `response`, in the server's order."""
    return [
        AdapterListing(entry.name, _version(entry.latest), tuple(map(_alias, entry.aliases)))
        for entry in response.adapters
    ]


def started(message: pb.GenerateStarted) -> Started:
    """A stream's first event."""
    return Started(message.request_id, adapter(message))


def delta(message: pb.GenerateDelta) -> Delta:
    """One of a stream's deltas."""
    logprobs = _logprobs(message.logprobs)
    return Delta(message.text, tuple(message.token_ids), logprobs, message.choice)


def finished(message: pb.GenerateFinished) -> Finished:
    """A stream's last event."""
    return Finished(
        finish_reason=_finish_reason(message.finish_reason),
        usage=_usage(message.usage),
        finish_reasons=tuple([_finish_reason(reason) for reason in message.finish_reasons]),
        timing=_timing(message.timing),
    )


def _alias(listing: pb.AliasListing) -> AliasListing:
    return AliasListing(
        alias=listing.alias,
        serving=_version(listing.serving) if listing.HasField("serving") else None,
        pending=_version(listing.pending) if listing.HasField("pending") else None,
        pending_error=listing.pending_error,
    )


def _version(message: AdapterVersionMessage) -> AdapterVersion:
    return AdapterVersion(message.name, message.number, message.digest)


def _usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens)


def _timing(message: pb.Timing) -> Timing:
    return Timing(
        queue=message.queue.ToTimedelta().total_seconds(),
        load=message.load.ToTimedelta().total_seconds(),
        prefill=message.prefill.ToTimedelta().total_seconds(),
        decode=message.decode.ToTimedelta().total_seconds(),
    )


def _finish_reason(value: pb.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS.get(value, "unknown")


def _logprobs(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(_candidate(entry.chosen), tuple(map(_candidate, entry.top)))
        for entry in entries
    )


def _candidate(message: pb.Candidate) -> Candidate:
    return Candidate(message.token_id, message.logprob, message.text)
