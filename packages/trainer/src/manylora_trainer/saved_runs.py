"""Runs as they lie on disk, whole, under way, broken off or damaged. Needs no torch."""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from manylora_trainer.errors import UnreadableRunError
from manylora_trainer.result import RECENT_STEPS
from manylora_trainer.run_record import EnvironmentRecord, RunRecord, checked

State = Literal["finished", "failed", "running", "interrupted", "incomplete"]
"""`failed`: every adapter stopped; `interrupted`: can be resumed; `incomplete`: never began."""
MARKS = ("run.json", "recipe.yaml")
"""A directory with one of these was meant to be a run."""

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where PyYAML was built with it: reads a recipe in a tenth of the time."""


@dataclass(frozen=True)
class SavedTask:
    """One adapter of a run, as far as it came."""

    name: str
    step: int
    """Steps behind it."""
    steps: int | None
    """Steps it was to take."""
    metrics: Mapping[str, float]
    tokens: int
    """Of the examples trained on."""
    stopped: str | None
    """Why it failed before its last step."""
    ended_early: str | None
    """Why it ended well before its last step."""
    data_fingerprint: str | None


@dataclass(frozen=True)
class SavedRun:
    """One run directory."""

    path: Path
    state: State
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    """run.json; empty before the first step."""
    starts: list[dict[str, Any]]
    """environment.json: what it ran on, from each start."""

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut off by a crash is left out.

        Raises:
            UnreadableRunError: another line is no JSON object of a task.
        """
        return _read_metrics(self.path / "metrics.jsonl")

    @cached_property
    def tasks(self) -> dict[str, SavedTask]:
        """Its adapters by name."""
        names: list[str] = [task["name"] for task in self.recipe["tasks"]]
        return {name: self._task(name) for name in names}

    @property
    def seconds(self) -> float:
        """Wall time of its training steps."""
        return sum(float(task.get("seconds", 0.0)) for task in self._recorded.values())

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the examples in a second; None before it was first recorded."""
        tokens = sum(int(task.get("tokens", 0)) for task in self._recorded.values())
        return tokens / self.seconds if self.seconds else None

    @property
    def _recorded(self) -> Mapping[str, Mapping[str, Any]]:
        return self.record.get("tasks", {})

    def curve(self, task: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of what metrics.jsonl tells about a task under `key`, where finite."""
        return [
            (entry["step"], entry[key])
            for entry in self.entries
            if entry["task"] == task and _is_finite(entry.get(key))
        ]

    def _task(self, name: str) -> SavedTask:
        recorded = self._recorded.get(name, {})
        losses = self.curve(name, "loss")
        metrics: dict[str, float] = {}
        if self.state in ("finished", "failed"):
            metrics = {k: v for k, v in recorded.get("metrics", {}).items() if _is_finite(v)}
        else:
            # run.json tells of the last checkpoint; the metrics go on from there.
            if recent := [loss for _, loss in losses[-RECENT_STEPS:]]:
                metrics["train_loss"] = sum(recent) / len(recent)
            if measured := self.curve(name, "validation_loss"):
                metrics["validation_loss"] = measured[-1][1]
        return SavedTask(
            name,
            int(losses[-1][0]) if losses else 0,
            recorded.get("steps"),
            metrics,
            max(
                int(recorded.get("tokens", 0)),
                sum(int(tokens) for _, tokens in self.curve(name, "tokens")),
            ),
            recorded.get("stopped"),
            recorded.get("ended_early"),
            recorded.get("data_fingerprint"),
        )

    def as_json(self) -> dict[str, Any]:
        """What there is to say about it, for machines."""
        return {
            "run": str(self.path),
            "state": self.state,
            "id": self.record.get("id"),
            "started_at": self.record.get("started_at"),
            "ended_at": self.record.get("ended_at"),
            "seconds": round(self.seconds, 3),
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 1),
            "recipe_digest": self.record.get("recipe_digest"),
            "base": self.record.get("base"),
            "tasks": {
                task.name: {
                    "step": task.step,
                    "steps": task.steps,
                    "metrics": dict(task.metrics),
                    "tokens": task.tokens,
                    "stopped": task.stopped,
                    "ended_early": task.ended_early,
                    "data_fingerprint": task.data_fingerprint,
                }
                for task in self.tasks.values()
            },
        }


@dataclass(frozen=True)
class BrokenRun:
    """A directory that was meant to be a run and cannot be read as one."""

    path: Path
    problem: str

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {"run": str(self.path), "state": "broken", "problem": self.problem}


def read_run(path: Path) -> SavedRun:
    """Reads the run in a directory, however far it came.

    Raises:
        UnreadableRunError: there is none, or its files are damaged.
    """
    if not any((path / mark).is_file() for mark in MARKS):
        raise UnreadableRunError(f"{path} is not a run: it has neither {' nor '.join(MARKS)}")
    recipe = _read_recipe(path / "recipe.yaml")
    record = _read_json(path / "run.json", RunRecord)
    starts = _read_json(path / "environment.json", EnvironmentRecord).get("starts", [])
    run = SavedRun(path, _state(path, record), recipe, record, starts)
    # Damaged metrics are told of here too.
    _ = run.tasks
    return run


def find_runs(directory: Path) -> list[SavedRun | BrokenRun]:
    """Every run at and below a directory, by path.

    Raises:
        UnreadableRunError: the directory is not there.
    """
    if not directory.is_dir():
        raise UnreadableRunError(f"{directory} is not a directory")
    found: list[SavedRun | BrokenRun] = []
    for root, below, files in os.walk(directory):
        below.sort()
        if not set(MARKS) & set(files):
            continue
        below.clear()
        try:
            found.append(read_run(Path(root)))
        except UnreadableRunError as error:
            found.append(BrokenRun(Path(root), str(error).removeprefix(f"{root}: ")))
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _state(path: Path, record: Mapping[str, Any]) -> State:
    status = record.get("status")
    if status in ("finished", "failed"):
        return status
    if is_locked(path / "metrics.jsonl"):
        return "running"
    return "interrupted" if record else "incomplete"


def is_locked(metrics: Path) -> bool:
    """Whether a process trains into the run: it holds a lock on its metrics."""
    try:
        with metrics.open("rb") as file:
            # Shared and for this moment only: the trainer tries more than once.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _read_recipe(path: Path) -> Mapping[str, Any]:
    try:
        recipe = yaml.load(path.read_bytes(), Loader=LOADER)  # noqa: S506 (a SafeLoader)
        if not isinstance(recipe, dict) or not isinstance(recipe["tasks"], list):  # pyright: ignore[reportUnknownVariableType]
            raise ValueError("it has no list of tasks")
        if not all(isinstance(task["name"], str) for task in recipe["tasks"]):  # pyright: ignore[reportUnknownVariableType]
            raise ValueError("the name of a task is no text")
        # A run writes what JSON can hold; YAML can name dates, and lists that hold themselves.
        _ = json.dumps(recipe, allow_nan=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UnreadableRunError(f"{path.parent}: recipe.yaml cannot be read: {why}") from error
    return recipe  # pyright: ignore[reportUnknownVariableType]


def _read_json(path: Path, kind: type[RunRecord | EnvironmentRecord]) -> dict[str, Any]:
    """The record in a file; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        # NaN and infinity, which Python writes and JSON has no form for, are nothing to tell.
        value = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableRunError(f"{path.parent}: {path.name} cannot be read: {error}") from error
    try:
        return checked(kind, value)
    except ValueError as error:
        raise UnreadableRunError(
            f"{path.parent}: {path.name} is not what a run writes ({error})"
        ) from error


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_bytes().split(b"\n")
        entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        _ = [(int(entry["step"] + 0), entry["task"]) for entry in entries]
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError) as error:
        raise UnreadableRunError(f"{path.parent}: {path.name} cannot be read: {error}") from error
    return entries
