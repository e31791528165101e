"""Writes the files of a stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_stage(
    directory: Path,
    *,
    base: Path,
    registry: Path,
    gates: Mapping[str, Any] | None = None,
    gateway: Mapping[str, Any] | None = None,
    **stage: Any,
) -> Path:
    """A stage in `directory` that serves the alias of its name; `stage` is more of stage.yaml."""
    directory.mkdir(parents=True)
    name = directory.name
    files: dict[str, Mapping[str, Any]] = {
        "stage.yaml": {"alias": name, "state": "state", **stage},
        "gateway.yaml": {
            "base": str(base),
            "registry": str(registry),
            "state": "state/rollouts",
            "follow": {"aliases": [name], "poll_s": 0.1},
            "listen": {"inference": "127.0.0.1:0", "admin": "127.0.0.1:0"},
            **(gateway or {}),
        },
        "gates.yaml": gates or {},
    }
    for file, content in files.items():
        (directory / file).write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    return directory
