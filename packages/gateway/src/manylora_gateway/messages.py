"""From what the core answers to reply messages."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

from collections.abc import Iterable, Sequence

from google.rpc import status_pb2

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora.registry.v1 import adapter_pb2
from manylora_gateway.engine import Candidate, Delta, Finish, TokenLogprobs
from manylora_gateway.inference import AdapterState, Generation, Started
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
    return pb.GenerateResponse(
        request_id=generation.started.request_id,
        adapter=adapter_version(generation.started.version),
        text=generation.text,
        token_ids=generation.token_ids,
        finish_reason=FINISH_REASONS[generation.finish.reason],
        usage=_usage(generation.finish),
        logprobs=_logprobs(generation.logprobs),
    )


def stream_responses(event: Started | Delta) -> Iterable[pb.GenerateStreamResponse]:
    """The stream messages for one event of the core: one, and for the last delta two."""
    if isinstance(event, Started):
        started = pb.GenerateStarted(
            request_id=event.request_id, adapter=adapter_version(event.version)
        )
        yield pb.GenerateStreamResponse(started=started)
        return
    if event.text or event.token_ids:
        delta = pb.GenerateDelta(
            text=event.text, token_ids=event.token_ids, logprobs=_logprobs(event.logprobs)
        )
        yield pb.GenerateStreamResponse(delta=delta)
    if event.finish is not None:
        finished = pb.GenerateFinished(
            finish_reason=FINISH_REASONS[event.finish.reason], usage=_usage(event.finish)
        )
        yield pb.GenerateStreamResponse(finished=finished)


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


def _usage(finish: Finish) -> pb.Usage:
    return pb.Usage(prompt_tokens=finish.prompt_tokens, completion_tokens=finish.completion_tokens)


def _logprobs(entries: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(chosen=_candidate(entry.chosen), top=map(_candidate, entry.top))
        for entry in entries
    ]


def _candidate(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(token_id=candidate.token_id, logprob=candidate.logprob)
