"""The directory of one run: its recipe, what it is and how far it came, metrics and products."""

import json
import os
import platform
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.dataset import TaskData
from manylora_trainer.durable import write_file
from manylora_trainer.environment import describe_environment, git_state
from manylora_trainer.errors import RecipeChangedError, RunDirectoryError, RunExistsError
from manylora_trainer.metrics_file import MetricsFile
from manylora_trainer.recipe import Recipe
from manylora_trainer.recipe_changes import accept_changes
from manylora_trainer.result import RunResult, TaskProgress, TaskResult
from manylora_trainer.run_record import EnvironmentRecord, RunRecord, checked
from manylora_trainer.run_report import write_run_report
from manylora_trainer.saved_runs import read_run
from manylora_trainer.source_files import source_files
from manylora_trainer.targets import linears_of, targets_of, trainable_parameters

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
    def environment(self) -> Path:
        """What it ran on, one entry for each time it was started or resumed."""
        return self.path / "environment.json"

    @property
    def ray(self) -> Path:
        """What Ray keeps of several workers, as long as they train."""
        return self.path / "ray"

    @property
    def curves(self) -> Path:
        """The losses as a picture."""
        return self.path / "plots" / "curves.png"

    @property
    def report(self) -> Path:
        """Everything about the run on one page."""
        return self.path / "report.html"

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None before it was first written.

        Raises:
            RunDirectoryError: it is damaged.
        """
        file = self.path / "run.json"
        if not file.is_file():
            return None
        try:
            return checked(RunRecord, json.loads(file.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(
                f"{file} is damaged ({error}): put it back from a copy, or train into another "
                "--run-dir"
            ) from error

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replaces run.json."""
        write_file(self.path / "run.json", json.dumps(run, indent=2).encode() + b"\n")


def open_run(
    path: Path,
    recipe: Recipe,
    base: BaseModelIdentity,
    *,
    resume: bool,
    allow_changes: Sequence[str] = (),
) -> MetricsFile:
    """Makes a run directory, or takes up the one that is there; no other process has it meanwhile.

    `allow_changes` are dotted paths in which the recipe may differ from the run's. The run is let
    go by closing its metrics.

    Raises:
        RunExistsError: it is not empty and `resume` was not asked for.
        RecipeChangedError: it was started with another recipe or base.
        RunDirectoryError: it holds something else, cannot be written, or another process trains it.
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
    # Killed before it wrote anything, a run leaves the file that it had locked.
    only_locked = entries == {directory.metrics.name} and not directory.metrics.stat().st_size
    if entries and not only_locked and not entries & {"recipe.yaml", ".recipe.yaml.tmp"}:
        raise RunDirectoryError(f"{path} holds no run to resume")
    metrics = MetricsFile(directory.metrics)
    try:
        _take_up(directory, recipe, base, allow_changes)
    except BaseException:
        metrics.close()
        raise
    return metrics


def _take_up(
    directory: RunDirectory, recipe: Recipe, base: BaseModelIdentity, allow_changes: Sequence[str]
) -> None:
    path, run = directory.path, directory.read_run()
    if run is not None and run["base"]["fingerprint"] != base.fingerprint:
        raise RecipeChangedError(f"{path} was started on another base than {recipe.base} is now")
    if run is not None and run["recipe_digest"] != recipe.digest:
        _change_recipe(directory, run, recipe, allow_changes)
    if run is None or run["status"] == "running":
        # Again on a resume, as nothing else would notice that it is damaged before the end.
        _write_recipe(path, recipe)
    if run is None:
        write_file(path / "base.json", json.dumps(asdict(base)).encode())


def _write_recipe(path: Path, recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(path / "recipe.yaml", text.encode())


def _change_recipe(
    directory: RunDirectory, run: dict[str, Any], recipe: Recipe, allowed: Sequence[str]
) -> None:
    """Lets a run go on with a changed recipe, if the changes were stated."""
    path = directory.path
    try:
        before = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise RecipeChangedError(
            f"{path} was started with another recipe, and its recipe.yaml cannot be read: {why}"
        ) from error
    fields = accept_changes(str(path), before, recipe.model_dump(mode="json"), allowed)
    if run["status"] != "running":
        raise RecipeChangedError(
            f"{path} has ended. To train on, start a new run whose lora.init_from is its adapter."
        )
    _write_recipe(path, recipe)
    run["changes"] = [*run.get("changes", []), {"from": run["recipe_digest"], "fields": fields}]
    run["recipe_digest"] = recipe.digest
    run["base"]["path"] = str(recipe.base)
    directory.write_run(run)


def begin_run(
    directory: RunDirectory,
    recipe: Recipe,
    base: BaseModelIdentity,
    data: Mapping[str, TaskData[Any, Any]],
    begun: str,
    threads: int,
    pack_tokens: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes run.json and the held-out rows, or checks them against what is there.

    `begun` is when a new run has begun. `say` is told of files that have changed where the rows
    behind those looked through may be others.

    Raises:
        RecipeChangedError: the rows have changed since the run was started.
    """
    run = directory.read_run()
    if run is not None:
        changed = [
            name
            for name, task in data.items()
            if run["tasks"].get(name, {}).get("data_fingerprint") != task.data_fingerprint
        ]
        if changed:
            raise RecipeChangedError(
                f"{directory.path}: the rows of {', '.join(changed)} have changed since the run "
                "was started; resuming would mix the two"
            )
        for task in recipe.tasks:
            run["tasks"][task.name]["steps"] = data[task.name].steps
            looked_through = data[task.name].rows_read
            before = run["tasks"][task.name].get("files")
            # Mending a row that the run broke off at is a change too, so it is not refused.
            if looked_through == task.split.scan_rows and before != source_files(task.source):
                say(
                    f"{task.name}: its files have changed since the run began. The first "
                    f"{looked_through:,} rows are the same; those behind them train as they are now"
                )
        run["pack_tokens"] = pack_tokens
        _record_start(directory, threads)
        return run
    held_out = directory.path / "held_out"
    held_out.mkdir(exist_ok=True)
    for name, task in data.items():
        write_file(held_out / f"{name}.jsonl", _lines(row.as_json() for row in task.held_out))
    linears = linears_of(base)
    run = {
        "id": uuid.uuid4().hex,
        "status": "running",
        "started_at": begun,
        "recipe_digest": recipe.digest,
        "base": {"path": str(recipe.base), "fingerprint": base.fingerprint},
        "seed": recipe.seed,
        "threads": threads,
        "pack_tokens": pack_tokens,
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
        "tasks": {
            task.name: {
                "steps": data[task.name].steps,
                "rank": task.lora.rank,
                "trainable_parameters": trainable_parameters(
                    targets_of(task, linears), task.lora.rank
                ),
                "rows_read": data[task.name].rows_read,
                "rows_skipped": data[task.name].rows_skipped,
                "train_rows": data[task.name].train_rows,
                "validation_rows": len(data[task.name].validation),
                "held_out_rows": len(data[task.name].held_out),
                "data_fingerprint": data[task.name].data_fingerprint,
                "files": source_files(task.source),
            }
            for task in recipe.tasks
        },
    }
    _record_start(directory, threads)
    directory.write_run(run)
    return run


def update_run(
    directory: RunDirectory, run: dict[str, Any], progress: Mapping[str, TaskProgress]
) -> None:
    """Writes how far the tasks have come."""
    _note_progress(run, progress)
    directory.write_run(run)


def _note_progress(run: dict[str, Any], progress: Mapping[str, TaskProgress]) -> None:
    for name, task in progress.items():
        run["tasks"][name].update(
            metrics=task.metrics,
            size_bytes=task.size_bytes,
            seconds=round(task.seconds, 3),
            tokens=task.tokens,
            examples=task.cursor.examples,
            overlong_dropped=task.cursor.overlong_dropped,
            overlong_truncated=task.cursor.overlong_truncated,
            stopped=task.stopped,
            ended_early=task.ended_early,
        )


def end_run(
    directory: RunDirectory, run: dict[str, Any], progress: Mapping[str, TaskProgress]
) -> None:
    """Writes the run's page and that it has ended."""
    kept = any(task.stopped is None for task in progress.values())
    run["status"] = "finished" if kept else "failed"
    run["ended_at"] = now()
    # The page comes before the word that the run has ended, so that a resume makes up for it.
    _note_progress(run, progress)
    saved = replace(read_run(directory.path), state=run["status"], record=run)
    write_run_report(saved, directory.report)
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
            task.get("ended_early"),
            task["overlong_dropped"],
            task["overlong_truncated"],
            task["rows_skipped"],
        )
        for name, task in run["tasks"].items()
    }
    seconds = sum(task.seconds for task in tasks.values())
    tokens = sum(task.tokens for task in tasks.values())
    return RunResult(directory.path, tasks, seconds, tokens / seconds if seconds else 0.0)


def _record_start(directory: RunDirectory, threads: int) -> None:
    """Adds what the run goes on from here with to environment.json."""
    file = directory.environment
    try:
        starts: list[Any] = []
        if file.is_file():
            starts = checked(EnvironmentRecord, json.loads(file.read_bytes()))["starts"]
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(
            f"{file} is damaged ({error}): put it back from a copy, or remove it to go on without "
            "what the run was started on before"
        ) from error
    starts.append(
        {"at": now(), "git": git_state(Path.cwd()), "environment": describe_environment(threads)}
    )
    write_file(file, json.dumps({"starts": starts}, indent=1).encode() + b"\n")


def now() -> str:
    """This moment as records have it: ISO 8601 to the second, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lines(lines: Iterable[str]) -> bytes:
    # Half a surrogate pair, in a column that no format reads, as JSON escapes it.
    return "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
