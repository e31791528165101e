"""Options that several verbs take alike."""

from typing import Annotated

import typer

Server = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The gateway; default: MANYLORA_SERVER, or 127.0.0.1:50051.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
