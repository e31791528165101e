"""From what the core answers to reply messages."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

from collections.abc import Iterable, Sequence

from google.protobuf import duration_pb2
from google.rpc import status_pb2

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora.registry.v1 import adapter_pb2
from manylora_gateway.engine import Candidate, Delta, Timing, TokenLogprobs
from manylora_gateway.generation import Answer, Generation, Started, Tally, Usage, usage_of
from manylora_gateway.inference import AdapterState
from manylora_gateway.replicas import ReplicaState
from manylora_registry import Version

FINISH_REASONS = {
    "stop": pb.FinishReason.FINISH_REASON_STOP,
    "length": pb.FinishReason.FINISH_REASON_LENGTH,
}


def adapter_version(version: Version | None) -> adapter_pb2.AdapterVersion | None:
    """The message for `version`; None, an unset field, for the bare base."""
    if version is None:
        return None
    return adapter_pb2.AdapterVersion(
        name=version.name, number=version.number, digest=version.digest
    )


def generate_response(generation: Generation) -> pb.GenerateResponse:
    """The answer of a unary call."""
    first, *more = generation.answers
    return pb.GenerateResponse(
        request_id=generation.started.request_id,
        adapter=adapter_version(generation.started.version),
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=FINISH_REASONS[first.finish.reason],
        usage=_usage(generation.usage),
        logprobs=_logprobs(first.logprobs),
        choices=map(_choice, generation.answers) if more else (),
        timing=_timing(generation.timing),
    )


class StreamMessages:
    """Makes the messages of one stream from the events of the core.

    Args:
        answers: how many the request asked for.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._tally = Tally()

    def of(self, event: Started | Delta) -> pb.GenerateStreamResponse | None:
        """The message for one event; none where it is only the end of an answer."""
        if isinstance(event, Started):
            started = pb.GenerateStarted(
                request_id=event.request_id, adapter=adapter_version(event.version)
            )
            return pb.GenerateStreamResponse(started=started)
        self._tally.add(event)
        if not event.text and not event.token_ids:
            return None
        delta = pb.GenerateDelta(
            text=event.text,
            token_ids=event.token_ids,
            logprobs=_logprobs(event.logprobs),
            choice=event.choice,
        )
        return pb.GenerateStreamResponse(delta=delta)

    def last(self) -> pb.GenerateStreamResponse:
        """The last message, once all events have come.

        Raises:
            ReplicaLostError: an answer did not end.
        """
        finishes = self._tally.finishes(self._answers)
        reasons = [FINISH_REASONS[finish.reason] for finish in finishes]
        finished = pb.GenerateFinished(
            finish_reason=reasons[0],
            usage=_usage(usage_of(finishes)),
            timing=_timing(self._tally.timing),
            finish_reasons=reasons,
        )
        return pb.GenerateStreamResponse(finished=finished)


def batch_error(index: int, status: status_pb2.Status) -> pb.BatchGenerateResponse:
    """One request of a batch that failed."""
    error = pb.BatchGenerateError(
        code=status.code, message=status.message, details=list(status.details)
    )
    return pb.BatchGenerateResponse(index=index, error=error)


def adapters_response(adapters: Sequence[AdapterState]) -> pb.ListAdaptersResponse:
    """The listing of adapters."""
    return pb.ListAdaptersResponse(
        adapters=[
            pb.AdapterListing(
                name=adapter.name,
                latest=adapter_version(adapter.latest),
                aliases=[
                    pb.AliasListing(
                        alias=alias.alias,
                        serving=adapter_version(alias.serving),
                        pending=adapter_version(alias.pending),
                        pending_error=alias.pending_error,
                    )
                    for alias in adapter.aliases
                ],
            )
            for adapter in adapters
        ]
    )


def replicas_response(states: Sequence[ReplicaState]) -> admin_pb2.ListReplicasResponse:
    """The listing of replicas."""
    return admin_pb2.ListReplicasResponse(
        replicas=[
            admin_pb2.Replica(
                replica_id=state.replica_id,
                slots=state.slots,
                requests=state.requests,
                waiting=state.waiting,
                adapters=[
                    admin_pb2.LoadedAdapter(
                        adapter=adapter_version(resident.version),
                        requests=resident.requests,
                        pinned=resident.pinned,
                    )
                    for resident in state.residents
                ],
            )
            for state in states
        ]
    )


def _choice(answer: Answer) -> pb.Choice:
    return pb.Choice(
        text=answer.text,
        token_ids=answer.token_ids,
        finish_reason=FINISH_REASONS[answer.finish.reason],
        logprobs=_logprobs(answer.logprobs),
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def _timing(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue=_duration(timing.queue_s),
        load=_duration(timing.load_s),
        prefill=_duration(timing.prefill_s),
        decode=_duration(timing.decode_s),
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _logprobs(entries: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(chosen=_candidate(entry.chosen), top=map(_candidate, entry.top))
        for entry in entries
    ]


def _candidate(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(token_id=candidate.token_id, logprob=candidate.logprob, text=candidate.text)
