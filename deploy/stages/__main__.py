"""The scripts in `deploy/`: `python -m deploy.stages SCRIPT ARGUMENTS`.

Each imports what it needs when it runs, so that `--help` answers at once.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deploy.stages.work import Outcome, Work

StageName = Annotated[str, typer.Argument(metavar="STAGE", help="E.g. staging or production.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Reference = Annotated[
    str, typer.Argument(metavar="REF", help="NAME@NUMBER, NAME@ALIAS or NAME@sha256:HEX.")
]
Plan = Annotated[bool, typer.Option("--plan", help="Only say what would be done.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what came of it as JSON.")]
Actor = Annotated[
    str | None,
    typer.Option(metavar="WHO", help="Who does it, for the record; else USER@HOST."),
]
Why = Annotated[str, typer.Option(metavar="TEXT", help="The reason, for the record.")]


def up(
    stage: StageName,
    plan: Plan = False,
    actor: Actor = None,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Have the stage's gateway serve, apart from this terminal; nothing happens where it does."""
    from deploy.stages.running import bring_up
    from deploy.stages.settings import load_stage

    _show(bring_up(load_stage(stage), _work(actor, why, plan)), as_json)


def down(
    stage: StageName,
    plan: Plan = False,
    actor: Actor = None,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Drain the stage's gateway and wait for its end; nothing happens where there is none."""
    from deploy.stages.running import take_down
    from deploy.stages.settings import load_stage

    _show(take_down(load_stage(stage), _work(actor, why, plan)), as_json)


def status(
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="One stage; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what stages serve, what is under way on them, and whether they are well."""
    from deploy.stages import status as told
    from deploy.stages.settings import load_stage, stage_names
    from manylora_cli.output import print_json

    stages = [load_stage(name) for name in ([stage] if stage is not None else stage_names())]
    found = [told.status(one) for one in stages]
    if as_json:
        print_json(found)
    else:
        _print_status(found)


def candidate(
    reference: Reference,
    stage: Annotated[str, typer.Option(metavar="STAGE", help="Where to.")] = "staging",
    plan: Plan = False,
    actor: Actor = None,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Move the stage's alias to a version, after the cheap checks; its gateway swaps."""
    from deploy.stages.candidate import candidate as run
    from deploy.stages.settings import load_stage

    _show(run(load_stage(stage), reference, _work(actor, why, plan)), as_json)


def promote(
    name: AdapterName,
    source: Annotated[str, typer.Option("--from", metavar="STAGE", help="From.")] = "staging",
    target: Annotated[str, typer.Option("--to", metavar="STAGE", help="To.")] = "production",
    plan: Plan = False,
    actor: Actor = None,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Have a stage serve what another one serves: gates, approval, canary, then the alias.

    Run again, it goes on from where it was interrupted, by whatever.
    """
    from deploy.stages.promote import promote as run
    from deploy.stages.settings import load_stage

    work = _work(actor, why, plan)
    _show(run(name, load_stage(source), load_stage(target), work), as_json)


def rollback(
    name: AdapterName,
    stage: Annotated[str, typer.Option(metavar="STAGE", help="Where.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="REF", help="The version to go to; else the one before."),
    ] = None,
    plan: Plan = False,
    actor: Actor = None,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """End a promotion that is under way, else move the alias to the version before."""
    from deploy.stages.rollback import rollback as run
    from deploy.stages.settings import load_stage

    _show(run(load_stage(stage), name, to, _work(actor, why, plan)), as_json)


def approve(
    reference: Reference,
    stage: Annotated[str, typer.Option(metavar="STAGE", help="What it may enter.")] = "production",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take it back.")] = False,
    plan: Plan = False,
    actor: Actor = None,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Say that a version may enter a stage, where the stage asks for that."""
    from deploy.stages.approve import approve as run
    from deploy.stages.settings import load_stage

    work = _work(actor, why, plan)
    _show(run(load_stage(stage), reference, work, withdraw=withdraw), as_json)


def history(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One adapter; default: all.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="One stage; default: all.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="The newest so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what was done to stages, by whom, why and what came of it, oldest first."""
    from deploy.stages.history import print_history, records
    from manylora_cli.output import print_json

    found = records(name, stage, limit)
    if as_json:
        print_json([record for _, record in found])
    else:
        print_history(found)


SCRIPTS: dict[str, Callable[..., None]] = {
    "up": up,
    "down": down,
    "status": status,
    "candidate": candidate,
    "promote": promote,
    "rollback": rollback,
    "approve": approve,
    "history": history,
}


def main() -> None:
    """Runs a script; a stated failure is one line on stderr and exit status 1."""
    script, *arguments = sys.argv[1:] or [""]
    if script not in SCRIPTS:
        print(f"there is no script {script!r}: {', '.join(SCRIPTS)}", file=sys.stderr)
        sys.exit(2)
    app = typer.Typer(
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(_interruptible(SCRIPTS[script]))
    # Shells have what they start in a script's background ignore SIGINT; whoever sends it means it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As Ctrl-C, so that all are cleaned up after in one way.
    signal.signal(signal.SIGTERM, _as_interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        # A terminal that closes; under `nohup` it is nothing.
        signal.signal(signal.SIGHUP, _as_interrupt)
    from manylora_cli.main import is_stated, one_line

    def stated(error: Exception) -> bool:
        return is_stated(error) or type(error).__module__ == "deploy.stages.errors"

    with one_line(script, stated):
        app(arguments, prog_name=f"deploy/{script}", standalone_mode=True)


def _interruptible(script: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(script)
    def run(*arguments: object, **options: object) -> None:
        from deploy.stages.errors import SignalledError

        try:
            script(*arguments, **options)
        except KeyboardInterrupt:
            raise SignalledError("interrupted; run it again to go on") from None

    return run


def _as_interrupt(_number: int, _frame: object) -> None:
    signal.raise_signal(signal.SIGINT)


def _work(actor: str | None, why: str, plan: bool) -> "Work":
    from deploy.stages.work import Work
    from manylora_registry.aliases import this_user
    from manylora_registry.description import one_line

    # As the record will have it: approvals are held to who promotes by that.
    who = one_line(actor or "") or this_user()
    return Work(_say, who, why, plan)


def _say(line: str) -> None:
    try:
        print(f"· {line}", file=sys.stderr)
    except OSError:
        # A terminal that was closed, a `tee` that Ctrl-C has ended too: what is to be done about
        # the signal is not to fail on words that nobody hears.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _show(outcome: "Outcome", as_json: bool) -> None:
    from manylora_cli.output import print_json

    if as_json:
        print_json(dict(outcome.data))
    else:
        print(outcome.text)


def _print_status(found: list[dict[str, Any]]) -> None:
    from manylora_cli.output import print_table

    for stage in found:
        well = "healthy" if stage["healthy"] else "not healthy"
        at = f" at {stage['inference']}, {well}" if stage["inference"] else ""
        error = f": {stage['error']}" if stage["error"] else ""
        print(f"{stage['stage']}: {stage['state']}{at}{error}")
    rows = [
        (
            stage["stage"],
            f"{adapter['name']}@{stage['alias']}",
            str(adapter["version"]),
            _served(adapter),
            adapter["under_way"] or adapter["pending_error"],
        )
        for stage in found
        for adapter in stage["adapters"]
    ]
    if rows:
        print_table(("stage", "alias", "version", "served", "under way"), rows)


def _served(adapter: dict[str, Any]) -> str:
    shares = adapter["rollout"]
    if not shares:
        return "" if adapter["serving"] is None else str(adapter["serving"])
    return ", ".join(
        str(share["version"]) + (f" {share['percent']} %" if len(shares) > 1 else "")
        for share in shares
    )


if __name__ == "__main__":
    main()
