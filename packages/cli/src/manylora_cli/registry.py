"""`manylora registry`: look at adapters, move aliases, check and carry versions."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora_cli import registry_files, registry_manage
from manylora_cli.options import AsJson
from manylora_cli.output import print_json, print_table
from manylora_cli.registry_output import (
    Location,
    Name,
    Override,
    Reference,
    move_json,
    open_registry,
    progress_of_blobs,
    size_text,
    time_text,
    version_json,
)

if TYPE_CHECKING:
    from manylora_registry import Evaluation, Protection, Registry, Version

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
def list_adapters(
    where: Annotated[
        str | None,
        typer.Option(metavar="FILTER", help="Only versions that match, see above."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="ORDER",
            help="name, created, metric.KEY or tag.KEY; -metric.KEY is descending.",
        ),
    ] = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="Every version; implied by --where and --sort.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=1000, help="At most so many.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Go on behind a page; KEY is what that one ended with."),
    ] = None,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """List adapters, or the versions that match.

    Without options each adapter with its latest version and its aliases.

    FILTER compares tag.KEY, metric.KEY, lineage.KEY, name, number, digest, base, rank, size,
    created, yanked, alias, parent and file by = != < <= > >= or ~ (a pattern), joined with
    and, or, not and parentheses. Quote values with spaces. A version without the tag or metric
    fulfils no comparison with it. With more versions than --limit, the key to go on from is
    printed on stderr.

    \b
    manylora registry list --where 'tag.lang=en and metric.f1>0.8' --sort -metric.f1
    manylora registry list --where 'name~spell* and not yanked=true' --limit 20
    """
    with open_registry(registry) as opened:
        if versions or where is not None or sort is not None:
            _list_versions(opened, where or "", sort or "name", limit or 100, after, as_json)
            return
        found = opened.adapters(limit=limit, after=after)
    if limit is not None and len(found) == limit:
        _tell_next(found[-1].name)
    if as_json:
        print_json(
            [
                {
                    "name": adapter.name,
                    "latest": version_json(adapter.latest),
                    "aliases": {
                        name: {
                            "version": alias.version,
                            "generation": alias.generation,
                            "protected": alias.protected,
                        }
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
                f"{adapter.latest.number}{_state(adapter.latest)}",
                " ".join(f"{name}={at.version}" for name, at in adapter.aliases.items()),
                str(adapter.latest.rank),
                size_text(adapter.latest.size),
                time_text(adapter.latest.created_at),
            )
            for adapter in found
        ],
        empty="no adapters yet; `manylora publish RUN_DIR` adds some",
    )


def _list_versions(
    registry: "Registry", where: str, sort: str, limit: int, after: str | None, as_json: bool
) -> None:
    page = registry.find_versions(where, sort=sort, limit=limit, after=after)
    if page.next is not None:
        _tell_next(page.next)
    if as_json:
        print_json([version_json(version) for version in page.versions])
        return
    print_table(
        ("version", "tags", "metrics", "rank", "size", "published"),
        [
            (
                f"{version.name}@{version.number}{_state(version)}",
                " ".join(f"{key}={value}" for key, value in sorted(version.tags.items())),
                " ".join(f"{key}={value:.6g}" for key, value in sorted(version.metrics.items())),
                str(version.rank),
                size_text(version.size),
                time_text(version.created_at),
            )
            for version in page.versions
        ],
        empty="no version matches",
    )


def _tell_next(key: str) -> None:
    typer.echo(f"more: --after {key}", err=True)


@app.command("show")
def show(reference: Reference, registry: Location = None, as_json: AsJson = False) -> None:
    """Show one version.

    What it is, where it came from, how good it was, what gates said.
    """
    with open_registry(registry) as opened:
        version = opened.find(reference)
        pointing = opened.aliases(version.name)
        evaluations = opened.evaluations(version)
        protections = opened.protections(version.name)
    aliases = [name for name, at in pointing.items() if at.version == version.number]
    if as_json:
        print_json(
            {
                **version_json(version),
                "aliases": aliases,
                "evaluations": [_evaluation(each) for each in evaluations],
                "protections": [_protection(each) for each in protections],
            }
        )
        return
    rows = [
        ("version", f"{version.name}@{version.number}{_state(version)}"),
        ("digest", version.digest),
        ("aliases", " ".join(aliases)),
        ("base", version.base_fingerprint),
        ("parent", version.parent or ""),
        ("rank", str(version.rank)),
        ("size", size_text(version.size)),
        ("published", time_text(version.created_at)),
        *((f"metric {key}", f"{value:.6g}") for key, value in sorted(version.metrics.items())),
        *((f"tag {key}", value) for key, value in sorted(version.tags.items())),
        *((f"lineage {key}", value) for key, value in sorted(version.lineage.items())),
        *(
            (
                f"evaluation {each.suite}",
                f"{'passed' if each.passed else 'FAILED'} {time_text(each.at)} by {each.actor}",
            )
            for each in evaluations
        ),
    ]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}".rstrip())


def _state(version: "Version") -> str:
    if version.deleted:
        return " (deleted)"
    return " (yanked)" if version.yanked else ""


def _evaluation(evaluation: "Evaluation") -> dict[str, Any]:
    return {
        "suite": evaluation.suite,
        "passed": evaluation.passed,
        "result": dict(evaluation.result),
        "actor": evaluation.actor,
        "at": evaluation.at.isoformat(),
    }


def _protection(protection: "Protection") -> dict[str, Any]:
    return {
        "alias": protection.alias,
        "suite": protection.suite,
        "actor": protection.actor,
        "why": protection.why,
        "at": protection.at.isoformat(),
    }


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
    why: Annotated[str, typer.Option(metavar="TEXT", help="The reason, kept in the history.")] = "",
    override: Override = False,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version."""
    with open_registry(registry) as opened:
        move = opened.set_alias(name, alias, version, expect=expect, why=why, override=override)
    registry_manage.print_move(move, as_json)


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
                f"{'(override) ' if move.override else ''}{move.why}",
            )
            for move in moves
        ],
        empty=f"no alias of {name} was ever set",
    )


@app.command("verify")
def verify(
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Move damaged blobs aside, so that publishing the same files replaces them.",
        ),
    ] = False,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Hash every stored byte and check every record.

    Says which versions are affected. Exit status 1 if something is wrong, repaired or not.
    """
    with open_registry(registry) as opened, progress_of_blobs() as progress:
        report = opened.verify(repair=repair, progress=progress)
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
                "affected": report.affected,
                "set_aside": report.set_aside,
            }
        )
    else:
        for problem in report.problems:
            print(f"damaged: {problem}")
        print(
            f"{report.versions} versions, {report.blobs} blobs ({size_text(report.size)}), "
            f"{report.moves} alias moves: {'all good' if report.ok else 'DAMAGED'}"
        )
        if report.affected:
            print(f"affected: {', '.join(report.affected)}; publish the same files again")
        if report.set_aside:
            print(f"{len(report.set_aside)} damaged blobs were moved aside")
        if report.unreferenced:
            print(
                f"{len(report.unreferenced)} blobs belong to no version; they do no harm, and "
                "`manylora registry gc` removes them"
            )
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
app.command("rollback")(registry_manage.rollback)
app.command("protect")(registry_manage.protect)
app.command("gate")(registry_manage.gate)
app.command("tag")(registry_manage.tag)
app.command("metric")(registry_manage.metric)
app.command("delete")(registry_manage.delete)
app.command("gc")(registry_manage.collect_garbage)
app.command("events")(registry_manage.events)
