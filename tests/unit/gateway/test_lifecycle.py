"""Requests that end early free what they held; a full or ending gateway says so."""

import asyncio
import json
import logging
import socket
from collections import Counter
from itertools import pairwise
from typing import Any, cast

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora.inference.v1 import inference_pb2_grpc
from manylora_client.status import call_error
from manylora_gateway.config import EngineConfig, LimitsConfig
from manylora_gateway.limits import Limits
from manylora_gateway.requests import Requests
from manylora_gateway.servicers import InferenceServicer, StreamContext
from manylora_gateway.worker import LONG_PROMPT
from manylora_registry import Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.fake_engine import MAX_CONTEXT
from tests.unit.gateway.in_process import RunningGateway
from tests.unit.gateway.test_errors import detail, refused, told
from tests.unit.gateway.test_observing import until

SAY = pb.GenerateRequest(adapter="red", text="hi")


async def requests(gateway: RunningGateway) -> int:
    """Requests the one replica runs or holds waiting."""
    listing = await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest())
    return listing.replicas[0].requests


async def test_a_cancelled_stream_frees_its_seat(served: dict[str, Version], start: Start) -> None:
    config = EngineConfig(slots=1, host_adapters=2, max_concurrent=1, express=0)
    async with start(engine=config) as gateway:
        gateway.engine.hold_answers()
        call = gateway.inference.GenerateStream(SAY)
        await call.read()
        await gateway.engine.until_running(1)
        call.cancel()
        await gateway.engine.until_running(0)
        gateway.engine.let_answer()
        await gateway.inference.Generate(pb.GenerateRequest(adapter="green", text="hi"))
        assert await requests(gateway) == 0


async def test_a_cancelled_waiting_request_leaves_the_queue(
    served: dict[str, Version], start: Start
) -> None:
    config = EngineConfig(slots=1, host_adapters=2, max_concurrent=1, express=0)
    async with start(engine=config) as gateway:
        gateway.engine.hold_answers()
        running = gateway.inference.Generate(SAY)
        await gateway.engine.until_running(1)
        waiting = gateway.inference.GenerateStream(pb.GenerateRequest(text="hi"))
        first = await waiting.read()
        assert isinstance(first, pb.GenerateStreamResponse)
        assert first.HasField("started")
        waiting.cancel()
        while await requests(gateway) > 1:
            pass
        gateway.engine.let_answer()
        assert (await running).text
        assert gateway.engine.prompts.count(list(b"hi")) == 1


async def test_a_passed_deadline_frees_its_seat(gateway: RunningGateway) -> None:
    gateway.engine.hold_answers()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.inference.Generate(SAY, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # A call that came as its deadline passed ends a moment later.
    while await requests(gateway):
        pass


async def test_more_requests_than_allowed_are_refused_with_a_time_to_retry(
    served: dict[str, Version], start: Start
) -> None:
    async with start(limits=LimitsConfig(max_requests=2, default_max_tokens=2)) as gateway:
        gateway.engine.hold_answers()
        running = [gateway.inference.Generate(SAY) for _ in range(2)]
        await gateway.engine.until_running(2)
        status = await refused(gateway.inference.Generate(SAY))
        assert told(status) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        gateway.engine.let_answer()
        await asyncio.gather(*running)
        await gateway.inference.Generate(SAY)


async def test_a_draining_gateway_ends_what_runs_and_takes_no_more(
    gateway: RunningGateway,
) -> None:
    gateway.engine.hold_answers()
    running = gateway.inference.Generate(SAY)
    await gateway.engine.until_running(1)
    drained = asyncio.create_task(gateway.admission.drain())
    await asyncio.sleep(0)
    status = await refused(gateway.inference.Generate(SAY))
    assert told(status) == ("UNAVAILABLE", "DRAINING")
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert not drained.done()
    gateway.engine.let_answer()
    assert (await running).text
    await drained


async def test_what_outlasts_the_drain_is_told_so(gateway: RunningGateway) -> None:
    gateway.engine.hold_answers()
    stream = gateway.inference.GenerateStream(SAY)
    batch = gateway.inference.BatchGenerate(pb.BatchGenerateRequest(requests=[SAY]))
    unary = gateway.inference.Generate(SAY)
    assert [await stream.read() for _ in ("started", "delta")]
    body = {"model": "red", "prompt": "hi"}
    async with httpx.AsyncClient(base_url=gateway.http, timeout=60) as http:
        whole = asyncio.create_task(http.post("/v1/completions", json=body))
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as events:
            await gateway.engine.until_running(5)
            gateway.admission.answering.end()
            *_, last = (await events.aread()).decode().split("data: ")
        reply = await whole
    assert json.loads(last)["error"]["code"] == "draining"
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in reply.headers
    for call in (unary, stream.read(), batch.read()):
        assert told(await refused(cast("Any", call))) == ("UNAVAILABLE", "DRAINING")
    await gateway.engine.until_running(0)


async def test_what_operators_wait_for_is_told_of_the_end(
    gateway: RunningGateway, published: Publish
) -> None:
    published("blue", 5)
    gateway.engine.hold_loads()
    loaded = len(gateway.engine.loads)
    load = gateway.admin.Load(admin_pb2.LoadRequest(adapter="blue@1"))
    await gateway.engine.until_loads(loaded + 1)
    await gateway.operations.close()
    assert told(await refused(load)) == ("UNAVAILABLE", "DRAINING")


LOUD = 10_000
"""Repeats of a word that make an answer more than any window or socket takes."""


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged at WARNING or above, but for what gRPC says of its own poller.

    Beside loops of earlier tests it finds, rarely, an event taken already (grpc/grpc#25364).
    """
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in map(logging.LogRecord.getMessage, said) if "PollerComp" not in text]


class Ended:
    """What gRPC gives a handler, of a call that has ended without its having heard."""

    def __init__(self) -> None:
        self.aborted = False

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> None:
        return None

    def set_trailing_metadata(self, _metadata: object) -> None:
        return

    async def write(self, _message: object) -> None:
        raise grpc.aio.InternalError("Failed to execute a batch.")

    async def abort(self, *_arguments: object) -> None:
        self.aborted = True
        raise grpc.aio.InternalError("Failed to execute a batch.")


async def test_a_call_that_ended_is_no_incident(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    context = Ended()
    servicer = InferenceServicer(gateway.core, Requests(Limits(LimitsConfig(), MAX_CONTEXT)))
    await servicer.GenerateStream(SAY, cast("StreamContext", context))
    assert not context.aborted
    assert not warnings(caplog)
    assert gateway.admission.inside == 0


async def test_an_error_of_a_call_that_ended_is_no_incident(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    context = Ended()
    servicer = InferenceServicer(gateway.core, Requests(Limits(LimitsConfig(), MAX_CONTEXT)))
    asked = pb.GenerateRequest(adapter="nobody", text="hi")
    await servicer.Generate(asked, cast("Any", context))
    assert context.aborted
    assert not warnings(caplog)


async def test_a_client_that_reads_nothing_loses_its_place(
    served: dict[str, Version], start: Start
) -> None:
    async with start(limits=LimitsConfig(max_requests=2, stall_s=0.3)) as gateway:
        gateway.engine.repeats = LOUD
        sampling = pb.Sampling(max_tokens=MAX_CONTEXT)
        call = gateway.inference.GenerateStream(
            pb.GenerateRequest(adapter="red", text="hi", sampling=sampling)
        )
        await call.read()
        await until(lambda: not gateway.admission.inside)
        gateway.engine.repeats = 1
        assert (await gateway.inference.Generate(SAY)).text
        call.cancel()


@pytest.mark.parametrize("speech", ["loud", "low"])
async def test_an_http_client_that_reads_nothing_loses_its_place(
    served: dict[str, Version], start: Start, speech: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with start(limits=LimitsConfig(max_requests=2, stall_s=0.3)) as gateway:
        gateway.engine.repeats = LOUD
        if speech == "low":
            # What the kernel takes for the client, who has no room for it; then little comes.
            gateway.engine.repeats //= 4
            gateway.engine.hold_answers()
        content = json.dumps(
            {"model": "red", "prompt": "hi", "max_tokens": MAX_CONTEXT, "stream": True}
        ).encode()
        already = len(gateway.engine.prompts)
        host, _, port = gateway.front.addresses["http"].rpartition(":")
        silent = socket.socket()
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.setblocking(False)
        with silent:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(silent, (host, int(port)))
            path, length = "/v1/completions", len(content)
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
            await loop.sock_sendall(silent, head.encode() + content)
            # Not whether it is inside, which it may be between two looks alone.
            await until(lambda: len(gateway.engine.prompts) > already)
            await until(lambda: not gateway.admission.inside)
    # It is the client's doing, and no incident of the gateway.
    assert not warnings(caplog)


@pytest.mark.parametrize(
    "long",
    [
        pb.GenerateRequest(adapter="red", text="x" * LONG_PROMPT),
        # The chat template writes something around each.
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="user")] * 2000)),
    ],
    ids=["text", "turns"],
)
async def test_a_long_prompt_is_read_beside_the_others(
    gateway: RunningGateway, long: pb.GenerateRequest
) -> None:
    gateway.engine.hold_reading()
    reading = asyncio.ensure_future(refused(gateway.inference.Generate(long)))
    for _ in range(3):
        assert (await gateway.inference.Generate(SAY)).text
    assert not reading.done()
    gateway.engine.let_read()
    assert told(await reading)[0] == "INVALID_ARGUMENT"


async def test_others_go_on_between_the_requests_of_a_batch(gateway: RunningGateway) -> None:
    """Sixty requests of a mebibyte each, read at one go, held the front up for a minute."""
    bad = pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="wizard")]))
    refused_by_then = [0.0]

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            value = gateway.metrics.registry.get_sample_value(
                "manylora_rejections_total", {"reason": "INVALID_REQUEST"}
            )
            refused_by_then.append(value or 0.0)

    going_on = asyncio.create_task(others())
    batch = gateway.inference.BatchGenerate(pb.BatchGenerateRequest(requests=[bad] * 20))
    replies = [reply async for reply in batch]
    going_on.cancel()
    assert [reply.error.code for reply in replies] == [
        grpc.StatusCode.INVALID_ARGUMENT.value[0]
    ] * 20
    turns = [after - before for before, after in pairwise(refused_by_then)]
    assert (sum(turns), max(turns)) == (20, 1)


async def test_a_load_outlives_the_client_who_asked_for_it(
    gateway: RunningGateway, published: Publish
) -> None:
    version = published("blue", 5)
    already = len(gateway.engine.loads)
    gateway.engine.hold_loads()
    call = gateway.inference.Generate(pb.GenerateRequest(adapter="blue@1", text="hi"))
    await gateway.engine.until_loads(already + 1)
    call.cancel()
    gateway.engine.let_load()
    reply = await gateway.inference.Generate(pb.GenerateRequest(adapter="blue@1", text="hi"))
    assert reply.adapter.digest == version.digest
    assert gateway.engine.loads.count(version.engine_name) == 1


BURST = 2000


async def test_a_burst_the_front_has_not_looked_at_is_answered_in_our_words(
    served: dict[str, Version], start: Start
) -> None:
    """gRPC by itself cancels most of it, without a reason and without a time to come back."""
    async with start(limits=LimitsConfig(max_requests=4)) as gateway:
        with grpc.insecure_channel(gateway.front.inference_address) as channel:
            generate = inference_pb2_grpc.InferenceServiceStub(channel).Generate
            # The gateway's loop is this one: while they are sent, it looks at none of them.
            calls = [generate.future(pb.GenerateRequest(text="hi")) for _ in range(BURST)]
            answers = await asyncio.to_thread(lambda: [call.exception() for call in calls])
    reasons = Counter(
        error and call_error(cast("grpc.RpcError", error), "it").reason for error in answers
    )
    assert reasons.keys() == {None, "QUEUE_FULL"}
