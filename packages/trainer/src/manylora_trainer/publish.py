"""From a finished run to versions in the registry. Needs neither torch nor the base."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manylora_registry import BaseModelIdentity, Registry, Version
from manylora_trainer.errors import NotPublishableError


def publish_run(
    run_dir: Path,
    registry: Registry,
    tasks: Sequence[str] | None = None,
    alias: str | None = None,
) -> list[Version]:
    """Publishes the adapters of a run, each as the next version of the adapter named by its task.

    All are published before the first alias moves. Publishing a run again changes nothing: equal
    bytes are the version they already are.

    Args:
        run_dir: the directory of a run that has finished.
        registry: where to.
        tasks: only these; all that were trained to their end, unless given.
        alias: also point this alias of each adapter at the new version.

    Raises:
        NotPublishableError: no run is there, or a task did not finish.
        RegistryError: the registry refuses an adapter.
    """
    run = _read_json(run_dir / "run.json")
    base = _base(run_dir)
    if run.get("kind") == "full":
        raise NotPublishableError(
            f"{run_dir} trained the base itself, and the registry holds adapters: give the model "
            f"directory in {run_dir / 'adapters'} to a gateway as its base"
        )
    trained: dict[str, Any] = run["tasks"]
    chosen = list(tasks or [name for name, task in trained.items() if not task.get("stopped")])
    problems = [problem for name in chosen if (problem := _problem(run_dir, trained, name))]
    if not chosen:
        problems.append("every adapter stopped early")
    if problems:
        raise NotPublishableError(f"{run_dir}: {'; '.join(problems)}")
    versions = [
        registry.publish(
            name,
            run_dir / "adapters" / name,
            base=base,
            metrics=trained[name]["metrics"],
            lineage={
                "run": run["id"],
                "recipe": run["recipe_digest"],
                "data": trained[name]["data_fingerprint"],
                "seed": str(run["seed"]),
                "trainer": run["versions"]["manylora-trainer"],
            },
        )
        for name in chosen
    ]
    if alias is not None:
        for version in versions:
            registry.set_alias(
                version.name, alias, version.number, why=f"published from run {run['id'][:12]}"
            )
    return versions


def _problem(run_dir: Path, trained: dict[str, Any], name: str) -> str | None:
    if name not in trained:
        return f"it has no task {name!r}, only {', '.join(trained)}"
    if stopped := trained[name].get("stopped"):
        return f"{name} stopped early ({stopped})"
    if not (run_dir / "adapters" / name).is_dir():
        return f"{name} is not trained to its end; resume the run first"
    return None


def _base(run_dir: Path) -> BaseModelIdentity:
    base = _read_json(run_dir / "base.json")
    tensors = {name: tuple(shape) for name, shape in base["tensors"].items()}
    return BaseModelIdentity(base["fingerprint"], tensors)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotPublishableError(f"{path.parent} is not a run: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise NotPublishableError(f"{path} cannot be read: {error}") from error
