"""What a request asks for reaches the engine, and what the engine did comes back."""

import asyncio

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2

from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.config import ConstraintKind, LimitsConfig
from manylora_gateway.constraints import KINDS
from manylora_gateway.engine import (
    Constraint,
    Grammar,
    JsonObject,
    JsonSchema,
    OneOf,
    Regex,
    Sampling,
)
from manylora_registry import Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.fake_engine import IMPOSSIBLE
from tests.unit.gateway.in_process import RunningGateway
from tests.unit.gateway.test_errors import detail, refused, told


async def test_every_parameter_reaches_the_engine(gateway: RunningGateway) -> None:
    sampling = pb.Sampling(
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        n=2,
        seed=7,
        stop=["END"],
        ignore_eos=True,
        logprobs=1,
    )
    await gateway.inference.Generate(pb.GenerateRequest(text="hi", sampling=sampling))
    assert gateway.engine.samplings[-1] == Sampling(
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        n=2,
        seed=7,
        stop=("END",),
        ignore_eos=True,
        logprobs=1,
    )


async def test_what_is_left_out_is_greedy_and_free(gateway: RunningGateway) -> None:
    await gateway.inference.Generate(pb.GenerateRequest(text="hi"))
    assert gateway.engine.samplings[-1] == Sampling(max_tokens=4)


SCHEMA = '{"type": "object"}'


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        (pb.StructuredOutput(json_schema=SCHEMA), JsonSchema(SCHEMA)),
        (pb.StructuredOutput(json_object=pb.JsonObject()), JsonObject()),
        (pb.StructuredOutput(regex="[0-9]+"), Regex("[0-9]+")),
        (pb.StructuredOutput(choice=pb.Alternatives(values=["a", "b"])), OneOf(("a", "b"))),
        (pb.StructuredOutput(grammar='root ::= "a"'), Grammar('root ::= "a"')),
    ],
)
async def test_a_constraint_reaches_the_engine(
    gateway: RunningGateway, asked: pb.StructuredOutput, constraint: Constraint
) -> None:
    sampling = pb.Sampling(structured_output=asked)
    await gateway.inference.Generate(pb.GenerateRequest(text="hi", sampling=sampling))
    assert gateway.engine.samplings[-1].constraint == constraint


@pytest.mark.parametrize("allowed", [("json_schema", "choice"), ()])
async def test_a_kind_of_constraint_can_be_ruled_out(
    served: dict[str, Version], start: Start, allowed: tuple[ConstraintKind, ...]
) -> None:
    asked = {
        "json_schema": pb.StructuredOutput(json_schema=SCHEMA),
        "json_object": pb.StructuredOutput(json_object=pb.JsonObject()),
        "regex": pb.StructuredOutput(regex="a"),
        "choice": pb.StructuredOutput(choice=pb.Alternatives(values=["a"])),
        "grammar": pb.StructuredOutput(grammar='root ::= "a"'),
    }
    over_http = {
        "response_format.json_schema.schema": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}},
            }
        },
        "response_format": {"response_format": {"type": "json_object"}},
        "structured_outputs.regex": {"structured_outputs": {"regex": "a"}},
        "structured_outputs.choice": {"structured_outputs": {"choice": ["a"]}},
        "structured_outputs.grammar": {"structured_outputs": {"grammar": 'root ::= "a"'}},
    }
    async with start(limits=LimitsConfig(constraints=allowed)) as gateway:
        for kind, form in asked.items():
            request = pb.GenerateRequest(text="hi", sampling=pb.Sampling(structured_output=form))
            if kind in allowed:
                await gateway.inference.Generate(request)
                continue
            status = await refused(gateway.inference.Generate(request))
            assert told(status) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
            (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
            assert violation.field == f"sampling.structured_output.{kind}"
            assert violation.description.endswith(", ".join(allowed) or "none")
        async with httpx.AsyncClient(timeout=60) as http:
            for kind, (param, form) in zip(asked, over_http.items(), strict=True):
                body = {"model": "red", "prompt": "hi", "max_tokens": 1, **form}
                reply = await http.post(f"{gateway.http}/v1/completions", json=body)
                assert reply.status_code == (200 if kind in allowed else 400), reply.text
                if kind not in allowed:
                    assert reply.json()["error"]["param"] == param
    kinds = {
        sampling.constraint and KINDS[type(sampling.constraint)]
        for sampling in gateway.engine.samplings
    }
    assert kinds - {None} == set(allowed)


async def test_a_constraint_the_engine_refuses_frees_the_seat(gateway: RunningGateway) -> None:
    structured = pb.StructuredOutput(regex=IMPOSSIBLE.pattern)
    request = pb.GenerateRequest(
        adapter="red", text="hi", sampling=pb.Sampling(structured_output=structured)
    )
    for _ in range(10):  # more than there are seats
        status = await refused(gateway.inference.Generate(request))
        assert told(status) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert gateway.engine.running == []


async def test_several_answers_come_by_index(gateway: RunningGateway) -> None:
    sampling = pb.Sampling(n=3, temperature=1, max_tokens=2, logprobs=2)
    request = pb.GenerateRequest(text="hi", sampling=sampling)
    whole = await gateway.inference.Generate(request)
    assert [choice.text for choice in whole.choices] == ["base base "] * 3
    assert whole.text == whole.choices[0].text
    assert whole.usage == pb.Usage(prompt_tokens=2, completion_tokens=6)
    entry = whole.choices[2].logprobs[0]
    assert [candidate.text for candidate in entry.top] == ["base ", "w1"]

    events = [event async for event in gateway.inference.GenerateStream(request)]
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    texts = ["".join(delta.text for delta in deltas if delta.choice == c) for c in range(3)]
    assert texts == ["base base "] * 3
    finished = events[-1].finished
    assert list(finished.finish_reasons) == [pb.FINISH_REASON_LENGTH] * 3
    assert finished.usage == whole.usage


async def test_one_answer_has_no_list_of_choices(gateway: RunningGateway) -> None:
    reply = await gateway.inference.Generate(pb.GenerateRequest(text="hi"))
    assert not reply.choices


async def test_timing_tells_load_from_queue(
    served: dict[str, Version], gateway: RunningGateway
) -> None:
    await gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
    warm = await gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
    assert warm.timing.load.ToTimedelta().total_seconds() == 0, "it was loaded long ago"

    gateway.engine.hold_answers()
    held = gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
    await gateway.engine.until_running(1)
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(0.05)  # the time that has to show
    waited = asyncio.get_running_loop().time() - began
    gateway.engine.let_answer()
    timing = (await held).timing
    assert timing.decode.ToTimedelta().total_seconds() >= waited
    assert timing.queue.ToTimedelta().total_seconds() >= 0


async def test_a_cold_adapter_shows_as_load(gateway: RunningGateway, published: Publish) -> None:
    published("cold", 9)
    reply = await gateway.inference.Generate(pb.GenerateRequest(adapter="cold@1", text="hi"))
    assert reply.timing.load.ToTimedelta().total_seconds() > 0


async def test_a_request_bears_its_clients_name(gateway: RunningGateway) -> None:
    call = gateway.inference.Generate(
        pb.GenerateRequest(text="hi"), metadata=(("x-request-id", "mine-1"),)
    )
    assert (await call).request_id == "mine-1"
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"

    wrong = gateway.inference.Generate(pb.GenerateRequest(), metadata=(("x-request-id", "mine-2"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await wrong
    assert dict(caught.value.trailing_metadata() or ())["x-request-id"] == "mine-2"


async def test_a_request_without_a_name_gets_one(gateway: RunningGateway) -> None:
    first = await gateway.inference.Generate(pb.GenerateRequest(text="hi"))
    second = await gateway.inference.Generate(pb.GenerateRequest(text="hi"))
    assert first.request_id
    assert first.request_id != second.request_id


async def test_two_requests_may_bear_one_name(gateway: RunningGateway) -> None:
    calls = [
        gateway.inference.Generate(
            pb.GenerateRequest(text="hi"), metadata=(("x-request-id", "same"),)
        )
        for _ in range(4)
    ]
    assert {reply.request_id for reply in await asyncio.gather(*calls)} == {"same"}


@pytest.mark.parametrize("name", ["with spaces", "x" * 129, "semi;colon"])
async def test_a_name_that_cannot_be_logged_is_refused(gateway: RunningGateway, name: str) -> None:
    call = gateway.inference.Generate(
        pb.GenerateRequest(text="hi"), metadata=(("x-request-id", name),)
    )
    assert told(await refused(call))[0] == "INVALID_ARGUMENT"
