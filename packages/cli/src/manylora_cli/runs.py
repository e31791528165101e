"""`manylora runs`: what was trained, how it went, and what differs."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora_cli.options import AsJson
from manylora_cli.output import print_json, print_table, shown

if TYPE_CHECKING:
    from rich.text import Text

    from manylora_trainer.comparison import Comparison
    from manylora_trainer.saved_runs import BrokenRun, SavedRun, SavedTask

app = typer.Typer(help="Training runs: list, look into, compare, export.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@app.command("list")
def list_runs(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to look, subdirectories included.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List every run, also those under way, broken off or damaged."""
    from manylora_trainer.saved_runs import BrokenRun, find_runs

    found = find_runs(directory)
    if as_json:
        print_json([run.as_json() for run in found])
        return
    print_table(
        ("run", "state", "begun", "steps", "tokens/s", "validation loss"),
        [_broken(run) if isinstance(run, BrokenRun) else _listed(run) for run in found],
        empty=f"no runs below {shown(directory)}",
    )


@app.command("show")
def show(
    run: Run,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write the run's HTML page here too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one run: its adapters, what it ran on and how far it came."""
    from manylora_trainer.run_report import write_run_report
    from manylora_trainer.saved_runs import read_run

    found = read_run(run)
    if as_json:
        print_json({**found.as_json(), "recipe": found.recipe, "starts": found.starts})
    else:
        _print_run(found)
    if out is not None:
        write_run_report(found, out)
        typer.echo(f"report: {shown(out)}", err=True)


@app.command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN [RUN]...", help="Two or more.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write comparison.html and comparison.png here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set runs side by side.

    Their results, and the settings in which their recipes differ.
    """
    from manylora_trainer.comparison import compare as compare_runs
    from manylora_trainer.comparison import write_comparison

    if len(runs) < 2:
        raise typer.BadParameter("name two runs or more")
    comparison = compare_runs(runs)
    if as_json:
        print_json(comparison.as_json())
    else:
        _print_comparison(comparison)
    if out is not None:
        write_comparison(comparison, out)
        typer.echo(f"report: {shown(out / 'comparison.html')}", err=True)


class Tracker(StrEnum):
    """Experiment trackers that runs can be exported to."""

    MLFLOW = "mlflow"
    TRACKIO = "trackio"


@app.command("export")
def export(
    run: Run,
    to: Annotated[Tracker, typer.Option("--to", help="The tracker.")],
    uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="MLflow's tracking URI, or trackio's server or directory; else its own default.",
        ),
    ] = None,
    project: Annotated[
        str, typer.Option(metavar="NAME", help="MLflow's experiment, trackio's project.")
    ] = "manylora",
    as_json: AsJson = False,
) -> None:
    """Copy a run into an experiment tracker.

    Done again, it replaces what it copied before.
    """
    from dataclasses import asdict

    from manylora_trainer.exporters import export_run
    from manylora_trainer.saved_runs import read_run

    exported = export_run(read_run(run), to.value, uri, project)
    if as_json:
        print_json([asdict(entry) for entry in exported])
        return
    print_table(
        ("adapter", f"{to.value} run", "values"),
        [(entry.task, entry.name, str(entry.metrics)) for entry in exported],
    )


def _listed(run: "SavedRun") -> tuple[str, ...]:
    losses = {name: task.metrics.get("validation_loss") for name, task in run.tasks.items()}
    return (
        shown(run.path),
        run.state,
        str(run.record.get("started_at", "")),
        " ".join(f"{task.step}/{task.steps or '?'}" for task in run.tasks.values()),
        "" if run.tokens_per_s is None else f"{run.tokens_per_s:.0f}",
        " ".join(f"{name}={loss:.4g}" for name, loss in losses.items() if loss is not None),
    )


def _broken(run: "BrokenRun") -> tuple[str, ...]:
    return (shown(run.path), "broken", "", "", "", run.problem)


def _print_run(run: "SavedRun") -> None:
    rows = [
        ("run", shown(run.path)),
        ("state", run.state),
        ("begun", run.record.get("started_at", "")),
        ("ended", run.record.get("ended_at", "")),
        ("base", run.recipe.get("base", "")),
        ("recipe", run.record.get("recipe_digest", "")),
        ("tokens/s", "" if run.tokens_per_s is None else f"{run.tokens_per_s:.1f}"),
    ]
    for start in run.starts[-1:]:
        git = start.get("git")
        dirty = " with uncommitted changes" if git and git["dirty"] else ""
        environment = start["environment"]
        gpus = ", ".join(gpu["name"] for gpu in environment.get("gpus", ()))
        rows.append(("git", f"{git['commit'][:12]}{dirty}" if git else "no repository"))
        cpu = f"{environment.get('cpu', '?')}, {environment.get('threads', '?')} threads"
        rows.append(("machine", gpus or cpu))
    for key, value in rows:
        if value:
            print(f"{key:<9} {value}")
    print()
    metrics = list(dict.fromkeys(name for task in run.tasks.values() for name in task.metrics))
    print_table(
        ("adapter", "steps", *(name.replace("_", " ") for name in metrics), "tokens", "end"),
        [
            (
                task.name,
                f"{task.step}/{task.steps or '?'}",
                *(_number(task.metrics.get(name)) for name in metrics),
                str(task.tokens),
                _end(task),
            )
            for task in run.tasks.values()
        ],
    )


def _end(task: "SavedTask") -> str:
    """Why it did not come to its last step, if it did not."""
    if task.stopped:
        return f"stopped at {task.stopped}"
    return f"ended well at {task.ended_early}" if task.ended_early else ""


def _print_comparison(comparison: "Comparison") -> None:
    labels = comparison.labels
    print_table(
        ("adapter", "metric", *labels),
        [
            (
                row.adapter,
                row.metric,
                *(_marked(_number(v), row.best == i) for i, v in enumerate(row.values)),
            )
            for row in comparison.results
        ],
    )
    print()
    if not comparison.differences:
        print("the recipes are the same")
        return
    print_table(
        ("setting", *labels),
        [
            (row.path, *(_marked(value, value != row.values[0]) for value in row.values))
            for row in comparison.differences
        ],
    )


def _marked(text: str, marked: bool) -> "Text":
    from rich.text import Text

    return Text(text, style="bold green" if marked else "")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
