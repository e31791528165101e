"""From a finished run to versions in the registry. Needs neither torch nor the base."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manylora_registry import BaseModelIdentity, Registry, Version
from manylora_registry.errors import AdapterNotFoundError, RegistryError
from manylora_registry.reference import check_alias_name
from manylora_trainer.errors import NotPublishableError
from manylora_trainer.run_record import BaseRecord, EnvironmentRecord, RunRecord, checked
from manylora_trainer.saved_runs import is_locked
from manylora_trainer.sweep import STATE_FILE, read_sweep


def publish_run(
    run_dir: Path,
    registry: Registry,
    tasks: Sequence[str] | None = None,
    alias: str | None = None,
) -> list[Version]:
    """Publishes the adapters of a run, each as the next version of the adapter named by its task.

    All are published before the first alias moves; the first that is refused ends it, with what
    was published by then. Publishing a run again changes nothing: equal bytes are the version they
    already are, and an alias that points at it stays.

    Args:
        run_dir: the directory of a run that has finished.
        registry: where to.
        tasks: only these; all that were trained to their end, unless given.
        alias: also point this alias of each adapter at the new version.

    Raises:
        NotPublishableError: no run is there, or a task did not finish; or the registry refuses an
            adapter or an alias after it took others, which are named.
        InvalidNameError: nothing can be called `alias`; nothing was published.
        RegistryError: the registry refuses the first adapter.
    """
    if alias is not None:
        check_alias_name(alias)
    run = _read_json(run_dir / "run.json", RunRecord)
    base = _base(run_dir)
    if run.get("kind") == "full":
        raise NotPublishableError(
            f"{run_dir} trained the base itself, and the registry holds adapters: give the model "
            f"directory in {run_dir / 'adapters'} to a gateway as its base"
        )
    if run.get("status") == "running":
        # What it has written of tasks that ended before others does not tell of their ends yet.
        raise NotPublishableError(
            f"{run_dir} is still being trained: publish it once it has ended"
            if is_locked(run_dir / "metrics.jsonl")
            else f"{run_dir} was not trained to its end; resume the run first"
        )
    trained: dict[str, Any] = run["tasks"]
    finished = [name for name, task in trained.items() if not task.get("stopped")]
    chosen = list(dict.fromkeys(tasks or finished))
    problems = [problem for name in chosen if (problem := _problem(run_dir, trained, name))]
    if not chosen:
        problems.append("every adapter stopped early")
    if problems:
        raise NotPublishableError(f"{run_dir}: {'; '.join(problems)}")
    generations = _generations(registry, chosen, alias)
    versions: list[Version] = []
    with _telling(versions, chosen):
        for name in chosen:
            version = registry.publish(
                name,
                run_dir / "adapters" / name,
                base=base,
                metrics=trained[name]["metrics"],
                lineage=_lineage(run_dir, run, name),
                parent=_parent(registry, run, name),
            )
            versions.append(version)
    _point(registry, versions, alias, generations, f"published from run {run['id'][:12]}")
    return versions


def is_sweep(directory: Path) -> bool:
    """Whether a directory is that of a sweep, and not of a run."""
    return (directory / STATE_FILE).is_file()


def publish_best_trial(directory: Path, registry: Registry, alias: str | None = None) -> Version:
    """Publishes the best trial of a sweep as the next version of the task that was searched.

    Args:
        directory: the directory of a sweep.
        registry: where to.
        alias: also point this alias of the adapter at the new version.

    Raises:
        SweepError: no sweep is there.
        NotPublishableError: no trial of it came to its end; or it was published, and the registry
            refuses the alias.
        InvalidNameError: nothing can be called `alias`; nothing was published.
        RegistryError: the registry refuses the adapter.
    """
    if alias is not None:
        check_alias_name(alias)
    sweep = read_sweep(directory)
    best = sweep.best
    if best is None:
        raise NotPublishableError(f"{directory}: no trial has come to its end")
    run_dir = sweep.run_directory(best)
    run = _read_json(run_dir / "run.json", RunRecord)
    if problem := _problem(run_dir, run["tasks"], best.name):
        raise NotPublishableError(f"{run_dir}: {problem}")
    generations = _generations(registry, [sweep.task], alias)
    version = registry.publish(
        sweep.task,
        run_dir / "adapters" / best.name,
        base=_base(run_dir),
        metrics=run["tasks"][best.name]["metrics"],
        lineage={**_lineage(run_dir, run, best.name), "trial": best.name},
        parent=_parent(registry, run, best.name),
    )
    _point(registry, [version], alias, generations, f"best of {len(sweep.trials)} trials")
    return version


def _lineage(run_dir: Path, run: Mapping[str, Any], task: str) -> dict[str, str]:
    """Where an adapter comes from: enough to find, or to repeat, its training."""
    lineage = {
        "run": run["id"],
        "recipe": run["recipe_digest"],
        "base": run["base"]["fingerprint"],
        "data": run["tasks"][task]["data_fingerprint"],
        "seed": str(run["seed"]),
        "trainer": run["versions"]["manylora-trainer"],
    }
    starts = _read_json(run_dir / "environment.json", EnvironmentRecord)["starts"]
    if git := starts[-1]["git"]:
        lineage["git"] = git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
    return lineage


def _parent(registry: Registry, run: Mapping[str, Any], task: str) -> str | None:
    """The version whose weights a task went on from, if it was published here."""
    weights: str | None = run["tasks"][task].get("init_from")
    if weights is None:
        return None
    found = registry.find_versions(f"file={weights}").versions
    # The same weights may have been published under several names.
    own = [version for version in found if version.name == task]
    return next((f"{version.name}@{version.number}" for version in [*own, *found]), None)


@contextmanager
def _telling(published: Sequence[Version], chosen: Sequence[str]) -> Generator[None]:
    """Says what is published by now and what was not tried, when the registry refuses one."""
    try:
        yield
    except RegistryError as error:
        refused, *left = chosen[len(published) :]
        if len(chosen) == 1:
            raise
        told = [f"published before this, and there to stay: {_names(published) or 'nothing'}"]
        if left:
            told.append(f"not tried: {', '.join(left)}")
        others = " ".join(f"--task {name}" for name in chosen if name != refused)
        raise NotPublishableError(
            f"{error} ({'; '.join(told)}; no alias was moved: {others} publishes all but {refused})"
        ) from error


def _generations(registry: Registry, names: Sequence[str], alias: str | None) -> dict[str, int]:
    """At which generation `alias` of each adapter is; 0: there is none yet."""
    found: dict[str, int] = {}
    if alias is None:
        return found
    for name in names:
        try:
            there = registry.aliases(name).get(alias)
        except AdapterNotFoundError:
            there = None
        found[name] = 0 if there is None else there.generation
    return found


def _point(
    registry: Registry,
    versions: Sequence[Version],
    alias: str | None,
    generations: Mapping[str, int],
    why: str,
) -> None:
    """Has `alias` of each adapter point at its version, where it does not already.

    One that was moved since its generation was looked up stays: whoever moved it may have
    published the newer version.
    """
    moved: list[Version] = []
    if alias is None:
        return
    for version in versions:
        try:
            there = registry.aliases(version.name).get(alias)
            if there is None or there.version != version.number:
                expect = generations[version.name]
                registry.set_alias(version.name, alias, version.number, expect=expect, why=why)
        except RegistryError as error:
            raise NotPublishableError(
                f"{error} (published before this, and there to stay: {_names(versions)}; {alias} "
                f"points at {_names(moved) or 'none of them'})"
            ) from error
        moved.append(version)


def _names(versions: Sequence[Version]) -> str:
    return ", ".join(f"{version.name}@{version.number}" for version in versions)


def _problem(run_dir: Path, trained: dict[str, Any], name: str) -> str | None:
    if name not in trained:
        return f"it has no task {name!r}, only {', '.join(trained)}"
    if stopped := trained[name].get("stopped"):
        return f"{name} stopped early ({stopped})"
    if not (run_dir / "adapters" / name).is_dir():
        return f"{name} is not trained to its end; resume the run first"
    return None


def _base(run_dir: Path) -> BaseModelIdentity:
    base = _read_json(run_dir / "base.json", BaseRecord)
    tensors = {name: tuple(shape) for name, shape in base["tensors"].items()}
    return BaseModelIdentity(base["fingerprint"], tensors)


def _read_json(
    path: Path, kind: type[RunRecord | EnvironmentRecord | BaseRecord]
) -> dict[str, Any]:
    """What a run has written to a file."""
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotPublishableError(_no_run(path.parent, f"it has no {path.name}")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise NotPublishableError(f"{path} cannot be read: {error}") from error
    try:
        return checked(kind, content)
    except ValueError as error:
        raise NotPublishableError(
            _no_run(path.parent, f"its {path.name} is none of a run ({error})")
        ) from error


def _no_run(directory: Path, why: str) -> str:
    return (
        f"{directory} is not a run: {why}; an adapter that comes from elsewhere is published by "
        f"`manylora registry import {directory} --name NAME --base DIR`"
    )
