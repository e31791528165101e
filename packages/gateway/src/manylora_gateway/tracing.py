"""OpenTelemetry spans from the front to the engine; without an endpoint they cost next to nothing.

A caller's `traceparent` is the parent of the request's span, which is the parent of the span in
the replica. Both say which version answered.
"""

import asyncio
import threading

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from manylora_gateway.config import TracingConfig
from manylora_registry import Version

SCOPE = "manylora_gateway"
PROPAGATOR = TraceContextTextMapPropagator()
END_S = 3.0
"""The last spans get this long; the exporter itself would try a collector that is gone for 30 s."""


def configure(config: TracingConfig, service: str, processor: SpanProcessor | None = None) -> None:
    """Has this process export its spans, if there is somewhere to export them to."""
    if config.endpoint is None and processor is None:
        return
    if processor is None:
        # Only who exports pays for the exporter's imports.
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from manylora_gateway.span_exporter import SpanExporter

        processor = BatchSpanProcessor(SpanExporter(config.endpoint))
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}),
        sampler=ParentBased(TraceIdRatioBased(config.sample)),
        # It would wait for the collector without a bound of ours; see `end`.
        shutdown_on_exit=False,
    )
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)


async def end() -> None:
    """Exports what is left, if the collector takes it soon; what it does not is lost."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        exporting = threading.Thread(target=provider.shutdown, daemon=True)
        exporting.start()
        await asyncio.to_thread(exporting.join, END_S)


def begin(name: str, traceparent: str, kind: SpanKind = SpanKind.SERVER) -> Span:
    """A span below `traceparent`, or a new trace if that is empty; its holder ends it."""
    parent = PROPAGATOR.extract({"traceparent": traceparent}) if traceparent else None
    return trace.get_tracer(SCOPE).start_span(name, parent, kind)


def traceparent_of(span: Span) -> str:
    """What makes a span the parent of another process's; empty where nothing is recorded."""
    carrier: dict[str, str] = {}
    PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def describe(span: Span, request_id: str, version: Version | None) -> None:
    """Says whose request it is and which version answers it."""
    span.set_attribute("manylora.request_id", request_id)
    if version is not None:
        span.set_attribute("manylora.adapter", version.name)
        span.set_attribute("manylora.version", version.number)
        span.set_attribute("manylora.digest", version.digest)


def failed(span: Span, reason: str) -> None:
    """The request failed."""
    span.set_status(Status(StatusCode.ERROR, reason))
