"""`manylora serve`."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The gateway's YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Override a key of the file, e.g. engine.slots=8; repeatable.",
        ),
    ] = None,
) -> None:
    """Serve all adapters over one base model.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end it: requests inside have `drain_s` to finish.
    """
    from manylora_gateway.serve import serve as run

    run(config, set_ or ())
