"""What operators see: metrics, health, drains, pins, traces, logs."""

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, cast

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway import tracing
from manylora_gateway.config import AdapterLimits, EngineConfig, LimitsConfig, TracingConfig
from manylora_gateway.limits import Limits
from manylora_gateway.logs import log_to_stderr, requests_logger
from manylora_gateway.metrics import Metrics
from manylora_gateway.requests import Requests
from manylora_gateway.servicers import InferenceContext, InferenceServicer
from manylora_gateway.span_exporter import SpanExporter
from manylora_registry import Registry, Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.fake_engine import MAX_CONTEXT
from tests.unit.gateway.in_process import RunningGateway
from tests.unit.gateway.test_errors import refused, told
from tests.unit.gateway.test_pool import Clock, version

SAY = pb.GenerateRequest(adapter="red", text="hi")
ROOT = Path(__file__).parents[3]


def scraped(metrics: Metrics) -> str:
    host, port = metrics.serve("127.0.0.1:0")
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=60) as answer:
        return answer.read().decode()


async def test_metrics_tell_requests_tokens_and_residents(gateway: RunningGateway) -> None:
    for _ in range(3):
        await gateway.inference.Generate(SAY)
    await refused(gateway.inference.Generate(pb.GenerateRequest(adapter="nobody", text="hi")))
    async with grpc.aio.insecure_channel(gateway.front.inference_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await channel.unary_unary("/manylora.inference.v1.InferenceService/Guess")(b"")
    await gateway.fleet.look()
    text = scraped(gateway.metrics)
    for line in (
        'manylora_requests_total{adapter="red",code="OK",version="1"} 3.0',
        'manylora_generated_tokens_total{adapter="red",version="1"} 12.0',
        'manylora_prompt_tokens_total{adapter="red",version="1"} 6.0',
        'manylora_time_to_first_token_seconds_count{adapter="red",version="1"} 3.0',
        'manylora_rejections_total{reason="ADAPTER_NOT_FOUND"} 1.0',
        'manylora_rejections_total{reason="UNIMPLEMENTED"} 1.0',
        'manylora_adapters_resident{replica="replica-0",tier="host"} 2.0',
        'manylora_adapters_resident{replica="replica-0",tier="disk"} 2.0',
        'manylora_adapter_loads_total{replica="replica-0"} 2.0',
        "manylora_replicas_up 1.0",
        "manylora_requests_in_flight 0.0",
    ):
        assert line in text.splitlines(), line


class Late:
    """What gRPC gives a handler, of a call whose deadline passes as soon as it is under way.

    A real one may pass before the call has come, and then there is nothing to count.
    """

    def time_remaining(self) -> float:
        return 0.0

    def invocation_metadata(self) -> None:
        return None

    def set_trailing_metadata(self, _metadata: object) -> None:
        return

    async def abort(self, code: grpc.StatusCode, *_: object) -> NoReturn:
        raise grpc.aio.AbortError(code.name)


async def test_a_passed_deadline_is_told_from_a_client_that_left(gateway: RunningGateway) -> None:
    gateway.engine.hold_answers()
    servicer = InferenceServicer(gateway.core, Requests(Limits(LimitsConfig(), MAX_CONTEXT)))
    with pytest.raises(grpc.aio.AbortError, match="DEADLINE_EXCEEDED"):
        await servicer.Generate(SAY, cast("InferenceContext", Late()))
    call = gateway.inference.Generate(SAY, timeout=600)
    await gateway.engine.until_running(1)
    call.cancel()
    await gateway.engine.until_running(0)
    text = scraped(gateway.metrics)
    for line in (
        'manylora_requests_total{adapter="red",code="DEADLINE_EXCEEDED",version="1"} 1.0',
        'manylora_requests_total{adapter="red",code="CANCELLED",version="1"} 1.0',
        'manylora_rejections_total{reason="DEADLINE_EXCEEDED"} 1.0',
        'manylora_rejections_total{reason="CANCELLED"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_a_deadline_that_grpc_sent_rounded_up_has_passed_when_the_client_goes() -> None:
    now = 1000.0
    metrics = Metrics(clock=lambda: now)
    # What the gateway is told of a timeout of 299.01 s and of one of 300 s.
    seen = metrics.observation("a", "t", now + 300)
    now += 299.01
    assert seen.failure(asyncio.CancelledError()) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    now -= 10
    assert seen.failure(asyncio.CancelledError()) == ("CANCELLED", "CANCELLED")


def test_labels_are_bounded_and_given_back() -> None:
    metrics = Metrics(max_versions=2)
    one, two, three = map(version, ("one", "two", "three"))
    assert metrics.labels(one) == ("one", "1")
    assert metrics.labels(two) == ("two", "1")
    assert metrics.labels(three) == ("other", "other")
    metrics.requests.labels(*metrics.labels(one), "OK").inc()
    metrics.forget(one)
    assert metrics.labels(three) == ("three", "1")
    assert 'adapter="one"' not in scraped(metrics)


def test_a_label_of_an_idle_version_goes_to_one_that_needs_it() -> None:
    now = 0.0
    metrics = Metrics(max_versions=2, clock=lambda: now)
    one, two, three, four = map(version, ("one", "two", "three", "four"))
    metrics.requests.labels(*metrics.labels(one), "OK").inc()
    metrics.labels(two)
    now = 2000.0
    metrics.requests.labels(*metrics.labels(two), "OK").inc()
    assert metrics.labels(three) == ("other", "other")
    now = 4000.0
    assert metrics.labels(three) == ("three", "1")
    assert metrics.labels(four) == ("other", "other")
    assert 'adapter="one"' not in scraped(metrics)
    assert 'adapter="two"' in scraped(metrics)


async def test_a_client_that_leaves_has_used_its_prompt_too(
    served: dict[str, Version], start: Start
) -> None:
    limits = LimitsConfig(each_adapter=AdapterLimits(tokens_per_second=0.5))
    asked = pb.GenerateRequest(adapter="red", text="x" * 50, sampling=pb.Sampling(max_tokens=10))
    async with start(limits=limits) as gateway:
        gateway.engine.hold_answers()
        call = gateway.inference.GenerateStream(asked)
        async for event in call:
            if event.HasField("delta"):
                break
        call.cancel()
        await until(lambda: not gateway.admission.inside)
        # More than the burst of ten seconds.
        status = await refused(gateway.inference.Generate(asked))
        assert told(status) == ("RESOURCE_EXHAUSTED", "TOKEN_RATE_LIMIT")
        line = 'manylora_prompt_tokens_total{adapter="red",version="1"} 50.0'
        assert line in scraped(gateway.metrics).splitlines()


async def test_a_version_that_is_replaced_under_a_request_gives_its_label_back(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    gateway.engine.hold_answers()
    running = gateway.inference.Generate(SAY)
    await gateway.engine.until_running(1)
    published("red", 5)
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)
    gateway.engine.let_answer()
    assert (await running).adapter.number == 1
    await gateway.engine.until_gone(served["red"].engine_name)
    assert 'adapter="red",code="OK",version="1"' not in scraped(gateway.metrics)


def scraped_names() -> set[str]:
    """Every name that Prometheus gets a metric of the gateway under."""
    return {
        sample
        for family in Metrics().registry.collect()
        for sample in (
            (f"{family.name}_total",)
            if family.type == "counter"
            else (f"{family.name}_bucket", f"{family.name}_count", f"{family.name}_sum")
            if family.type == "histogram"
            else (family.name,)
        )
    }


def test_every_query_of_the_dashboard_has_its_metric() -> None:
    board = json.loads((ROOT / "deploy/dashboards/gateway.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(queries) >= 10
    known = scraped_names()
    for query in queries:
        names = set(re.findall(r"manylora_\w+", query))
        assert names, query
        assert names <= known, query
    told_of = (ROOT / "docs/serving-operations.md").read_text()
    assert {name for name in known if not name.endswith(("_count", "_sum"))} <= {
        f"{name}{suffix}"
        for name in re.findall(r"`(manylora_\w+)`", told_of)
        for suffix in ("", "_bucket")
    }


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.wait([asyncio.create_task(asyncio.sleep(0))])


async def health(gateway: RunningGateway) -> int:
    async with grpc.aio.insecure_channel(gateway.front.inference_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest())).status


async def test_no_replica_is_not_ready_and_says_so_until_one_is_back(
    gateway: RunningGateway,
) -> None:
    gateway.replicas.lost = True
    for _ in range(3):
        await gateway.fleet.look()
    assert await health(gateway) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert told(await refused(gateway.inference.Generate(SAY))) == ("UNAVAILABLE", "REPLICA_LOST")
    gateway.replicas.lost = False
    await gateway.fleet.look()
    assert await health(gateway) == health_pb2.HealthCheckResponse.SERVING
    assert (await gateway.inference.Generate(SAY)).text


async def test_an_operator_drains(gateway: RunningGateway) -> None:
    gateway.engine.hold_answers()
    running = gateway.inference.Generate(SAY)
    await gateway.engine.until_running(1)
    brief = admin_pb2.DrainRequest(timeout=duration_pb2.Duration(nanos=1_000_000))
    assert (await gateway.admin.Drain(brief)).requests == 1
    assert await health(gateway) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert told(await refused(gateway.inference.Generate(SAY))) == ("UNAVAILABLE", "DRAINING")
    gateway.engine.let_answer()
    assert (await running).text
    assert (await gateway.admin.Drain(admin_pb2.DrainRequest())).requests == 0


async def test_a_drain_for_less_than_no_time_is_none(gateway: RunningGateway) -> None:
    for seconds, nanos in ((-5, 0), (0, -1)):
        timeout = duration_pb2.Duration(seconds=seconds, nanos=nanos)
        failed = await refused(gateway.admin.Drain(admin_pb2.DrainRequest(timeout=timeout)))
        assert told(failed) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        assert "timeout" in failed.message
    assert await health(gateway) == health_pb2.HealthCheckResponse.SERVING
    assert (await gateway.inference.Generate(SAY)).text


async def test_a_pinned_version_outlives_idleness_and_its_alias(
    gateway: RunningGateway, served: dict[str, Version], registry: Registry, published: Publish
) -> None:
    await gateway.admin.Pin(admin_pb2.PinRequest(adapter="red@1"))
    published("red", 5)
    registry.set_alias("red", "production", 2)
    await gateway.until_serving("red@production", 2)
    for seed, name in enumerate("abcd", start=20):
        published(name, seed)
        await gateway.inference.Generate(pb.GenerateRequest(adapter=f"{name}@1", text="hi"))
    listing = await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest())
    pinned = [entry.adapter.number for entry in listing.replicas[0].adapters if entry.pinned]
    assert pinned == [1]
    assert gateway.engine.loads.count(served["red"].engine_name) == 1
    await gateway.admin.Pin(admin_pb2.PinRequest(adapter="red@1", release=True))
    listing = await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest())
    assert not any(entry.pinned for entry in listing.replicas[0].adapters)


async def pins(gateway: RunningGateway) -> list[set[str]]:
    """The adapters each replica keeps loaded."""
    listing = await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest())
    return [
        {entry.adapter.name for entry in replica.adapters if entry.pinned}
        for replica in listing.replicas
    ]


async def test_a_pinned_version_that_was_withdrawn_can_be_let_go(
    gateway: RunningGateway, registry: Registry
) -> None:
    await gateway.admin.Pin(admin_pb2.PinRequest(adapter="red@1"))
    registry.yank("red@1")
    await gateway.until_failed("red@production")
    await gateway.admin.Pin(admin_pb2.PinRequest(adapter="red@1", release=True))
    assert await pins(gateway) == [set()]
    unloaded = await gateway.admin.Unload(admin_pb2.UnloadRequest(adapter="red@1"))
    assert unloaded.replicas == 1


async def test_a_version_that_cannot_be_pinned_everywhere_is_pinned_nowhere(
    served: dict[str, Version], published: Publish, start: Start
) -> None:
    async with start(replicas=2) as gateway:
        gateway.engines[1].refused.add(published("blue", 5).engine_name)
        await refused(gateway.admin.Pin(admin_pb2.PinRequest(adapter="blue@1")))
        async with asyncio.timeout(60):
            while await pins(gateway) != [set(), set()]:
                pass


async def test_a_new_replica_pins_nothing_that_was_let_go(
    served: dict[str, Version], start: Start
) -> None:
    config = EngineConfig(slots=2, host_adapters=5, turn_s=0)
    async with start(engine=config, aliases=()) as gateway:
        await gateway.fleet.look()
        for name in ("red", "green"):
            await gateway.admin.Pin(admin_pb2.PinRequest(adapter=f"{name}@1"))
        engine = await gateway.replicas.restart(0)
        engine.hold_loads()
        await gateway.fleet.look()
        await engine.until_loads(1)
        await gateway.admin.Pin(admin_pb2.PinRequest(adapter="red@1", release=True))
        engine.let_load()
        async with asyncio.timeout(60):
            while "green" not in (pinned := (await pins(gateway))[0]):
                pass
        assert pinned == {"green"}


async def test_a_new_replica_that_cannot_load_a_pinned_version_tries_again(
    served: dict[str, Version], start: Start
) -> None:
    async with start(aliases=()) as gateway:
        await gateway.fleet.look()
        await gateway.admin.Pin(admin_pb2.PinRequest(adapter="red@1"))
        engine = await gateway.replicas.restart(0)
        engine.refused.add(served["red"].engine_name)
        await gateway.fleet.look()
        await engine.until_loads(1)
        engine.refused.clear()
        async with asyncio.timeout(60):
            while await pins(gateway) != [{"red"}]:
                await gateway.fleet.look()
        await gateway.fleet.look()
        assert len(engine.loads) == 2


async def test_a_new_replica_gets_what_is_served_before_it_is_asked(
    served: dict[str, Version], start: Start
) -> None:
    async with start(replicas=2) as gateway:
        await gateway.fleet.look()
        fresh = await gateway.replicas.restart(1)
        await gateway.fleet.look()
        await fresh.until_loads(2)
        assert set(fresh.loads) == {one.engine_name for one in served.values()}


async def test_a_span_has_the_callers_trace_and_what_is_asked(gateway: RunningGateway) -> None:
    exporter = InMemorySpanExporter()
    tracing.configure(TracingConfig(), "test", SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    reply = await gateway.inference.Generate(SAY, metadata=(("traceparent", parent),))
    (span,) = exporter.get_finished_spans()
    assert span.context is not None
    assert span.context.trace_id == int(parent[3:35], 16)
    assert span.attributes is not None
    assert span.attributes["manylora.version"] == 1
    assert span.attributes["manylora.request_id"] == reply.request_id
    assert gateway.replicas.traceparents[-1].startswith(f"00-{parent[3:35]}")
    nobody = pb.GenerateRequest(adapter="nobody", text="hi")
    await refused(gateway.inference.Generate(nobody, metadata=(("x-request-id", "mine"),)))
    span = exporter.get_finished_spans()[-1]
    assert span.status.description == "ADAPTER_NOT_FOUND"
    assert span.attributes == {"manylora.request_id": "mine"}


@pytest.mark.parametrize("collector", ["gone", "silent"])
def test_spans_nobody_takes_do_not_hold_up_the_end(collector: str) -> None:
    """Four batches of spans; the exporter would try each of them for ten seconds."""
    work = """
import asyncio, sys
from manylora_gateway import tracing
from manylora_gateway.config import TracingConfig

tracing.configure(TracingConfig(endpoint=sys.argv[1]), "test")
for _ in range(2000):
    tracing.begin("span", "").end()
print("ending", flush=True)
asyncio.run(tracing.end())
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        if collector == "gone":
            server.close()
        program = [sys.executable, "-c", work, f"http://{host}:{port}"]
        with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            # From here on: what a program takes to start is another matter.
            assert process.stdout.readline()
            try:
                assert process.wait(timeout=20) == 0
            finally:
                process.kill()


class Collector(TraceServiceServicer):
    """Takes all spans."""

    def Export(  # noqa: N802, the name is gRPC's.
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        return ExportTraceServiceResponse()


def test_an_outage_of_the_collector_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    exporter = SpanExporter(f"http://{host}:{port}")
    span = TracerProvider().get_tracer("test").start_span("span")
    span.end()
    assert isinstance(span, ReadableSpan)

    def outage() -> None:
        caplog.clear()
        for _ in range(3):
            assert exporter.export([span, span]) is SpanExportResult.FAILURE
        # With or without a word about the tries before.
        assert sorted(record.levelname for record in caplog.records) in (
            ["ERROR"],
            ["ERROR", "WARNING"],
        )

    outage()
    collector = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Collector(), collector)
    collector.add_insecure_port(f"{host}:{port}")
    collector.start()
    try:
        while exporter.export([span]) is not SpanExportResult.SUCCESS:
            pass
    finally:
        collector.stop(None).wait()
    assert re.search(r"spans are exported again; ([6-9]|\d\d+) were lost", caplog.text)
    outage()
    exporter.shutdown()


async def test_a_request_is_one_json_line_that_keeps_its_text_to_itself(
    gateway: RunningGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = logging.getLogger("manylora_gateway")
    level = ours.level
    log_to_stderr("json", requests=True)
    try:
        asked = pb.GenerateRequest(adapter="red", text="a secret")
        reply = await gateway.inference.Generate(asked)
        logging.getLogger("opentelemetry.exporter").warning("the collector does not answer")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        logging.getLogger().removeHandler(logging.getLogger().handlers[-1])
        ours.setLevel(level)
        requests_logger.setLevel(logging.NOTSET)
    assert "the collector does not answer" in [line["message"] for line in lines]
    (line,) = [line for line in lines if line["message"] == "request ended"]
    assert line["request_id"] == reply.request_id
    assert (line["adapter"], line["version"], line["code"]) == ("red", 1, "OK")
    assert "secret" not in json.dumps(lines)


async def test_references_keep_their_meaning_without_the_registry_for_a_stated_time(
    served: dict[str, Version],
    start: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    async with start(max_stale_s=3, clock=clock) as gateway:
        moved = gateway.registry_location.rename(gateway.registry_location.with_name("away"))
        await until(lambda: "the registry cannot be read" in caplog.text)
        clock.now = 3
        assert (await gateway.inference.Generate(SAY)).adapter.number == 1
        clock.now = 4
        assert told(await refused(gateway.inference.Generate(SAY))) == (
            "UNAVAILABLE",
            "REGISTRY_UNAVAILABLE",
        )
        moved.rename(gateway.registry_location)
        await until(lambda: gateway.routes.registry_age_s < 3)
        assert (await gateway.inference.Generate(SAY)).adapter.number == 1
