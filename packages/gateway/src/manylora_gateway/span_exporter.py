"""Exports spans by OTLP, and says once of an outage of the collector that it is one."""

import logging
from collections.abc import Sequence

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

logger = logging.getLogger(__name__)
otlp_logger = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")


class SpanExporter(OTLPSpanExporter):
    """Tells each thing that goes wrong once until the collector takes spans again.

    The exporter itself tells it with every batch, every five seconds.
    """

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(endpoint=endpoint)
        self._lost = 0
        self._told = set[tuple[object, ...]]()
        otlp_logger.addFilter(self._is_new)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hands spans to the collector; those it does not take are lost."""
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._lost:
                logger.warning("spans are exported again; %d were lost", self._lost)
            self._lost = 0
            self._told.clear()
        else:
            self._lost += len(spans)
        return result

    def _is_new(self, record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        # Details name ports and waits, which differ each time.
        codes = [each for each in arguments if isinstance(each, grpc.StatusCode)]
        what = (record.msg, *codes)
        new = what not in self._told
        self._told.add(what)
        return new
