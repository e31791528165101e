"""What goes wrong is said with the right code, one reason, and the fields."""

import asyncio
import json
import math
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.config import EngineConfig, LimitsConfig
from manylora_gateway.errors import UnservableError
from manylora_gateway.worker import Servable, Worker
from manylora_registry import Cache, Registry, Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.fake_engine import FakeEngine
from tests.unit.gateway.in_process import BASE, MAX_RANK, OTHER_BASE, RunningGateway

Detail = TypeVar("Detail", bound=Message)


async def refused(call: Awaitable[Message]) -> status_pb2.Status:
    """The status a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(60):
            await call
    packed = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    assert status.code == caught.value.code().value[0]
    assert status.message == caught.value.details()
    return status


def detail(status: status_pb2.Status, kind: type[Detail]) -> Detail:
    """The one detail of `kind`."""
    found = [entry for entry in status.details if entry.TypeName() == kind.DESCRIPTOR.full_name]
    assert len(found) == 1, status
    message = kind()
    found[0].Unpack(message)
    return message


def told(status: status_pb2.Status) -> tuple[str, str]:
    """Name of the code, and the reason."""
    info = detail(status, error_details_pb2.ErrorInfo)
    assert info.domain == "manylora"
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return code.name, info.reason


SAY = pb.GenerateRequest(text="hi")
WRONG_FIELDS = {
    "input": pb.GenerateRequest(),
    "text": pb.GenerateRequest(text=""),
    "chat.messages": pb.GenerateRequest(chat=pb.Chat()),
    "chat.messages[1].role": pb.GenerateRequest(
        chat=pb.Chat(
            messages=[
                pb.Message(role="user", content="hi"),
                pb.Message(role="wizard", content="hi"),
            ]
        )
    ),
    "tokens.ids": pb.GenerateRequest(tokens=pb.Tokens()),
    "sampling.max_tokens": pb.GenerateRequest(text="hi", sampling=pb.Sampling(max_tokens=0)),
    "sampling.temperature": pb.GenerateRequest(text="hi", sampling=pb.Sampling(temperature=-0.1)),
    "sampling.top_p": pb.GenerateRequest(text="hi", sampling=pb.Sampling(top_p=math.nan)),
    "sampling.ignore_eos": pb.GenerateRequest(
        text="hi",
        sampling=pb.Sampling(
            ignore_eos=True, structured_output=pb.StructuredOutput(regex="[0-9]+")
        ),
    ),
    "sampling.stop": pb.GenerateRequest(text="hi", sampling=pb.Sampling(stop=["x"] * 17)),
    "sampling.stop[0]": pb.GenerateRequest(text="hi", sampling=pb.Sampling(stop=[""])),
    "sampling.logprobs": pb.GenerateRequest(text="hi", sampling=pb.Sampling(logprobs=21)),
    "sampling.min_p": pb.GenerateRequest(text="hi", sampling=pb.Sampling(min_p=1.5)),
    "sampling.presence_penalty": pb.GenerateRequest(
        text="hi", sampling=pb.Sampling(presence_penalty=-2.5)
    ),
    "sampling.frequency_penalty": pb.GenerateRequest(
        text="hi", sampling=pb.Sampling(frequency_penalty=math.nan)
    ),
    "sampling.repetition_penalty": pb.GenerateRequest(
        text="hi", sampling=pb.Sampling(repetition_penalty=0)
    ),
    "sampling.n": pb.GenerateRequest(text="hi", sampling=pb.Sampling(n=2)),
    "sampling.structured_output": pb.GenerateRequest(
        text="hi", sampling=pb.Sampling(structured_output=pb.StructuredOutput())
    ),
    "sampling.structured_output.json_schema": pb.GenerateRequest(
        text="hi",
        sampling=pb.Sampling(structured_output=pb.StructuredOutput(json_schema="{")),
    ),
    "sampling.structured_output.regex": pb.GenerateRequest(
        text="hi", sampling=pb.Sampling(structured_output=pb.StructuredOutput(regex="a\0"))
    ),
    "sampling.structured_output.choice": pb.GenerateRequest(
        text="hi",
        sampling=pb.Sampling(structured_output=pb.StructuredOutput(choice=pb.Alternatives())),
    ),
    "sampling.structured_output.grammar": pb.GenerateRequest(
        text="hi",
        sampling=pb.Sampling(structured_output=pb.StructuredOutput(grammar="x" * (1 << 17))),
    ),
    "adapter": pb.GenerateRequest(text="hi", adapter="../../etc/passwd"),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
async def test_a_wrong_field_is_named(gateway: RunningGateway, field: str) -> None:
    status = await refused(gateway.inference.Generate(WRONG_FIELDS[field]))
    assert told(status) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    violations = detail(status, error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == [field]


async def test_all_wrong_fields_come_at_once(gateway: RunningGateway) -> None:
    request = pb.GenerateRequest(
        text="", sampling=pb.Sampling(max_tokens=10**6, temperature=math.inf, top_p=0)
    )
    status = await refused(gateway.inference.Generate(request))
    violations = detail(status, error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == [
        "text",
        "sampling.max_tokens",
        "sampling.temperature",
        "sampling.top_p",
    ]


async def test_mistakes_beyond_count_still_fit_into_a_status(gateway: RunningGateway) -> None:
    """More than clients take in trailers would be RESOURCE_EXHAUSTED, which they try again."""
    schema = json.dumps({"properties": {}, "required": [f"é{index}" for index in range(2000)]})
    form = pb.StructuredOutput(json_schema=schema)
    request = pb.GenerateRequest(text="hi", sampling=pb.Sampling(structured_output=form))
    status = await refused(gateway.inference.Generate(request))
    assert told(status)[0] == "INVALID_ARGUMENT"
    *first, last = detail(status, error_details_pb2.BadRequest).field_violations
    assert first[0].field == "sampling.structured_output.json_schema"
    assert last.description == f"and {2000 - len(first)} more"
    assert len(status.message.encode()) + status.ByteSize() * 4 / 3 < 8192


async def test_of_what_is_too_many_no_more_than_allowed_is_looked_at(
    gateway: RunningGateway,
) -> None:
    """Half a million mistakes, which a mebibyte has room for, would hold everybody up."""
    roles = pb.Chat(messages=[pb.Message(role="wizard")] * 100)
    request = pb.GenerateRequest(chat=roles, sampling=pb.Sampling(stop=[""] * 100))
    status = await refused(gateway.inference.Generate(request))
    fields = [each.field for each in detail(status, error_details_pb2.BadRequest).field_violations]
    most = LimitsConfig().max_stop_strings
    stops = [f"sampling.stop[{index}]" for index in range(most)]
    assert fields == ["chat.messages[0].role", "sampling.stop", *stops]


async def test_a_prompt_beyond_the_context_is_refused(gateway: RunningGateway) -> None:
    for request in (
        pb.GenerateRequest(text="x" * 64),
        pb.GenerateRequest(tokens=pb.Tokens(ids=[1] * 64)),
    ):
        assert told(await refused(gateway.inference.Generate(request)))[0] == "INVALID_ARGUMENT"


async def test_a_message_beyond_the_limit_is_refused_by_name(
    served: dict[str, Version], start: Start
) -> None:
    async with start(limits=LimitsConfig(max_request_bytes=1024)) as gateway:
        status = await refused(gateway.inference.Generate(pb.GenerateRequest(text="x" * 10_000)))
        violations = detail(status, error_details_pb2.BadRequest).field_violations
        assert [violation.field for violation in violations] == ["text"]


async def test_a_batch_has_a_limit(served: dict[str, Version], start: Start) -> None:
    async with start(limits=LimitsConfig(max_batch=2)) as gateway:
        for count in (0, 3):
            call = gateway.inference.BatchGenerate(pb.BatchGenerateRequest(requests=[SAY] * count))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("nobody", "ADAPTER_NOT_FOUND"),
        ("red@7", "VERSION_NOT_FOUND"),
        ("red@sha256:000000000000", "VERSION_NOT_FOUND"),
        ("red@canary", "ALIAS_NOT_FOUND"),
    ],
)
async def test_what_is_not_there_is_not_found(
    gateway: RunningGateway, reference: str, reason: str
) -> None:
    request = pb.GenerateRequest(text="hi", adapter=reference)
    assert told(await refused(gateway.inference.Generate(request))) == ("NOT_FOUND", reason)


async def test_an_adapter_of_another_base_is_refused_before_the_engine(
    gateway: RunningGateway, published: Publish
) -> None:
    version = published("stranger", 3, base=OTHER_BASE)
    request = pb.GenerateRequest(text="hi", adapter="stranger@1")
    status = await refused(gateway.inference.Generate(request))
    assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_WRONG_BASE")
    assert version.engine_name not in gateway.engine.loads


async def test_what_may_not_be_served_does_not_wait_for_a_slot(
    served: dict[str, Version], published: Publish, start: Start
) -> None:
    published("stranger", 3, base=OTHER_BASE)
    config = EngineConfig(slots=1, host_adapters=2, max_concurrent=1)
    async with start(engine=config) as gateway:
        gateway.engine.hold_answers()
        running = gateway.inference.Generate(pb.GenerateRequest(text="hi", adapter="red"))
        await gateway.engine.until_running(1)
        request = pb.GenerateRequest(text="hi", adapter="stranger@1")
        assert told(await refused(gateway.inference.Generate(request)))[0] == "FAILED_PRECONDITION"
        gateway.engine.let_answer()
        await running


async def test_a_worker_trusts_no_front(
    registry: Registry, published: Publish, tmp_path: Path
) -> None:
    stranger, wide = published("stranger", 3, base=OTHER_BASE), published("wide", 4, rank=16)
    engine = FakeEngine(2)
    servable = Servable(BASE.fingerprint, MAX_RANK)
    cache = Cache(tmp_path / "cache")
    worker = Worker("one", engine, registry, cache, servable, EngineConfig(slots=1))
    for version in (stranger, wide):
        with pytest.raises(UnservableError):
            await worker.prepare(version)
    assert engine.loads == []


async def test_a_rank_above_the_engines_is_refused(
    gateway: RunningGateway, published: Publish
) -> None:
    published("wide", 3, rank=MAX_RANK * 2)
    request = pb.GenerateRequest(text="hi", adapter="wide@1")
    status = await refused(gateway.inference.Generate(request))
    assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_RANK_TOO_HIGH")


async def test_a_deleted_version_is_refused_though_it_was_answered_before(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    request = pb.GenerateRequest(text="hi", adapter="red@2")
    assert (await gateway.inference.Generate(request)).adapter.number == 2
    registry.delete("red@2")

    async def ask_until_refused() -> None:
        while True:
            await gateway.inference.Generate(request)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(60):
            await ask_until_refused()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_an_error_that_many_get_does_not_grow(
    registry: Registry, published: Publish, start: Start
) -> None:
    published("stranger", 5, base=OTHER_BASE)
    registry.set_alias("stranger", "production", 1)
    async with start() as gateway:
        lengths: list[int] = []
        # A followed alias answers at once, so that no new try replaces the error in between.
        for _ in range(3):
            with pytest.raises(UnservableError) as caught:
                await gateway.core.resolve("stranger")
            lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
        assert lengths[0] == lengths[-1]


async def test_a_yanked_version_is_refused(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    registry.yank("red@2")
    request = pb.GenerateRequest(text="hi", adapter="red@2")
    status = await refused(gateway.inference.Generate(request))
    assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_YANKED")


async def test_a_flipped_bit_never_reaches_the_engine(
    gateway: RunningGateway, published: Publish, tmp_path: Path
) -> None:
    version = published("spoilt", 3)
    for blob in (tmp_path / "registry").glob("blobs/sha256/*/*"):
        content = blob.read_bytes()
        if len(content) > 100 and b"lora_A" in content and blob.stat().st_mtime > 0:
            blob.chmod(0o644)
            blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    request = pb.GenerateRequest(text="hi", adapter="spoilt@1")
    status = await refused(gateway.inference.Generate(request))
    assert told(status) == ("DATA_LOSS", "ADAPTER_CORRUPT")
    assert version.engine_name not in gateway.engine.loads
    reply = await gateway.inference.Generate(pb.GenerateRequest(text="hi", adapter="red"))
    assert reply.adapter.name == "red", "the others live on"


async def test_an_adapter_the_engine_refuses_harms_no_other(
    gateway: RunningGateway, published: Publish
) -> None:
    version = published("odd", 3)
    gateway.engine.refused.add(version.engine_name)
    request = pb.GenerateRequest(text="hi", adapter="odd@1")
    for _ in range(3):
        status = await refused(gateway.inference.Generate(request))
        assert told(status) == ("FAILED_PRECONDITION", "ADAPTER_LOAD_FAILED")
    for name in ("red", "green"):
        reply = await gateway.inference.Generate(pb.GenerateRequest(text="hi", adapter=name))
        assert reply.adapter.name == name


async def test_a_lost_engine_may_be_tried_again(gateway: RunningGateway) -> None:
    """By the gateway itself once, unless something of the answer has left."""
    gateway.engine.hold_answers()
    stream = gateway.inference.GenerateStream(SAY)
    assert [await stream.read() for _ in ("started", "delta")]
    gateway.engine.dead = True
    gateway.engine.let_answer()

    async def retries_when_lost(call: Any) -> float | None:
        status = await refused(call)
        assert told(status) == ("UNAVAILABLE", "REPLICA_LOST")
        assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        return gateway.metrics.registry.get_sample_value("manylora_replica_retries_total")

    assert await retries_when_lost(stream.read()) == 0
    assert await retries_when_lost(gateway.inference.Generate(SAY)) == 1


async def test_what_nobody_foresaw_is_opaque(
    served: dict[str, Version], start: Start, registry: Registry
) -> None:
    async with start() as gateway:
        gateway.engine.tokenize = None  # type: ignore[assignment]
        status = await refused(gateway.inference.Generate(SAY))
        assert told(status) == ("INTERNAL", "INTERNAL")
        assert "NoneType" not in status.message


@pytest.mark.parametrize("method", ["Load", "Unload"])
async def test_an_operator_must_name_an_adapter(gateway: RunningGateway, method: str) -> None:
    request = {"Load": admin_pb2.LoadRequest, "Unload": admin_pb2.UnloadRequest}[method]()
    status = await refused(getattr(gateway.admin, method)(request))
    assert told(status)[0] == "INVALID_ARGUMENT"
