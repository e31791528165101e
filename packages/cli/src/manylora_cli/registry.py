"""`manylora registry`: look at adapters, move aliases, check and carry versions."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manylora_registry import AliasMove, Registry, Version

app = typer.Typer(help="Adapters, their versions and aliases.", no_args_is_help=True)

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command("list")
def list_adapters(registry: Location = None, as_json: AsJson = False) -> None:
    """List every adapter with its latest version and its aliases."""
    with _open(registry) as opened:
        found = opened.adapters()
    if as_json:
        _print_json(
            [
                {
                    "name": adapter.name,
                    "latest": _version(adapter.latest),
                    "aliases": {
                        name: {"version": alias.version, "generation": alias.generation}
                        for name, alias in adapter.aliases.items()
                    },
                }
                for adapter in found
            ]
        )
        return
    _print_table(
        ("adapter", "latest", "aliases", "rank", "size", "published"),
        [
            (
                adapter.name,
                f"{adapter.latest.number}{' (yanked)' if adapter.latest.yanked else ''}",
                " ".join(f"{name}={at.version}" for name, at in adapter.aliases.items()),
                str(adapter.latest.rank),
                _size(adapter.latest.size),
                _when(adapter.latest.created_at),
            )
            for adapter in found
        ],
        empty="no adapters yet; `manylora publish RUN_DIR` adds some",
    )


@app.command("show")
def show(reference: Reference, registry: Location = None, as_json: AsJson = False) -> None:
    """Show one version: what it is, where it came from, how good it was."""
    with _open(registry) as opened:
        version = opened.find(reference)
        all_aliases = next(a.aliases for a in opened.adapters() if a.name == version.name)
    aliases = [name for name, at in all_aliases.items() if at.version == version.number]
    if as_json:
        _print_json({**_version(version), "aliases": aliases})
        return
    rows = [
        ("version", f"{version.name}@{version.number}{' (yanked)' if version.yanked else ''}"),
        ("digest", version.digest),
        ("aliases", " ".join(aliases)),
        ("base", version.base_fingerprint),
        ("rank", str(version.rank)),
        ("size", _size(version.size)),
        ("published", _when(version.created_at)),
        *((f"metric {key}", f"{value:.6g}") for key, value in sorted(version.metrics.items())),
        *((f"tag {key}", value) for key, value in sorted(version.tags.items())),
        *((f"lineage {key}", value) for key, value in sorted(version.lineage.items())),
    ]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}".rstrip())


@app.command("alias")
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="E.g. production.")],
    version: Annotated[
        str,
        typer.Argument(
            metavar="VERSION", help="Where to point it: a number, another alias or sha256:HEX."
        ),
    ],
    expect: Annotated[
        int | None,
        typer.Option(
            metavar="GENERATION",
            help="Move it only from this generation (see `list --json`); 0: only if it is new.",
        ),
    ] = None,
    why: Annotated[str, typer.Option(help="The reason, kept in the history.")] = "",
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version."""
    with _open(registry) as opened:
        move = opened.set_alias(name, alias, version, expect=expect, why=why)
    if as_json:
        _print_json(_move(move))
    else:
        before = "nothing" if move.previous is None else f"version {move.previous}"
        print(f"{name}@{alias}: {before} -> version {move.version} (generation {move.generation})")


@app.command("history")
def history(name: Name, registry: Location = None, as_json: AsJson = False) -> None:
    """List every move of an adapter's aliases, oldest first."""
    with _open(registry) as opened:
        moves = opened.history(name)
    if as_json:
        _print_json([_move(move) for move in moves])
        return
    _print_table(
        ("when", "alias", "generation", "from", "to", "who", "why"),
        [
            (
                _when(move.at),
                move.alias,
                str(move.generation),
                "" if move.previous is None else str(move.previous),
                str(move.version),
                move.actor,
                move.why,
            )
            for move in moves
        ],
        empty=f"no alias of {name} was ever set",
    )


@app.command("verify")
def verify(registry: Location = None, as_json: AsJson = False) -> None:
    """Hash every stored byte and check every record; exit status 1 if something is wrong."""
    from rich.console import Console

    with _open(registry) as opened, Console(stderr=True).status("hashing every blob"):
        report = opened.verify()
    if as_json:
        _print_json(
            {
                "ok": report.ok,
                "versions": report.versions,
                "blobs": report.blobs,
                "size": report.size,
                "moves": report.moves,
                "problems": [
                    {"path": problem.path, "message": problem.message}
                    for problem in report.problems
                ],
                "unreferenced": report.unreferenced,
            }
        )
    else:
        for problem in report.problems:
            print(f"damaged: {problem}")
        print(
            f"{report.versions} versions, {report.blobs} blobs ({_size(report.size)}), "
            f"{report.moves} alias moves: {'all good' if report.ok else 'DAMAGED'}"
        )
        if report.unreferenced:
            print(f"{len(report.unreferenced)} blobs belong to no version; they do no harm")
    if not report.ok:
        raise typer.Exit(1)


@app.command("export")
def export(
    reference: Reference,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty directory.")],
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Write a version as a PEFT adapter directory; importing it gives the same digest."""
    with _open(registry) as opened:
        version = opened.find(reference)
        opened.export(version, directory)
    if as_json:
        _print_json({**_version(version), "directory": str(directory)})
    else:
        print(f"{version.name}@{version.number} ({version.digest}) written to {directory}")


@app.command("import")
def import_adapter(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT adapter directory.")],
    name: Annotated[str, typer.Option(help="The adapter to add a version to.")],
    base: Annotated[Path, typer.Option(metavar="DIR", help="The base model it was trained on.")],
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Publish a PEFT adapter directory from elsewhere."""
    from manylora_registry import Registry, identify_base

    identity = identify_base(base)
    with Registry.open(registry) as opened:
        version = opened.publish(name, directory, base=identity)
    if as_json:
        _print_json(_version(version))
    else:
        print(f"{version.name}@{version.number} ({version.digest})")


@app.command("yank")
def yank(reference: Reference, registry: Location = None, as_json: AsJson = False) -> None:
    """Withdraw a version: it is kept, but never served again."""
    with _open(registry) as opened:
        version = opened.yank(reference)
    if as_json:
        _print_json(_version(version))
    else:
        print(f"{version.name}@{version.number} is withdrawn")


def _open(location: Path | None) -> "Registry":
    from manylora_registry import Registry

    return Registry.open(location, create=False)


def _version(version: "Version") -> dict[str, Any]:
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
        "yanked": version.yanked,
    }


def _move(move: "AliasMove") -> dict[str, Any]:
    return {
        "name": move.name,
        "alias": move.alias,
        "generation": move.generation,
        "version": move.version,
        "previous": move.previous,
        "actor": move.actor,
        "why": move.why,
        "at": move.at.isoformat(),
    }


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], empty: str) -> None:
    """A table on a terminal, tab-separated lines with a header in a pipe."""
    import sys

    if not sys.stdout.isatty():
        for row in (header, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in header:
        table.add_column(title)
    for row in rows:
        # Text, as a name or a reason in brackets is no markup.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
