"""`manylora evaluate`: adapters beside the bare base on held-out rows."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora_cli.options import Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora_evaluator.results import EvaluationResult

INTERRUPTED = 130
"""Exit status after a SIGINT, as shells have it."""
PIPE_WIDTH = 10_000


def evaluate(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="The suite's YAML file.")],
    server: Server = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Score this adapter too, in every task run; repeatable."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="REF", help="Score this version too; exit 1 when an adapter is not its match."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run only this task of the suite; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write results.json and report.html here."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Ask only what an evaluation that was broken off left out of --out."
        ),
    ] = False,
    record: Annotated[
        bool,
        typer.Option("--record", help="Keep the results on the versions in the registry."),
    ] = False,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where --record keeps them, instead of MANYLORA_REGISTRY."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most rows of a task; default: the suite's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Score the bare base and adapters on held-out rows.

    Exits 1 when a request failed, after printing and writing the results of the others; when a
    threshold of the suite is not kept; and when an adapter is worse than the baseline or the rows
    are too few to tell.

    Token and TLS files come from MANYLORA_TOKEN, MANYLORA_TLS_CA, MANYLORA_TLS_CERT and
    MANYLORA_TLS_KEY.
    """
    from rich.console import Console

    if registry is not None and not record:
        raise typer.BadParameter("--registry is where --record keeps results")
    if record and limit is not None:
        raise typer.BadParameter("--record keeps what all rows of the suite say: leave out --limit")
    if resume and out is None:
        raise typer.BadParameter("--resume goes on with the answers in --out, which is not given")

    from manylora_evaluator.errors import (
        EvaluationFailedError,
        GateError,
        JudgeRefusesError,
        ReportError,
    )
    from manylora_evaluator.results import EvaluationResult
    from manylora_evaluator.run import evaluate as run
    from manylora_evaluator.table import summary

    def show(result: EvaluationResult, *, written: bool = True) -> None:
        if as_json:
            print(result.to_json())
        else:
            console = Console()
            if not console.is_terminal:
                # A pipe has no edge to cut figures off at, or to wrap reasons at.
                console.width = PIPE_WIDTH
            console.print(summary(result))
            if out is not None and written:
                print(f"report: {out / 'report.html'}")

    if record:
        _check_record(suite, registry, task or (), adapter or ())
    try:
        result = run(
            suite,
            server,
            adapter or (),
            out,
            tasks=task or (),
            limit=limit,
            baseline=baseline,
            resume=resume,
            console=Console(stderr=True),
        )
    except ReportError as error:
        show(error.result, written=False)
        raise
    except EvaluationFailedError as error:
        show(error.result)
        if out is None:
            raise
        go_on = "the same command with --resume asks what failed again"
        raise EvaluationFailedError(f"{error}; {go_on}", error.result) from error
    except JudgeRefusesError as error:
        if out is None:
            raise
        go_on = f"the answers to judge are kept in {out}: the same command with --resume goes on"
        raise JudgeRefusesError(f"{error}; {go_on}") from error
    except KeyboardInterrupt:
        kept = "no answers are kept without --out" if out is None else f"answers are kept in {out}"
        go_on = "" if out is None else "; the same command with --resume asks the others"
        print(f"manylora: interrupted: {kept}{go_on}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    show(result)
    if record:
        _record(result, registry)
    closed = [gate for gate in result.gates if not gate.passed]
    if closed:
        reasons = "; ".join(f"{gate.candidate}: {', '.join(gate.reasons)}" for gate in closed)
        raise GateError(f"the gate is closed to {reasons}", result)


def _check_record(
    file: Path, registry: str | None, chosen: "Sequence[str]", adapters: "Sequence[str]"
) -> None:
    """Sees that the results can be kept, before they are paid for.

    A gate goes by the record, so it is of every task that the suite has for an adapter.
    """
    from manylora_evaluator.records import record_name
    from manylora_evaluator.suite import load_suite
    from manylora_registry import Registry

    suite = load_suite(file)
    record_name(suite.name)
    left_out = [task for task in suite.tasks if chosen and task.name not in chosen]
    asked = [*adapters, *(task.adapter for task in suite.tasks if task not in left_out)]
    names = {reference.partition("@")[0] for reference in asked}
    if missed := [task.name for task in left_out if task.adapter.partition("@")[0] in names]:
        raise typer.BadParameter(
            "--record keeps what every task of the suite says of an adapter: add --task "
            + " --task ".join(missed)
        )
    Registry.open(registry, create=False).close()


def _record(result: "EvaluationResult", registry: str | None) -> None:
    from manylora_evaluator.records import record
    from manylora_registry import Registry

    with Registry.open(registry, create=False) as opened:
        record(result, opened)
