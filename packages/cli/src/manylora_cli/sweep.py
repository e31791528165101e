"""`manylora sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora_cli.output import print_json, print_table, shown, spoken

if TYPE_CHECKING:
    from manylora_trainer.trials import SweepResult


def sweep(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's YAML file.")],
    sweep_dir: Annotated[
        Path | None,
        typer.Option("--sweep-dir", metavar="DIR", help="Instead of its sweep_directory."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a sweep that was stopped.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Override a key, e.g. trials=20; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
) -> None:
    """Search a task's best settings.

    Trials train together over one base.
    """
    import os
    import shlex
    from functools import partial

    # Bases are local directories: without this the libraries look for a hub first.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from manylora_trainer.sweep import run_sweep
    from manylora_trainer.sweep_settings import load_sweep

    settings = load_sweep(sweep, set_ or ())
    if sweep_dir is not None:
        settings = settings.model_copy(update={"sweep_directory": sweep_dir})
    directory = settings.sweep_directory
    again = ["manylora", "sweep", str(sweep), "--sweep-dir", shown(directory), "--resume"]
    for entry in set_ or ():
        again += ["--set", entry]
    with spoken():
        result = run_sweep(
            settings,
            resume=resume,
            how_to_resume=shlex.join(again),
            say=partial(typer.echo, err=True),
        )
    if as_json:
        print_json(result.as_json())
    else:
        _print_result(result)


def _print_result(result: "SweepResult") -> None:
    from manylora_trainer.dotted import rounded

    paths = list(result.trials[0].settings)
    print_table(
        ("trial", "state", *(path.split(".", 2)[2] for path in paths), "steps", "validation loss"),
        [
            (
                trial.name,
                trial.state,
                *(rounded(trial.settings[path]) for path in paths),
                str(trial.step),
                "" if trial.loss is None else f"{trial.loss:.4g}",
            )
            for trial in result.ranked
        ],
    )
    if (best := result.best) is not None:
        print(
            f"best: {best.name}; report: {shown(result.directory / 'report.html')}; publish with: "
            f"manylora publish {shown(result.directory)}"
        )
