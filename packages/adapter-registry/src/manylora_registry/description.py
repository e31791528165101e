"""What publishers may say about a version: short keys, finite numbers, lines of text."""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from manylora_registry.errors import Problem

KEYS = 256
VALUE_LENGTH = 1024
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


def check_description(
    metrics: Mapping[str, Any], tags: Mapping[str, Any], lineage: Mapping[str, Any]
) -> Iterator[Problem]:
    """Everything wrong with the metrics, tags and lineage of a version."""
    for kind, pairs in (("metrics", metrics), ("tags", tags), ("lineage", lineage)):
        if len(pairs) > KEYS:
            yield Problem(kind, f"has {len(pairs)} keys; {KEYS} are the limit")
        for key, value in pairs.items():
            where = f"{kind}.{key[:80]}"
            if not _KEY.fullmatch(key):
                yield Problem(
                    where, "is no key: use up to 64 of letters, digits, '.', '_', '-', '/'"
                )
            if kind == "metrics":
                if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                    yield Problem(where, "must be a finite number")
            elif not _is_text(value):
                yield Problem(where, f"must be one line of at most {VALUE_LENGTH} characters")


def one_line(text: str) -> str:
    """`text` as it may stand in a table: stripped, and what cannot be printed becomes a space."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown.strip()[:VALUE_LENGTH]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= VALUE_LENGTH
