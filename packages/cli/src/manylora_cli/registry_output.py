"""What the verbs of `manylora registry` have in common: their options, and how they print."""

from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Generator

    from manylora_registry import AliasMove, Registry, Version
    from manylora_registry.blobs import Progress

Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="NAME[@SELECTOR]: a version number, an alias or sha256:HEX; else @production.",
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Location = Annotated[
    Path | None,
    typer.Option(
        "--registry", metavar="DIR", help="The registry's directory; else $MANYLORA_REGISTRY."
    ),
]
Override = Annotated[
    bool,
    typer.Option("--override", help="Move a protected alias without a passed gate; needs --why."),
]


def open_registry(location: Path | None) -> "Registry":
    """The registry of an option or of the environment; one that is not there is not made."""
    from manylora_registry import Registry

    return Registry.open(location, create=False)


@contextmanager
def progress_of_blobs() -> "Generator[Progress]":
    """A bar on a terminal, moved by what it gives: what is done, with how many, of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = ("{task.description} blobs", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Elsewhere it would leave an empty line.
    quiet = not console.is_terminal
    with Bars(*columns, console=console, transient=True, disable=quiet) as bars:
        bar = bars.add_task("listing", total=None)
        yield lambda what, done, total: bars.update(
            bar, description=what, completed=done, total=total
        )


def version_json(version: "Version") -> dict[str, Any]:
    """A version for machines."""
    return {
        "name": version.name,
        "number": version.number,
        "digest": version.digest,
        "base": version.base_fingerprint,
        "rank": version.rank,
        "size": version.size,
        "published": version.created_at.isoformat(),
        "metrics": dict(version.metrics),
        "tags": dict(version.tags),
        "lineage": dict(version.lineage),
        "parent": version.parent,
        "yanked": version.yanked,
        "deleted": version.deleted,
    }


def move_json(move: "AliasMove") -> dict[str, Any]:
    """An alias move for machines."""
    return {
        "name": move.name,
        "alias": move.alias,
        "generation": move.generation,
        "version": move.version,
        "previous": move.previous,
        "actor": move.actor,
        "why": move.why,
        "at": move.at.isoformat(),
        "override": move.override,
    }


def size_text(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def time_text(at: datetime) -> str:
    """A moment, for people."""
    return f"{at:%Y-%m-%d %H:%M} UTC"
