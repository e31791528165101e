"""The directory of one run: its recipe, what it is and how far it came, metrics and products."""

import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import yaml

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.dataset import TaskData
from manylora_trainer.durable import write_file
from manylora_trainer.errors import RecipeChangedError, RunDirectoryError, RunExistsError
from manylora_trainer.recipe import Recipe
from manylora_trainer.result import RunResult, TaskProgress, TaskResult

LIBRARIES = ("manylora-trainer", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def adapters(self) -> Path:
        """One directory in it for each finished task."""
        return self.path / "adapters"

    @property
    def checkpoints(self) -> Path:
        """One directory in it for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Losses of every step as JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The losses as a picture."""
        return self.path / "plots" / "curves.png"

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None before it was first written."""
        file = self.path / "run.json"
        return json.loads(file.read_bytes()) if file.is_file() else None

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replaces run.json."""
        write_file(self.path / "run.json", json.dumps(run, indent=2).encode() + b"\n")


def open_run(path: Path, recipe: Recipe, base: BaseModelIdentity, *, resume: bool) -> RunDirectory:
    """Makes a run directory, or takes up the one that is there.

    Raises:
        RunExistsError: it is not empty and `resume` was not asked for.
        RecipeChangedError: it was started with another recipe or base.
        RunDirectoryError: it holds something else, or cannot be written.
    """
    directory = RunDirectory(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in path.iterdir()}
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be used: {error.strerror}") from error
    if entries and not resume:
        raise RunExistsError(
            f"{path} is not empty. Go on with its run by --resume, or give another --run-dir."
        )
    if entries and not entries & {"recipe.yaml", ".recipe.yaml.tmp"}:
        raise RunDirectoryError(f"{path} holds no run to resume")
    run = directory.read_run()
    if run is not None and run["recipe_digest"] != recipe.digest:
        raise RecipeChangedError(
            f"{path} was started with another recipe ({_changes(directory, recipe)}); resuming "
            "would mix the two. Undo the change, or train into a new --run-dir."
        )
    if run is not None and run["base"]["fingerprint"] != base.fingerprint:
        raise RecipeChangedError(f"{path} was started on another base than {recipe.base} is now")
    if run is None:
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_file(path / "recipe.yaml", text.encode())
        write_file(path / "base.json", json.dumps(asdict(base)).encode())
    return directory


def begin_run(
    directory: RunDirectory,
    recipe: Recipe,
    base: BaseModelIdentity,
    data: Mapping[str, TaskData],
    threads: int,
) -> dict[str, Any]:
    """Writes run.json and the held-out rows, or checks them against what is there.

    Raises:
        RecipeChangedError: the rows have changed since the run was started.
    """
    run = directory.read_run()
    if run is not None:
        changed = [
            name
            for name, task in data.items()
            if run["tasks"][name]["data_fingerprint"] != task.data_fingerprint
        ]
        if changed:
            raise RecipeChangedError(
                f"{directory.path}: the rows of {', '.join(changed)} have changed since the run "
                "was started; resuming would mix the two"
            )
        return run
    held_out = directory.path / "held_out"
    held_out.mkdir(exist_ok=True)
    for name, task in data.items():
        write_file(held_out / f"{name}.jsonl", _lines(row.as_json() for row in task.held_out))
    run = {
        "id": uuid.uuid4().hex,
        "status": "running",
        "recipe_digest": recipe.digest,
        "base": {"path": str(recipe.base), "fingerprint": base.fingerprint},
        "seed": recipe.seed,
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
        "tasks": {
            task.name: {
                "steps": task.steps,
                "rank": task.lora.rank,
                "rows_read": data[task.name].rows_read,
                "train_rows": len(data[task.name].train),
                "validation_rows": len(data[task.name].validation),
                "held_out_rows": len(data[task.name].held_out),
                "overlong_dropped": data[task.name].overlong_dropped,
                "overlong_truncated": data[task.name].overlong_truncated,
                "data_fingerprint": data[task.name].data_fingerprint,
            }
            for task in recipe.tasks
        },
    }
    directory.write_run(run)
    return run


def update_run(
    directory: RunDirectory, run: dict[str, Any], progress: Mapping[str, TaskProgress]
) -> None:
    """Writes how far the tasks have come."""
    for name, task in progress.items():
        run["tasks"][name].update(
            metrics=task.metrics,
            size_bytes=task.size_bytes,
            seconds=round(task.seconds, 3),
            tokens=task.tokens,
            stopped=task.stopped,
        )
    directory.write_run(run)


def end_run(
    directory: RunDirectory, run: dict[str, Any], progress: Mapping[str, TaskProgress]
) -> None:
    """Writes that the run has ended."""
    kept = any(task.stopped is None for task in progress.values())
    run["status"] = "finished" if kept else "failed"
    update_run(directory, run, progress)


def has_ended(directory: RunDirectory) -> bool:
    """Whether the run has nothing left to do."""
    run = directory.read_run()
    return run is not None and run["status"] != "running"


def run_result(directory: RunDirectory) -> RunResult:
    """What a run that has begun made so far."""
    run = directory.read_run()
    assert run is not None
    tasks = {
        name: TaskResult(
            None if task["stopped"] else directory.adapters / name,
            task["metrics"],
            task["tokens"],
            task["seconds"],
            task["stopped"],
        )
        for name, task in run["tasks"].items()
    }
    seconds = sum(task.seconds for task in tasks.values())
    tokens = sum(task.tokens for task in tasks.values())
    return RunResult(directory.path, tasks, seconds, tokens / seconds if seconds else 0.0)


class MetricsFile:
    """metrics.jsonl: one object a line, cut back to the checkpoint when a run is resumed."""

    def __init__(self, path: Path, length: int) -> None:
        """Opens the file and keeps its first `length` bytes.

        Raises:
            RunDirectoryError: another process is training into the same run.
        """
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RunDirectoryError(f"{path.parent} is being trained by another process") from error
        self._file.truncate(length)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Adds one line, readable at once by who follows the file."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Puts all lines on disk; returns the length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoMetrics:
    """Metrics of a worker whose neighbour writes them."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def sync(self) -> int:
        """Puts nothing on disk."""
        return 0

    def close(self) -> None:
        """Closes nothing."""


def _changes(directory: RunDirectory, recipe: Recipe) -> str:
    """The dotted paths in which a recipe differs from the run's."""
    before: Any = yaml.safe_load((directory.path / "recipe.yaml").read_text(encoding="utf-8"))
    after: Any = recipe.model_dump(mode="json")
    paths = [
        path
        for path in _differing(before, after, "")
        if not path.startswith(("run_directory", "workers"))
    ]
    return ", ".join(paths[:5]) + (" and more" if len(paths) > 5 else "")


def _differing(before: Any, after: Any, path: str) -> Iterable[str]:
    if isinstance(before, list) and isinstance(after, list):
        before = dict(enumerate(cast("list[Any]", before)))
        after = dict(enumerate(cast("list[Any]", after)))
    if isinstance(before, dict) and isinstance(after, dict):
        left, right = cast("dict[Any, Any]", before), cast("dict[Any, Any]", after)
        for key in dict.fromkeys([*left, *right]):
            below = f"{path}.{key}" if path else str(key)
            yield from _differing(left.get(key), right.get(key), below)
    elif before != after:
        yield path


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
