"""Nested settings as flat ones: `tasks.0.lora.rank`, as `--set` writes them."""

import json
from collections.abc import Iterator
from typing import Any, cast


def dotted(value: Any) -> dict[str, Any]:
    """Every leaf of nested mappings and lists by its dotted path; empty ones are leaves too."""
    return dict(_leaves(value, ""))


def differing(*settings: Any) -> list[str]:
    """The dotted paths at which these nested settings are not all equal."""
    flat = [dotted(entry) for entry in settings]
    paths = dict.fromkeys(path for entry in flat for path in entry)
    absent = object()
    return [
        path
        for path in paths
        if any(entry.get(path, absent) != flat[0].get(path, absent) for entry in flat)
    ]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items: dict[Any, Any] = {}
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
    elif isinstance(value, list | tuple):
        items = dict(enumerate(cast("list[Any]", value)))
    if not items:
        yield path, value
    for key, inner in items.items():
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def written(value: Any) -> str:
    """A setting's value as a recipe would say it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def rounded(value: Any) -> str:
    """The same with four digits of a number that has more."""
    return f"{value:.4g}" if isinstance(value, float) else written(value)
