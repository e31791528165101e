"""Copies a run into an experiment tracker: MLflow, or trackio.

One run of the tracker for each adapter. Exporting again replaces what was exported before, so a
run under way can be exported as often as one likes.
"""

# mlflow and trackio are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manylora_trainer.dotted import dotted
from manylora_trainer.errors import ExportError
from manylora_trainer.saved_runs import SavedRun

Tracker = Literal["mlflow", "trackio"]
DEFAULT_PROJECT = "manylora"
NOT_METRICS = frozenset({"step", "time"})
PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 1000
"""The most MLflow takes in one request."""


@dataclass(frozen=True)
class Exported:
    """One adapter in the tracker."""

    task: str
    name: str
    """Of the tracker's run."""
    metrics: int
    """Values exported."""


def export_run(
    run: SavedRun, tracker: Tracker, uri: str | None = None, project: str = DEFAULT_PROJECT
) -> list[Exported]:
    """Copies settings, curves and, to MLflow, cards and the recipe.

    Args:
        run: the run, finished or not.
        tracker: where to.
        uri: MLflow's tracking URI, or trackio's server or directory; its own default if None.
        project: MLflow's experiment, trackio's project.

    Raises:
        ExportError: the tracker is not installed, or refuses.
    """
    export = _to_mlflow if tracker == "mlflow" else _to_trackio
    try:
        return export(run, uri, project)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != tracker:
            raise
        raise ExportError(
            f"{tracker} is not installed; install it with: "
            f"pip install 'manylora-trainer[{tracker}]'"
        ) from error


def _to_mlflow(run: SavedRun, uri: str | None, project: str) -> list[Exported]:
    # An export tells the server that was named, and nobody else.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # By itself it tries a server that does not answer for four minutes, in silence, and waits two
    # for each answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    exported: list[Exported] = []
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(project)
        experiment = client.create_experiment(project) if found is None else found.experiment_id
        for task in run.tasks:
            tags = _tags(run, task)
            same = f"tags.`manylora.export` = '{tags['manylora.export']}'"
            earlier = client.search_runs([experiment], same)
            entries = [entry for entry in run.entries if entry["task"] == task]
            name = _name(run, task)
            begun, ended = _span(entries)
            there = client.create_run(experiment, begun, tags, name).info.run_id
            try:
                parameters = [Param(key, str(value)) for key, value in _settings(run, task).items()]
                for at in range(0, len(parameters), PARAMETERS_AT_ONCE):
                    client.log_batch(there, params=parameters[at : at + PARAMETERS_AT_ONCE])
                metrics = [
                    Metric(key, value, int(1000 * entry["time"]), entry["step"])
                    for entry in entries
                    for key, value in _values(entry).items()
                ]
                for at in range(0, len(metrics), METRICS_AT_ONCE):
                    client.log_batch(there, metrics=metrics[at : at + METRICS_AT_ONCE])
                for file in (run.path / "recipe.yaml", run.path / "adapters" / task / "README.md"):
                    if file.is_file():
                        client.log_artifact(there, str(file))
                status = {"finished": "FINISHED", "failed": "FAILED", "running": "RUNNING"}
                state = "FAILED" if run.tasks[task].stopped else status.get(run.state, "KILLED")
                # Left alone it is running, and has no end.
                if state != "RUNNING":
                    client.set_terminated(there, state, ended)
            except Exception:
                # A part of a run is no export of it.
                with suppress(MlflowException, OSError):
                    client.delete_run(there)
                raise
            # Only now: what fails on the way costs nobody the export there is.
            for before in earlier:
                client.delete_run(before.info.run_id)
            exported.append(Exported(task, name, len(metrics)))
    except MlflowException as error:
        raise ExportError(f"MLflow at {uri or 'its default place'}: {error.message}") from error
    except OSError as error:
        # Where it keeps files may be another place than the server, with troubles of its own.
        raise ExportError(f"MLflow at {uri or 'its default place'}: {error}") from error
    return exported


def _to_trackio(run: SavedRun, uri: str | None, project: str) -> list[Exported]:
    is_server = uri is not None and uri.startswith(("http://", "https://"))
    if uri is not None and not is_server:
        if "://" in uri:
            raise ExportError(f"trackio: {uri} is neither a server (http://, https://) nor a path")
        # Read once, when it is imported.
        os.environ["TRACKIO_DIR"] = str(Path(uri).absolute())
    exported: list[Exported] = []
    # It greets on standard output.
    with redirect_stdout(sys.stderr):
        import trackio

        try:
            for task in run.tasks:
                name = _name(run, task)
                earlier: list[Any] = []
                if not is_server:
                    # It says by a ValueError that there is no such project yet.
                    with suppress(ValueError):
                        earlier = [r for r in trackio.Api().runs(project) if r.name == name]
                there = trackio.init(
                    project,
                    name,
                    server_url=uri if is_server else None,
                    config={**_settings(run, task), **_tags(run, task)},
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
                steps: dict[int, dict[str, float]] = {}
                for entry in run.entries:
                    # Where an adapter stopped there may be a reason and no number.
                    if entry["task"] == task and (values := _values(entry)):
                        steps.setdefault(entry["step"], {}).update(values)
                for step, values in steps.items():
                    there.log(values, step=step)
                trackio.finish()
                # Only now: what fails on the way costs nobody the export there is.
                for before in earlier:
                    before.delete()
                exported.append(Exported(task, name, sum(map(len, steps.values()))))
        except (ValueError, OSError) as error:
            raise ExportError(f"trackio: {error}") from error
    return exported


def _name(run: SavedRun, task: str) -> str:
    """Of the tracker's run: two runs of one name are told apart by their id."""
    return f"{run.path.absolute().name}-{str(run.record.get('id', ''))[:8]}/{task}"


def _span(entries: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """Of an adapter's training, in milliseconds; that of the export is nobody's concern."""
    if not entries:
        return None, None
    return int(1000 * entries[0]["time"]), int(1000 * entries[-1]["time"])


def _settings(run: SavedRun, task: str) -> dict[str, Any]:
    mine = next(settings for settings in run.recipe["tasks"] if settings["name"] == task)
    shared = {key: value for key, value in run.recipe.items() if key != "tasks"}
    return dotted({**shared, "task": mine})


def _tags(run: SavedRun, task: str) -> dict[str, str]:
    git = run.starts[-1].get("git") if run.starts else None
    tags = {
        "manylora.export": f"{run.record.get('id')}/{task}",
        "manylora.run": run.record.get("id"),
        "manylora.recipe": run.record.get("recipe_digest"),
        "manylora.base": run.record.get("base", {}).get("fingerprint"),
        "manylora.data": run.tasks[task].data_fingerprint,
        "manylora.git": git and git["commit"],
        "manylora.stopped": run.tasks[task].stopped,
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def _values(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in entry.items()
        # Text says whose entry it is, or why an adapter ended.
        if key not in NOT_METRICS and isinstance(value, int | float)
    }
