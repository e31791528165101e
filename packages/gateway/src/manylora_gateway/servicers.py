"""The gRPC services over the core; errors become statuses here and nowhere else."""

# The generated base classes name their methods as gRPC does and type a stream as an iterator to
# return, where we write to the context: a handler that awaits its writes feels back-pressure.
# ruff: noqa: N802
# pyright: reportIncompatibleMethodOverride=false, reportMissingTypeStubs=false

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import grpc

from manylora.admin.v1 import admin_pb2, admin_pb2_grpc
from manylora.inference.v1 import inference_pb2 as pb
from manylora.inference.v1 import inference_pb2_grpc
from manylora_gateway import messages, rollout_messages
from manylora_gateway.calls import current_call, set_call
from manylora_gateway.errors import DeadlineError, InvalidRequestError, Violation
from manylora_gateway.generation import GenerationRequest
from manylora_gateway.inference import Inference
from manylora_gateway.limits import request_id_to_tell
from manylora_gateway.operations import Operations
from manylora_gateway.requests import Requests
from manylora_gateway.stalls import patience
from manylora_gateway.status import REQUEST_ID_KEY, abort, said_request_id, to_status
from manylora_gateway.tenants import caller

logger = logging.getLogger(__name__)

InferenceContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
StreamContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateStreamResponse]
BatchContext = grpc.aio.ServicerContext[pb.BatchGenerateRequest, pb.BatchGenerateResponse]
CountContext = grpc.aio.ServicerContext[pb.CountTokensRequest, pb.CountTokensResponse]
ListContext = grpc.aio.ServicerContext[pb.ListAdaptersRequest, pb.ListAdaptersResponse]
ReplicasContext = grpc.aio.ServicerContext[
    admin_pb2.ListReplicasRequest, admin_pb2.ListReplicasResponse
]
LoadContext = grpc.aio.ServicerContext[admin_pb2.LoadRequest, admin_pb2.LoadResponse]
PinContext = grpc.aio.ServicerContext[admin_pb2.PinRequest, admin_pb2.PinResponse]
DrainContext = grpc.aio.ServicerContext[admin_pb2.DrainRequest, admin_pb2.DrainResponse]
SetRolloutContext = grpc.aio.ServicerContext[
    admin_pb2.SetRolloutRequest, admin_pb2.SetRolloutResponse
]
GetRolloutContext = grpc.aio.ServicerContext[
    admin_pb2.GetRolloutRequest, admin_pb2.GetRolloutResponse
]
UnloadContext = grpc.aio.ServicerContext[admin_pb2.UnloadRequest, admin_pb2.UnloadResponse]


@asynccontextmanager
async def _answering(
    context: "grpc.aio.ServicerContext[Any, Any]", core: Inference | Operations
) -> AsyncGenerator[str, None]:
    """Bounds a call by its deadline and the gateway's end, and has it end with what goes wrong.

    Yields the request's id: the client's, or one that is made here. It goes with every answer,
    failures included. A client that vanishes cancels the call's task; there is nobody left to tell.
    """
    # The guard lets none pass that cannot be told.
    request_id = request_id_to_tell(said_request_id(context))
    # Typed as if every call had a deadline.
    remaining_s = cast("float | None", context.time_remaining())
    if remaining_s is not None:
        set_call(replace(current_call(), deadline=time.monotonic() + remaining_s))
    deadline = asyncio.timeout(remaining_s)
    try:
        try:
            async with deadline, core.until_cut_off():
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
                yield request_id
        except grpc.aio.InternalError:
            raise
        except Exception as error:
            late = DeadlineError("The deadline passed before the answer was whole.")
            await abort(context, late if deadline.expired() else error, request_id)
    except grpc.aio.InternalError:
        # Said to a call that has ended, of which this task hears a moment later.
        logger.debug("request %s ended while it was answered", request_id)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """manylora.inference.v1.InferenceService."""

    def __init__(self, inference: Inference, requests: Requests) -> None:
        self._inference = inference
        self._requests = requests
        self._stall_s = requests.limits.config.stall_s

    async def Generate(
        self, request: pb.GenerateRequest, context: InferenceContext
    ) -> pb.GenerateResponse:
        """Answers once, when the whole text is there."""
        async with _answering(context, self._inference) as request_id:
            asked = self._read(request, request_id)
            return messages.generate_response(await self._inference.generate(asked, caller()))

    async def GenerateStream(self, request: pb.GenerateRequest, context: StreamContext) -> None:
        """Answers while the text is made."""
        async with _answering(context, self._inference) as request_id:
            asked = self._read(request, request_id)
            replies = messages.StreamMessages(asked.sampling.n)
            async with aclosing(self._inference.stream(asked, caller())) as events:
                async for event in events:
                    if (reply := replies.of(event)) is not None:
                        async with patience(self._stall_s):
                            await context.write(reply)
            await context.write(replies.last())

    async def BatchGenerate(self, request: pb.BatchGenerateRequest, context: BatchContext) -> None:
        """Answers many requests, each as soon as it is there."""
        async with _answering(context, self._inference) as request_id:
            with self._inference.metrics.refusals(request_id, caller().name):
                batch = self._requests.batch(request)
            tasks: list[asyncio.Task[pb.BatchGenerateResponse]] = []
            try:
                for index, message in enumerate(batch):
                    one = self._one_of_batch(index, message, f"{request_id}/{index}")
                    tasks.append(asyncio.create_task(one))
                    # Each is read now, and others go on before the next.
                    await asyncio.sleep(0)
                for finished in asyncio.as_completed(tasks):
                    reply = await finished
                    async with patience(self._stall_s):
                        await context.write(reply)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: CountContext
    ) -> pb.CountTokensResponse:
        """Counts prompt tokens."""
        async with _answering(context, self._inference) as request_id:
            with self._inference.metrics.refusals(request_id, caller().name):
                prompt = self._requests.prompt(request)
                tokens = await self._inference.count_tokens(prompt, caller())
            return pb.CountTokensResponse(tokens=tokens)

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: ListContext
    ) -> pb.ListAdaptersResponse:
        """Lists the registry's adapters and what is served of them."""
        del request
        async with _answering(context, self._inference):
            adapters = await self._inference.adapters(caller())
            return await asyncio.to_thread(messages.adapters_response, adapters)

    def _read(self, request: pb.GenerateRequest, request_id: str) -> GenerationRequest:
        with self._inference.metrics.refusals(request_id, caller().name):
            return self._requests.generation(request, request_id)

    async def _one_of_batch(
        self, index: int, message: pb.GenerateRequest, request_id: str
    ) -> pb.BatchGenerateResponse:
        try:
            asked = self._read(message, request_id)
            generation = await self._inference.generate(asked, caller())
        except Exception as error:
            return messages.batch_error(index, to_status(error))
        response = messages.generate_response(generation)
        return pb.BatchGenerateResponse(index=index, response=response)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """manylora.admin.v1.AdminService."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def ListReplicas(
        self, request: admin_pb2.ListReplicasRequest, context: ReplicasContext
    ) -> admin_pb2.ListReplicasResponse:
        """Lists the engine replicas."""
        del request
        async with _answering(context, self._operations):
            return messages.replicas_response(await self._operations.states())

    async def Load(
        self, request: admin_pb2.LoadRequest, context: LoadContext
    ) -> admin_pb2.LoadResponse:
        """Loads a version everywhere."""
        async with _answering(context, self._operations):
            version = await self._operations.load(_named(request.adapter))
            return admin_pb2.LoadResponse(adapter=messages.adapter_version(version))

    async def Unload(
        self, request: admin_pb2.UnloadRequest, context: UnloadContext
    ) -> admin_pb2.UnloadResponse:
        """Unloads a version everywhere."""
        async with _answering(context, self._operations):
            version, replicas = await self._operations.unload(_named(request.adapter))
            return admin_pb2.UnloadResponse(
                adapter=messages.adapter_version(version), replicas=replicas
            )

    async def Pin(
        self, request: admin_pb2.PinRequest, context: PinContext
    ) -> admin_pb2.PinResponse:
        """Keeps a version loaded everywhere, or lets it go."""
        async with _answering(context, self._operations):
            reference = _named(request.adapter)
            version = await self._operations.pin(reference, release=request.release)
            return admin_pb2.PinResponse(adapter=messages.adapter_version(version))

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: DrainContext
    ) -> admin_pb2.DrainResponse:
        """Takes no new requests and waits for those that run."""
        async with _answering(context, self._operations):
            asked = request.HasField("timeout")
            timeout_s = request.timeout.ToNanoseconds() / 1e9 if asked else None
            return admin_pb2.DrainResponse(requests=await self._operations.drain(timeout_s))

    async def SetRollout(
        self, request: admin_pb2.SetRolloutRequest, context: SetRolloutContext
    ) -> admin_pb2.SetRolloutResponse:
        """Divides the requests for an alias among versions."""
        async with _answering(context, self._operations):
            shares = [(share.version, share.percent) for share in request.shares]
            shadow = (request.shadow.version, request.shadow.percent)
            state = await self._operations.set_rollout(
                rollout_messages.alias_key(request.adapter, request.alias),
                shares,
                shadow if request.HasField("shadow") else None,
            )
            rollout = rollout_messages.rollout(state, self._operations)
            return admin_pb2.SetRolloutResponse(rollout=rollout)

    async def GetRollout(
        self, request: admin_pb2.GetRolloutRequest, context: GetRolloutContext
    ) -> admin_pb2.GetRolloutResponse:
        """Tells how the requests for an alias are divided."""
        async with _answering(context, self._operations):
            key = rollout_messages.alias_key(request.adapter, request.alias)
            state = await self._operations.rollout(key)
            rollout = rollout_messages.rollout(state, self._operations)
            return admin_pb2.GetRolloutResponse(rollout=rollout)


def _named(reference: str) -> str:
    if not reference:
        raise InvalidRequestError([Violation("adapter", "must not be empty")])
    return reference
