"""`manylora registry`: look at adapters, move aliases, check and carry versions."""

from typing import Annotated

import typer

from manylora_cli import registry_files
from manylora_cli.registry_output import (
    AsJson,
    Location,
    Name,
    Reference,
    move_json,
    open_registry,
    print_json,
    print_table,
    size_text,
    time_text,
    version_json,
)

app = typer.Typer(
    help="""Adapters, their versions and aliases.

    A version is immutable and known by its digest; an alias such as production is a name that
    moves between the versions of one adapter and remembers where it was. REF is NAME, NAME@ALIAS,
    NAME@NUMBER or NAME@sha256:HEX (12 or more digits); NAME alone means NAME@production.

    The registry is the directory in --registry or MANYLORA_REGISTRY, or the shared one of
    MANYLORA_REGISTRY_DATABASE and MANYLORA_REGISTRY_BLOBS. Tables are for people on a terminal,
    tab-separated in a pipe, and --json is for machines. Exit status: 0 good, 1 a failure that is
    one line on stderr, 2 wrong usage.
    """,
    no_args_is_help=True,
)


@app.command("list")
def list_adapters(registry: Location = None, as_json: AsJson = False) -> None:
    """List every adapter with its latest version and its aliases."""
    with open_registry(registry) as opened:
        found = opened.adapters()
    if as_json:
        print_json(
            [
                {
                    "name": adapter.name,
                    "latest": version_json(adapter.latest),
                    "aliases": {
                        name: {"version": alias.version, "generation": alias.generation}
                        for name, alias in adapter.aliases.items()
                    },
                }
                for adapter in found
            ]
        )
        return
    print_table(
        ("adapter", "latest", "aliases", "rank", "size", "published"),
        [
            (
                adapter.name,
                f"{adapter.latest.number}{' (yanked)' if adapter.latest.yanked else ''}",
                " ".join(f"{name}={at.version}" for name, at in adapter.aliases.items()),
                str(adapter.latest.rank),
                size_text(adapter.latest.size),
                time_text(adapter.latest.created_at),
            )
            for adapter in found
        ],
        empty="no adapters yet; `manylora publish RUN_DIR` adds some",
    )


@app.command("show")
def show(reference: Reference, registry: Location = None, as_json: AsJson = False) -> None:
    """Show one version: digest, lineage, metrics, tags."""
    with open_registry(registry) as opened:
        version = opened.find(reference)
        all_aliases = next(a.aliases for a in opened.adapters() if a.name == version.name)
    aliases = [name for name, at in all_aliases.items() if at.version == version.number]
    if as_json:
        print_json({**version_json(version), "aliases": aliases})
        return
    rows = [
        ("version", f"{version.name}@{version.number}{' (yanked)' if version.yanked else ''}"),
        ("digest", version.digest),
        ("aliases", " ".join(aliases)),
        ("base", version.base_fingerprint),
        ("rank", str(version.rank)),
        ("size", size_text(version.size)),
        ("published", time_text(version.created_at)),
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
    with open_registry(registry) as opened:
        move = opened.set_alias(name, alias, version, expect=expect, why=why)
    if as_json:
        print_json(move_json(move))
    else:
        before = "nothing" if move.previous is None else f"version {move.previous}"
        print(f"{name}@{alias}: {before} -> version {move.version} (generation {move.generation})")


@app.command("history")
def history(name: Name, registry: Location = None, as_json: AsJson = False) -> None:
    """List every move of an adapter's aliases, oldest first."""
    with open_registry(registry) as opened:
        moves = opened.history(name)
    if as_json:
        print_json([move_json(move) for move in moves])
        return
    print_table(
        ("when", "alias", "generation", "from", "to", "who", "why"),
        [
            (
                time_text(move.at),
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
    """Hash every stored byte and check every record.

    Exit status 1 if something is wrong.
    """
    from rich.console import Console

    with open_registry(registry) as opened, Console(stderr=True).status("hashing every blob"):
        report = opened.verify()
    if as_json:
        print_json(
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
            f"{report.versions} versions, {report.blobs} blobs ({size_text(report.size)}), "
            f"{report.moves} alias moves: {'all good' if report.ok else 'DAMAGED'}"
        )
        if report.unreferenced:
            print(f"{len(report.unreferenced)} blobs belong to no version; they do no harm")
    if not report.ok:
        raise typer.Exit(1)


@app.command("yank")
def yank(reference: Reference, registry: Location = None, as_json: AsJson = False) -> None:
    """Withdraw a version: it is kept, but never served again."""
    with open_registry(registry) as opened:
        version = opened.yank(reference)
    if as_json:
        print_json(version_json(version))
    else:
        print(f"{version.name}@{version.number} is withdrawn")


app.command("diff")(registry_files.diff)
app.command("export")(registry_files.export)
app.command("import")(registry_files.import_adapter)
app.command("copy")(registry_files.copy)
app.command("sign")(registry_files.sign)
app.command("verify-signature")(registry_files.verify_signature)
