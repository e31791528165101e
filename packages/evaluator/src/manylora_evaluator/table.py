"""The scores of an evaluation as a terminal table."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from manylora_evaluator.results import Column, EvaluationResult, Score


def summary(result: EvaluationResult) -> Group:
    """The table, and below it what the gates and the judges have to say."""
    return Group(table(result), *_gates(result), *_judges(result))


def _gates(result: EvaluationResult) -> Iterator[Text]:
    for gate in result.gates:
        word, colour = ("open", "green") if gate.passed else ("closed", "red")
        yield Text.assemble(("gate ", "bold"), gate.candidate, ": ", (word, f"bold {colour}"))
        compared = gate.comparison.scores if gate.comparison else ()
        told = [entry.reason for entry in compared]
        for reason in [*told, *(reason for reason in gate.reasons if reason not in told)]:
            yield Text(f"  {reason}")


def _judges(result: EvaluationResult) -> Iterator[Text]:
    for judge in result.judges:
        yield Text.assemble(
            ("judge ", "bold"),
            f"{judge.judge}: {judge.requests} asked, {judge.cached} cached, "
            f"{judge.unreadable} unreadable, {judge.failures} unanswered, "
            f"{judge.prompt_tokens + judge.completion_tokens} tokens, cost {judge.cost:.4f}",
        )
    for task in result.tasks:
        for entry in task.agreements:
            kappa = "undefined" if entry.kappa is None else f"{entry.kappa:.2f}"
            yield Text(
                f"  {task.task}: {entry.criterion} agrees with {entry.beside} on "
                f"{entry.accuracy:.0%} of {entry.answers} answers, kappa {kappa}"
            )


def table(result: EvaluationResult) -> Table:
    """One line for each adapter and score of each task, beside the bare base or the baseline.

    Scores are percentages with their 95 % confidence intervals in brackets.
    """
    # A suite has a task, and all of them are told beside the same.
    beside = escape(result.tasks[0].beside.label)
    shown = Table(
        title=f"{escape(result.suite)}: adapters beside {beside}",
        caption=_caption(result),
        title_style="bold",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    # Of what is too wide the names give way, never a figure.
    shown.add_column("task and score", overflow="fold")
    shown.add_column(beside, justify="right", no_wrap=True)
    shown.add_column("adapter", justify="right", no_wrap=True)
    shown.add_column("gain", justify="right", no_wrap=True)
    for task in result.tasks:
        shown.add_row(f"[bold]{escape(task.task)}[/], {len(task.rows)} rows")
        for column in task.columns[1:]:
            shown.add_row(f"  {escape(column.label)}")
            for name, score in column.scores.items():
                base = task.beside.scores[name]
                shown.add_row(
                    f"    {escape(name)}",
                    _interval(base),
                    f"[bold]{_interval(score)}[/]",
                    _gain(score.mean - base.mean),
                )
    return shown


def _caption(result: EvaluationResult) -> str:
    columns: list[Column] = [column for task in result.tasks for column in task.columns]
    tokens = sum(column.completion_tokens for column in columns)
    failed = f", [bold red]{result.failures} failed[/]" if result.failures else ""
    return (
        f"held-out rows; percent, with 95 % confidence intervals\n"
        f"{result.requests} requests{failed}, {tokens} tokens in {result.seconds:.0f} s"
    )


def _interval(score: Score) -> str:
    return f"{100 * score.mean:.1f} [dim]({100 * score.low:.0f} to {100 * score.high:.0f})[/]"


def _gain(difference: float) -> str:
    colour = "green" if difference > 0 else "red" if difference < 0 else "dim"
    return f"[{colour}]{100 * difference:+.1f}[/]"
