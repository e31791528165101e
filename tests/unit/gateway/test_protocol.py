"""Clients of another make, and clients that mean no good: the server answers, typed, and lives."""

import asyncio
import json
import math
import socket
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.openai_http.bodies import ChatBody, CompletionBody
from tests.unit.gateway.in_process import RunningGateway

FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
SERVICE = "manylora.inference.v1.InferenceService"
UNARY = ("Generate", "CountTokens", "ListAdapters")
STREAMS = ("GenerateStream", "BatchGenerate")

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}


def raw(value: bytes) -> bytes:
    return value


async def still_answers(gateway: RunningGateway) -> None:
    reply = await gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
    assert reply.adapter.name == "red"
    assert gateway.engine.running == []


def check_refusal(error: grpc.RpcError) -> None:
    """The status is one of those a bad request gets, and says why."""
    call: Any = error
    assert call.code() in REFUSALS, (call.code(), call.details())
    packed = dict(call.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    kinds = {detail.TypeName(): detail for detail in status.details}
    info = error_details_pb2.ErrorInfo()
    assert kinds["google.rpc.ErrorInfo"].Unpack(info)
    assert info.domain == "manylora"
    if call.code() is grpc.StatusCode.INVALID_ARGUMENT:
        assert "google.rpc.BadRequest" in kinds


async def test_a_client_without_stubs_learns_all_it_needs(gateway: RunningGateway) -> None:
    def ask() -> None:
        with grpc.insecure_channel(gateway.front.inference_address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert SERVICE in database.get_services()
            pool = descriptor_pool.DescriptorPool(database)
            service: Any = pool.FindServiceByName(SERVICE)
            for method in service.methods:
                request = message_factory.GetMessageClass(method.input_type)
                reply = message_factory.GetMessageClass(method.output_type)
                assert request.DESCRIPTOR.file.pool is pool
                assert reply.DESCRIPTOR.full_name.startswith("manylora.inference.v1.")
            generate = service.methods_by_name["Generate"]
            request_class: Any = message_factory.GetMessageClass(generate.input_type)
            reply_class: Any = message_factory.GetMessageClass(generate.output_type)
            request = request_class(adapter="red")
            request.chat.messages.add(role="user", content="hi")
            request.sampling.max_tokens = 2
            call = channel.unary_unary(
                f"/{SERVICE}/Generate",
                request_serializer=request_class.SerializeToString,
                response_deserializer=reply_class.FromString,
            )
            reply = call(request)
            assert (reply.adapter.name, reply.usage.completion_tokens) == ("red", 2)
            stream = channel.unary_stream(
                f"/{SERVICE}/GenerateStream",
                request_serializer=request_class.SerializeToString,
                response_deserializer=message_factory.GetMessageClass(
                    service.methods_by_name["GenerateStream"].output_type
                ).FromString,
            )
            events: list[Any] = list(stream(request))
            assert [event.WhichOneof("event") for event in events] == [
                "started",
                "delta",
                "delta",
                "finished",
            ]

    await asyncio.to_thread(ask)


async def test_a_health_probe_needs_no_stubs_of_ours(gateway: RunningGateway) -> None:
    """What grpc_health_probe does: the method by its name, the messages byte by byte."""
    serving = b"\x08\x01"
    for address in (gateway.front.inference_address, gateway.front.admin_address):
        async with grpc.aio.insecure_channel(address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert await check(b"") == serving
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            assert await watch.read() == serving
            watch.cancel()
            listed = await channel.unary_unary("/grpc.health.v1.Health/List")(b"")
            untyped: Any = health_pb2
            statuses = untyped.HealthListResponse.FromString(listed).statuses
            assert {name: entry.SerializeToString() for name, entry in statuses.items()} == (
                dict.fromkeys(("", SERVICE, "manylora.admin.v1.AdminService"), serving)
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(b"\x0a\x07nothing")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_any_bytes_for_a_message_get_a_typed_answer(gateway: RunningGateway) -> None:
    channel = grpc.insecure_channel(gateway.front.inference_address)

    @FUZZ
    @given(st.sampled_from(UNARY + STREAMS), st.binary(max_size=200))
    def fuzz(method: str, message: bytes) -> None:
        path = f"/{SERVICE}/{method}"
        try:
            if method in UNARY:
                channel.unary_unary(path, raw, raw)(message, timeout=60)
            else:
                list(channel.unary_stream(path, raw, raw)(message, timeout=60))
        except grpc.RpcError as error:
            check_refusal(error)

    await asyncio.to_thread(fuzz)
    channel.close()
    await still_answers(gateway)


TEXT = st.text(max_size=20)
NUMBER = st.one_of(
    st.floats(), st.sampled_from([0.0, 1.0, 2.0, -2.0, math.nan, math.inf, 1e300, 1e-300])
)
COUNT = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
MESSAGES = st.builds(
    pb.Message, role=st.sampled_from(["system", "user", "assistant", "tool", ""]), content=TEXT
)
STRUCTURED = st.one_of(
    st.builds(pb.StructuredOutput, json_schema=TEXT),
    st.builds(pb.StructuredOutput, regex=TEXT),
    st.builds(pb.StructuredOutput, grammar=TEXT),
    st.builds(
        pb.StructuredOutput, choice=st.builds(pb.Alternatives, values=st.lists(TEXT, max_size=3))
    ),
    st.just(pb.StructuredOutput(json_object=pb.JsonObject())),
    st.just(pb.StructuredOutput()),
)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


SAMPLING = st.builds(
    pb.Sampling,
    max_tokens=maybe(COUNT),
    temperature=maybe(NUMBER),
    top_p=maybe(NUMBER),
    top_k=maybe(COUNT),
    min_p=maybe(NUMBER),
    presence_penalty=maybe(NUMBER),
    frequency_penalty=maybe(NUMBER),
    repetition_penalty=maybe(NUMBER),
    n=maybe(COUNT),
    seed=maybe(st.integers(0, 2**64 - 1)),
    stop=st.lists(TEXT, max_size=3),
    logprobs=maybe(COUNT),
    structured_output=maybe(STRUCTURED),
)
INPUTS = st.one_of(
    st.builds(lambda text: {"text": text}, st.one_of(TEXT, st.text(min_size=65, max_size=80))),
    st.builds(lambda turns: {"chat": pb.Chat(messages=turns)}, st.lists(MESSAGES, max_size=3)),
    st.builds(
        lambda ids: {"tokens": pb.Tokens(ids=ids)},
        st.lists(st.integers(0, 2**32 - 1), max_size=70),
    ),
    st.just({}),
)
REFERENCE = st.one_of(
    st.sampled_from(["", "red", "green@1", "red@production", "red@9", "nobody", "red@"]), TEXT
)


async def test_any_fields_get_a_typed_answer(gateway: RunningGateway) -> None:
    channel = grpc.insecure_channel(gateway.front.inference_address)
    generate = channel.unary_unary(
        f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
    )
    answered = 0

    # By chance alone one run in some hundreds asks for nothing that can be answered.
    @example("red", {"text": "hi"}, None)
    @FUZZ
    @given(REFERENCE, INPUTS, maybe(SAMPLING))
    def fuzz(adapter: str, given_input: dict[str, Any], sampling: pb.Sampling | None) -> None:
        nonlocal answered
        request = pb.GenerateRequest(adapter=adapter, sampling=sampling, **given_input)
        try:
            reply = generate(request, timeout=60)
        except grpc.RpcError as error:
            check_refusal(error)
        else:
            answered += 1
            asked = sampling.n if sampling is not None and sampling.HasField("n") else 1
            assert len(reply.choices) == (asked if asked > 1 else 0)

    await asyncio.to_thread(fuzz)
    channel.close()
    assert answered
    await still_answers(gateway)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(["red", "text"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
PARAMETERS = st.sampled_from(
    sorted({*ChatBody.model_fields, *CompletionBody.model_fields, "tools"})
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.one_of(st.just([{"role": "user", "content": "hi"}]), JSON),
        "prompt": st.one_of(st.just("hi"), JSON),
        "model": st.one_of(st.just("red"), JSON),
    },
).flatmap(
    lambda body: st.builds(lambda more: body | more, st.dictionaries(PARAMETERS, JSON, max_size=2))
)


async def test_any_json_gets_a_typed_answer(gateway: RunningGateway) -> None:
    with httpx.Client(base_url=gateway.http, timeout=60) as client:

        @FUZZ
        @given(st.sampled_from(["chat/completions", "completions"]), st.one_of(BODY, JSON))
        def fuzz(endpoint: str, body: Any) -> None:
            content = json.dumps(body).encode()
            check_reply(client.post(f"/v1/{endpoint}", content=content))

        await asyncio.to_thread(fuzz)
    await still_answers(gateway)


def check_reply(reply: httpx.Response) -> None:
    """It is an answer, or an error in OpenAI's form that is the client's."""
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


async def test_any_bytes_on_the_http_port_leave_it_standing(gateway: RunningGateway) -> None:
    host, _, port = gateway.front.addresses["http"].rpartition(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    pieces = st.sampled_from(
        [
            head,
            b"content-length: 5\r\n\r\n",
            b"content-length: -1\r\n\r\n",
            b"content-length: 99999999999999999999\r\n\r\n",
            b"transfer-encoding: chunked\r\n\r\n",
            b"zz\r\n",
            b"\r\n\r\n",
            b"GET /%ff%00 HTTP/1.1\r\nhost: x\r\n\r\n",
            b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
            b"x-request-id: a b\r\n",
            b"authorization: \xff\xfe\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
    )

    @FUZZ
    @given(st.lists(st.one_of(pieces, st.binary(max_size=40)), max_size=5))
    def fuzz(parts: list[bytes]) -> None:
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"".join(parts))
            connection.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while chunk := connection.recv(1 << 16):
                    received += chunk
            except ConnectionResetError:
                pass
        assert b" 500 " not in received.partition(b"\r\n")[0], received

    await asyncio.to_thread(fuzz)
    await still_answers(gateway)


async def test_a_message_beyond_grpcs_limit_is_refused_before_it_is_read(
    gateway: RunningGateway,
) -> None:
    options: list[tuple[str, int]] = [("grpc.max_send_message_length", -1)]
    big = b"x" * ((64 << 20) + 1)
    async with grpc.aio.insecure_channel(gateway.front.inference_address, options) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/Generate", raw, raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(big, timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(64 << 20) in (caught.value.details() or "")
    await still_answers(gateway)
