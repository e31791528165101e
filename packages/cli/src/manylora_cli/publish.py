"""`manylora publish`."""

from pathlib import Path
from typing import Annotated

import typer


def publish(
    run_dir: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR", help="A finished run, or a sweep: then its best trial alone."
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Only this task; repeatable."),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option("--alias", metavar="ALIAS", help="Also point this alias at the new versions."),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option("--sign-key", metavar="PEM", help="Sign the versions with this private key."),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option("--registry", metavar="DIR", help="Instead of MANYLORA_REGISTRY."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the versions as JSON.")] = False,
) -> None:
    """Publish the adapters of a finished run as new, immutable versions."""
    import json

    from rich.console import Console

    from manylora_registry import Registry
    from manylora_trainer.publish import is_sweep, publish_best_trial, publish_run

    with Console(stderr=True).status("publishing"), Registry.open(registry) as opened:
        if sign_key is not None:
            opened.signatures.sign_published_with(sign_key)
        if not is_sweep(run_dir):
            versions = publish_run(run_dir, opened, task, alias)
        elif task:
            raise typer.BadParameter("a sweep is of one task; leave --task out")
        else:
            versions = [publish_best_trial(run_dir, opened, alias)]
    if as_json:
        entries = [
            {"name": v.name, "number": v.number, "digest": v.digest, "size": v.size, "alias": alias}
            for v in versions
        ]
        print(json.dumps(entries))
        return
    for version in versions:
        moved = f", {alias} points at it" if alias else ""
        size = f"{version.size / 1e6:.1f} MB"
        print(f"{version.name}@{version.number}  {version.digest[:19]}  {size}{moved}")
