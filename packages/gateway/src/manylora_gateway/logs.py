"""Log lines for people, or one JSON object a line for machines."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, cast

FIELDS = "manylora_fields"
"""Attribute of a record that carries more than its text."""

requests_logger = logging.getLogger("manylora_gateway.requests")
"""One line for each request that ended; off unless asked for."""


class _Elapsed(logging.Formatter):
    """Seconds since the start, then the text."""

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._began = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        fields = cast("Mapping[str, Any]", getattr(record, FIELDS, {}))
        more = "".join(f" {name}={value}" for name, value in fields.items())
        return f"[{time.monotonic() - self._began:7.1f} s] {super().format(record)}{more}"


class _Json(logging.Formatter):
    """Time, level, logger and text, and whatever fields the line has."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)

    converter = time.gmtime


def log_to_stderr(form: Literal["text", "json"], *, requests: bool) -> None:
    """Has log lines written to stderr: the gateway's, and what libraries warn of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Elapsed())
    logging.getLogger().addHandler(handler)
    logging.getLogger("manylora_gateway").setLevel(logging.INFO)
    requests_logger.setLevel(logging.INFO if requests else logging.WARNING)


def log_request(text: str, fields: Mapping[str, object]) -> None:
    """One line for a request that ended; what it asked and what was answered stays out of it."""
    if requests_logger.isEnabledFor(logging.INFO):
        requests_logger.info(text, extra={FIELDS: fields})
