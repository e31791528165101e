"""The verbs of `manylora registry` that say which versions are good, and which may go."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from manylora_cli.options import AsJson
from manylora_cli.output import print_json
from manylora_cli.registry_output import (
    Location,
    Name,
    Override,
    Reference,
    move_json,
    open_registry,
    size_text,
    time_text,
    version_json,
)

if TYPE_CHECKING:
    from datetime import timedelta

    from manylora_registry import AliasMove, Event

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="E.g. production.")]
Why = Annotated[str, typer.Option(metavar="TEXT", help="The reason, kept for ever.")]
Remove = Annotated[
    list[str] | None, typer.Option("--remove", metavar="KEY", help="Remove one; repeatable.")
]
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def rollback(
    name: Name,
    alias: Alias,
    expect: Annotated[
        int | None,
        typer.Option(metavar="GENERATION", help="Move it only from this generation."),
    ] = None,
    why: Why = "",
    override: Override = False,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at the version it had before.

    That is the version it pointed at before the present one came. Versions that were withdrawn are
    passed over. Done again, by you or by somebody else, it is refused: it never swings forward to
    what was rolled back. `alias` moves it anywhere.
    """
    with open_registry(registry) as opened:
        move = opened.rollback(name, alias, expect=expect, why=why, override=override)
    print_move(move, as_json)


def protect(
    name: Name,
    alias: Alias,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="SUITE",
            help="The suite that must have passed; else every suite with a record.",
        ),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Protect it no longer; needs --why.")] = False,
    why: Why = "",
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias move only to what has passed a gate.

    What counts is the latest record of the suite (see `gate`). A move to another version is
    refused, or done with --override and a reason, which the history keeps.

    \b
    manylora registry protect spelling production --suite nightly --why "customers see it"
    """
    with open_registry(registry) as opened:
        opened.protect(name, alias, suite=suite, protected=not off, why=why)
        found = opened.protections(name)
    if as_json:
        print_json([{"alias": each.alias, "suite": each.suite, "why": each.why} for each in found])
    else:
        print(f"{name}@{alias} is {'no longer ' if off else ''}protected")


def gate(
    reference: Reference,
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="Name of the suite or the gate.")],
    passed: Annotated[
        bool | None,
        typer.Option("--passed/--failed", help="What it came to; one of the two is required."),
    ] = None,
    result: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with its figures, kept with it.")
    ] = None,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Record what a suite found about a version.

    Records are only ever added to.
    """
    if passed is None:
        raise typer.BadParameter("say what it came to: --passed or --failed")
    figures = _read_json(result) if result else {}
    with open_registry(registry) as opened:
        version = opened.find(reference)
        record = opened.record_evaluation(version, suite, figures, passed)
    if as_json:
        print_json({"suite": record.suite, "passed": record.passed, "result": figures})
    else:
        verdict = "passed" if passed else "failed"
        print(f"{version.name}@{version.number} {verdict} {suite}")


def tag(
    reference: Reference,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="What to set.")
    ] = None,
    remove: Remove = None,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Set or remove tags of a version."""
    tags: dict[str, str | None] = dict.fromkeys(remove or ())
    tags.update(_pairs(pairs))
    with open_registry(registry) as opened:
        version = opened.describe(reference, tags=tags)
    if as_json:
        print_json(version_json(version))
    else:
        shown = " ".join(f"{key}={value}" for key, value in sorted(version.tags.items()))
        print(f"{version.name}@{version.number}: {shown}")


def metric(
    reference: Reference,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=NUMBER...", help="What to set.")
    ] = None,
    remove: Remove = None,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Set or remove metrics of a version."""
    metrics: dict[str, float | None] = dict.fromkeys(remove or ())
    for key, value in _pairs(pairs).items():
        try:
            metrics[key] = float(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is no number") from None
    with open_registry(registry) as opened:
        version = opened.describe(reference, metrics=metrics)
    if as_json:
        print_json(version_json(version))
    else:
        shown = " ".join(f"{key}={value:.6g}" for key, value in sorted(version.metrics.items()))
        print(f"{version.name}@{version.number}: {shown}")


def delete(reference: Reference, registry: Location = None, as_json: AsJson = False) -> None:
    """Mark a version as deleted.

    It is not served, and `gc` removes its bytes. Refused while an alias points at it, and, until it
    was yanked, while a rollback goes to it. Number, digest, description and history stay;
    publishing the same files again restores it.
    """
    with open_registry(registry) as opened:
        version = opened.delete(reference)
    if as_json:
        print_json(version_json(version))
    else:
        print(f"{version.name}@{version.number} is deleted; `manylora registry gc` frees its bytes")


def collect_garbage(
    grace: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Remove only what is unneeded for that long, e.g. 30m, 24h or 7d.",
        ),
    ] = "24h",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Remove the bytes of deleted versions.

    What killed publications left behind goes too. Safe while others publish, serve and collect. A
    version stays while an alias, a lease or a version that was trained on from it needs it. What
    nobody needs is condemned by one run and removed by the first that comes a grace later; readers
    without a lease have that long.
    """
    from rich.console import Console

    waiting_time = _duration(grace)
    with open_registry(registry) as opened, Console(stderr=True).status("collecting"):
        report = opened.collect_garbage(grace=waiting_time, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "collected": report.collected,
                "kept": [{"path": each.path, "message": each.message} for each in report.kept],
                "waiting": report.waiting,
                "deleted": report.deleted,
                "freed": report.freed,
            }
        )
        return
    for version in report.collected:
        print(f"{version}: {'its bytes would go' if dry_run else 'its bytes are gone'}")
    for kept in report.kept:
        print(kept)
    would = "would be " if dry_run else ""
    print(
        f"{len(report.deleted)} blobs ({size_text(report.freed)}) {would}removed, "
        f"{report.waiting} wait out their grace"
    )


def events(
    since: Annotated[
        int, typer.Option(metavar="NUMBER", help="Only what came after this event.")
    ] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until interrupted.")
    ] = False,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Print what happened, one event a line, in order.

    With --json each is one object.
    """
    import itertools
    import json

    with open_registry(registry) as opened:
        if follow:
            found = opened.watch(since)
        else:
            pages = iter(lambda: opened.events(since), [])
            found = itertools.chain.from_iterable(pages)
        for event in found:
            since = event.sequence
            print(json.dumps(_event(event)) if as_json else _event_line(event), flush=True)


def print_move(move: "AliasMove", as_json: bool) -> None:
    """What an alias did."""
    if as_json:
        print_json(move_json(move))
        return
    before = "nothing" if move.previous is None else f"version {move.previous}"
    print(
        f"{move.name}@{move.alias}: {before} -> version {move.version} "
        f"(generation {move.generation})"
    )


def _event(event: "Event") -> dict[str, Any]:
    return {
        "sequence": event.sequence,
        "kind": event.kind,
        "name": event.name,
        "alias": event.alias,
        "version": event.version,
        "at": event.at.isoformat(),
    }


def _event_line(event: "Event") -> str:
    alias = "" if event.alias is None else event.alias
    return (
        f"{event.sequence}\t{time_text(event.at)}\t{event.kind}\t{event.name}@{event.version}"
        f"\t{alias}"
    ).rstrip()


def _pairs(pairs: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        found[key] = value
    return found


def _duration(text: str) -> "timedelta":
    from datetime import timedelta

    found = re.fullmatch(r"(\d{1,6})([smhd]?)", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time: give e.g. 30m, 24h or 7d")
    return timedelta(**{_UNITS[found[2] or "s"]: int(found[1])})


def _read_json(file: Path) -> dict[str, Any]:
    import json

    try:
        content: Any = json.loads(file.read_bytes())
        # Half a surrogate pair can be written as JSON, but is no text to print or to keep.
        json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{file} is no JSON object")
    return cast("dict[str, Any]", content)
