"""A sweep: trials packed into runs of many adapters, one run after the other."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from manylora_registry.errors import ConfigError
from manylora_trainer.durable import write_file
from manylora_trainer.errors import RunInterruptedError, SweepError, UnfitTaskError
from manylora_trainer.halving import Rungs
from manylora_trainer.recipe import Recipe
from manylora_trainer.run_directory import RunDirectory
from manylora_trainer.saved_runs import SavedRun, read_run
from manylora_trainer.search import Outcome, Search, make_search
from manylora_trainer.sweep_settings import Settings, Sweep
from manylora_trainer.trials import SweepResult, Trial, run_directory

STATE_FILE = "sweep.json"


def run_sweep(
    sweep: Sweep,
    *,
    resume: bool = False,
    how_to_resume: str = "resume=True",
    say: Callable[[str], None] = lambda _: None,
) -> SweepResult:
    """Runs a sweep to its end, or takes one up where it was stopped.

    Finished runs are kept, the one under way goes on from its checkpoint, and the search hears
    the same results in the same order again, so an interrupted sweep tries what an uninterrupted
    one would.

    Raises:
        SweepError: the directory cannot be used as asked, or no trial came to its end.
        TrainerError: a run failed; see `manylora_trainer.train`.
        RunInterruptedError: SIGINT, SIGTERM or SIGHUP came; a checkpoint was written first.
    """
    try:
        return _run(sweep, resume, how_to_resume, say)
    except KeyboardInterrupt as error:
        # Between two runs nobody notes signals; a run under way has its own way to end.
        raise RunInterruptedError(f"stopped by SIGINT; go on with: {how_to_resume}") from error


def _run(sweep: Sweep, resume: bool, how_to_resume: str, say: Callable[[str], None]) -> SweepResult:
    from manylora_trainer import train
    from manylora_trainer.sweep_report import write_sweep_report

    recipe = sweep.recipe_with({})
    done = _open(sweep, recipe, resume=resume)
    rungs = Rungs(sweep.halving)
    trials: list[Trial] = []
    search = make_search(sweep)
    for number, asked in enumerate(_runs(sweep, search)):
        known = [trial for trial in done if trial.run == number]
        _require_replayed(sweep, asked, known)
        pack = known or [_checked(sweep, Trial(n, number, settings)) for n, settings in asked]
        directory = run_directory(sweep.sweep_directory, number)
        while any(trial.state == "running" for trial in pack):
            _save(sweep, recipe, [*trials, *pack])
            say(f"trials {pack[0].number} to {pack[-1].number} of {sweep.count}, in one run")
            try:
                train(
                    _packed(sweep, recipe, pack),
                    directory,
                    resume=directory.exists(),
                    how_to_resume=how_to_resume,
                    judge=rungs.losers,
                    date=_date(sweep.sweep_directory),
                )
            except UnfitTaskError as error:
                if RunDirectory(directory).read_run() is not None:
                    raise
                # No run has begun there: it becomes that of the others.
                say(f"{error}; the others go on")
                pack = [
                    replace(trial, state="invalid", why=error.problem)
                    if trial.name == error.task
                    else trial
                    for trial in pack
                ]
                continue
            run = read_run(directory)
            pack = [_judged(trial, run, rungs) for trial in pack]
            _require_same_rows(directory, [*trials, *pack])
        for trial in pack:
            rungs.add(trial.name, trial.rungs)
            finished = trial.loss if trial.state == "finished" else None
            search.tell(trial.number, Outcome(finished, trial.rungs))
        trials += pack
        _save(sweep, recipe, [*trials, *(trial for trial in done if trial.run > number)])
        write_sweep_report(read_sweep(sweep.sweep_directory), sweep)
    result = read_sweep(sweep.sweep_directory)
    if result.best is None:
        raise SweepError(
            f"{sweep.sweep_directory}: no trial came to its end: "
            + "; ".join(f"{trial.name}: {trial.why}" for trial in trials[:3])
        )
    return result


def read_sweep(directory: Path) -> SweepResult:
    """What a sweep has found so far.

    Raises:
        SweepError: the directory holds no sweep, or a damaged one.
    """
    state = _read_state(directory)
    try:
        trials = TypeAdapter(tuple[Trial, ...]).validate_python(state["trials"])
        return SweepResult(directory, str(state["task"]), trials)
    except (KeyError, ValidationError) as error:
        raise SweepError(f"{directory}: {STATE_FILE} is not what a sweep writes") from error


def _runs(sweep: Sweep, search: Search) -> Iterator[list[tuple[int, Settings]]]:
    """The trials of one run after the other; each is asked for when the last was told."""
    for first in range(0, sweep.count, sweep.trials_per_run):
        yield [search.ask() for _ in range(min(sweep.trials_per_run, sweep.count - first))]


def _checked(sweep: Sweep, trial: Trial) -> Trial:
    """The trial, marked where its settings only together make no valid recipe."""
    try:
        sweep.recipe_with(trial.settings)
    except ConfigError as error:
        why = "; ".join(str(problem) for problem in error.problems)
        return Trial(trial.number, trial.run, trial.settings, "invalid", why=why)
    return trial


def _packed(sweep: Sweep, recipe: Recipe, pack: list[Trial]) -> Recipe:
    """A recipe with one task for each trial."""
    tasks = [
        sweep.recipe_with(trial.settings)
        .tasks[sweep.task]
        .model_copy(update={"name": trial.name, "seed_as": _seed_name(sweep, recipe)})
        for trial in pack
        if trial.state == "running"
    ]
    return recipe.model_copy(update={"tasks": tuple(tasks)})


def _judged(trial: Trial, run: SavedRun, rungs: Rungs) -> Trial:
    """The trial with what its run says came of it."""
    if trial.state != "running":
        return trial
    saved = run.tasks[trial.name]
    losses = {int(step): loss for step, loss in run.curve(trial.name, "validation_loss")}
    last = losses[max(losses)] if losses else None
    return Trial(
        trial.number,
        trial.run,
        trial.settings,
        "finished" if saved.stopped is None else "stopped",
        saved.metrics.get("validation_loss", last) if saved.stopped is None else last,
        saved.step,
        rungs.at(losses, saved.steps),
        saved.stopped,
        saved.data_fingerprint,
    )


def _require_same_rows(run: Path, trials: list[Trial]) -> None:
    if len({trial.data for trial in trials if trial.data is not None}) > 1:
        raise SweepError(
            f"{run}: the rows have changed since the runs before it, so losses would not compare. "
            "Put them back, remove this run and go on by --resume, or give another --sweep-dir."
        )


def _open(sweep: Sweep, recipe: Recipe, *, resume: bool) -> list[Trial]:
    """Makes the directory, or gives the trials of the sweep that is there."""
    directory = sweep.sweep_directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in directory.iterdir()}
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise SweepError(f"{directory} cannot be used: {error.strerror}") from error
    if not entries - {f".{STATE_FILE}.tmp"}:
        _save(sweep, recipe, [])
        text = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_file(directory / "sweep.yaml", text.encode())
        return []
    if not resume:
        raise SweepError(
            f"{directory} is not empty. Go on with its sweep by --resume, or give another "
            "--sweep-dir."
        )
    if _read_state(directory).get("digest") != _digest(sweep, recipe):
        raise SweepError(
            f"{directory} was begun with another sweep or recipe; going on would mix the two. "
            "Undo the change, or give another --sweep-dir."
        )
    trials = read_sweep(directory).trials
    for trial in trials:
        run = run_directory(directory, trial.run)
        if trial.state in ("finished", "stopped") and not run.exists():
            raise SweepError(
                f"{run} is gone, and with it what {trial.name} came to. Put it back, or give "
                "another --sweep-dir."
            )
    return list(trials)


def _date(sweep_directory: Path) -> datetime | None:
    """What a chat template that writes the date writes in all runs: when the first one began."""
    for directory in sorted((sweep_directory / "runs").glob("*")):
        if (run := RunDirectory(directory).read_run()) is not None:
            return datetime.fromisoformat(run["started_at"])
    return None


def _require_replayed(sweep: Sweep, asked: list[tuple[int, Settings]], known: list[Trial]) -> None:
    if known and [(trial.number, dict(trial.settings)) for trial in known] != [
        (number, dict(settings)) for number, settings in asked
    ]:
        raise SweepError(
            f"{sweep.sweep_directory}: the search no longer proposes what it did; it was begun "
            "with another version of Optuna. Go on with that one, or begin anew."
        )


def _save(sweep: Sweep, recipe: Recipe, trials: list[Trial]) -> None:
    state = {
        "digest": _digest(sweep, recipe),
        "task": _task_name(sweep, recipe),
        "trials": [asdict(trial) for trial in trials],
    }
    write_file(sweep.sweep_directory / STATE_FILE, json.dumps(state, indent=1).encode() + b"\n")


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / STATE_FILE).read_bytes())
        if not isinstance(state, dict):
            raise ValueError("it is not an object")
    except FileNotFoundError as error:
        raise SweepError(f"{directory} is not a sweep: it has no {STATE_FILE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SweepError(f"{directory}: {STATE_FILE} cannot be read: {error}") from error
    return state  # pyright: ignore[reportUnknownVariableType]


def _digest(sweep: Sweep, recipe: Recipe) -> str:
    """Of everything that decides what is tried; not of where the sweep goes."""
    data = sweep.model_dump(mode="json", exclude={"sweep_directory", "recipe", "overrides"})
    canonical = json.dumps([data, recipe.digest], sort_keys=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _task_name(sweep: Sweep, recipe: Recipe) -> str:
    return recipe.tasks[sweep.task].name


def _seed_name(sweep: Sweep, recipe: Recipe) -> str:
    return recipe.tasks[sweep.task].seed_name
