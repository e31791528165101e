"""Checkpoints: all that is needed to go on as if nothing had happened.

A checkpoint is a directory that appears by a rename, so it is whole or absent; its state names
the hash of its tensors and of itself, so damage is seen. Safetensors only, no pickle.
"""

# safetensors' torch half is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from manylora_trainer.durable import sync_directory, write_directory, write_tensors
from manylora_trainer.errors import CheckpointError
from manylora_trainer.result import TaskProgress
from manylora_trainer.sampling import Cursor

STATE_FILE = "state.json"
TENSORS_FILE = "tensors.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    step: int
    metrics_bytes: int
    """Length of metrics.jsonl at that moment."""
    tasks: Mapping[str, TaskProgress]
    tensors: Mapping[str, Tensor]
    """`TASK/weights`, `TASK/sound` (those before the last step), the optimiser's `TASK/mean` and so
    on, and `TASK/best` where it is kept."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Writes `directory/step-N`, then removes all but the newest `keep`."""

    def fill(temporary: Path) -> None:
        write_tensors(temporary / TENSORS_FILE, checkpoint.tensors)
        state = {
            "step": checkpoint.step,
            "metrics_bytes": checkpoint.metrics_bytes,
            "tasks": {name: asdict(task) for name, task in checkpoint.tasks.items()},
            "tensors": _digest(temporary / TENSORS_FILE),
        }
        state["digest"] = _digest_of(state)
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))

    directory.mkdir(exist_ok=True)
    write_directory(directory / f"step-{checkpoint.step:08d}", fill)
    for old in _newest_first(directory)[keep:]:
        shutil.rmtree(old)
    sync_directory(directory)


def load_checkpoint(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; None when none was ever written.

    A damaged one is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    found = _newest_first(directory) if directory.is_dir() else []
    problems: list[str] = []
    for path in found:
        try:
            checkpoint = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            problems.append(f"{path.name}: {error}")
        else:
            for problem in problems:
                warn(f"passed over a damaged checkpoint, {problem}; going on from {path.name}")
            return checkpoint
    if problems:
        raise CheckpointError(f"{directory}: no checkpoint is whole ({'; '.join(problems)})")
    return None


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / STATE_FILE).read_bytes())
    if state.pop("digest", None) != _digest_of(state):
        raise ValueError("its state does not match its hash")
    if _digest(path / TENSORS_FILE) != state["tensors"]:
        raise ValueError("its tensors do not match their hash")
    return Checkpoint(
        state["step"],
        state["metrics_bytes"],
        {name: _progress(task) for name, task in state["tasks"].items()},
        load_file(path / TENSORS_FILE),
    )


def _progress(state: dict[str, Any]) -> TaskProgress:
    others = {key: value for key, value in state.items() if key != "cursor"}
    return TaskProgress(Cursor(**state["cursor"]), **others)


def _newest_first(directory: Path) -> list[Path]:
    return sorted((path for path in directory.glob("step-*") if path.is_dir()), reverse=True)


def _digest_of(state: dict[str, Any]) -> str:
    canonical = json.dumps(state, sort_keys=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
