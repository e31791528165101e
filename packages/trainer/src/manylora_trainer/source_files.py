"""The files that a task's rows are read from, as they were when the run began."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from manylora_trainer.errors import SourceError
from manylora_trainer.files import find_files

MOST_FILES = 1000
"""More are counted, not listed."""


def source_files(settings: BaseModel) -> dict[str, Any]:
    """Size and time of change of every local file that a source's settings name.

    For a person who asks why two runs differ; whether the rows are the same is told by the data
    fingerprint, not by this. Patterns such as `rows/*.jsonl` are followed.
    """
    files = [path for named in _paths(settings) for path in _existing(named)]
    return {
        "count": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "listed": [
            {
                "path": str(path),
                "bytes": path.stat().st_size,
                "changed_at": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(),
            }
            for path in files[:MOST_FILES]
        ],
    }


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, tuple | list):
        for entry in cast("tuple[Any, ...]", value):
            yield from _paths(entry)
    elif isinstance(value, Path):
        yield value
    elif isinstance(value, str) and value.startswith("/"):
        # Where a place may also be a URI it is text, and absolute since the recipe was read.
        yield Path(value)


def _existing(named: Path) -> list[Path]:
    if named.is_file():
        return [named]
    if "*" not in str(named):
        return []
    try:
        return [path for name in find_files([str(named)]) if (path := Path(name)).is_file()]
    except SourceError:
        return []
