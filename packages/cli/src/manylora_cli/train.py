"""`manylora train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora_cli.output import shown, spoken

if TYPE_CHECKING:
    from manylora_trainer.result import RunResult


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")],
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Instead of the recipe's run_directory."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="PATH",
            help="With --resume: a key that may differ from the run's, e.g. tasks.0.steps; "
            "repeatable.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Override a key, e.g. tasks.0.steps=100; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would train, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train every task of a recipe, one adapter each, in one run.

    Ctrl-C ends it with a checkpoint, and --resume goes on from there. `manylora runs show` tells
    how a run does, and `manylora publish` makes versions of its adapters.
    """
    import json
    import os
    import shlex

    from manylora_trainer import load_recipe
    from manylora_trainer.errors import AdaptersStoppedError

    loaded = load_recipe(recipe, set_ or ())
    if dry_run:
        # Bases are local directories: without this the libraries look for a hub first.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from manylora_cli.plans import show_plan
        from manylora_trainer.dry_run import plan

        with spoken():
            planned = plan(loaded)
        if as_json:
            print(json.dumps(planned.as_json()))
        else:
            show_plan(planned)
        return

    from manylora_trainer import train as run

    path = run_dir or loaded.run_directory
    again = ["manylora", "train", str(recipe), "--run-dir", shown(path), "--resume"]
    for entry in set_ or ():
        again += ["--set", entry]
    for entry in allow_change or ():
        again += ["--allow-change", entry]
    with spoken():
        result = run(
            loaded,
            path,
            resume,
            how_to_resume=shlex.join(again),
            allow_changes=allow_change or (),
        )
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        _show_result(result)
    stopped = {name: task.stopped for name, task in result.tasks.items() if task.stopped}
    if stopped:
        raise AdaptersStoppedError(
            "; ".join(f"{name} stopped at {why}" for name, why in stopped.items())
        )


def _show_result(result: "RunResult") -> None:
    for name, task in result.tasks.items():
        if task.adapter is None:
            print(f"{name}: stopped at {task.stopped}")
            continue
        losses = ", ".join(
            f"{metric.replace('_', ' ')} {value:.3f}" for metric, value in task.metrics.items()
        )
        print(f"{name}: {losses}, {task.tokens} tokens, {shown(task.adapter)}")
        if task.ended_early:
            print(f"{name}: ended well at {task.ended_early}")
        for count, what in (
            (task.overlong_dropped, "examples longer than max_length were left out"),
            (task.overlong_truncated, "examples were cut to max_length"),
            (task.rows_skipped, "malformed rows were skipped"),
        ):
            if count:
                print(f"{name}: {count} {what}")
    print(
        f"{result.seconds:.0f} s of training, {result.tokens_per_s:.0f} tokens/s; "
        f"publish with: manylora publish {shown(result.run_directory)}"
    )
