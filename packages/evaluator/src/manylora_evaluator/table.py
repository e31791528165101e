"""The scores of an evaluation as a terminal table."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from manylora_evaluator.results import Column, EvaluationResult, Score


def table(result: EvaluationResult) -> Table:
    """One line for each adapter and score of each task, beside the bare base.

    Scores are percentages with their 95 % confidence intervals in brackets.
    """
    shown = Table(
        title=f"{result.suite}: base beside adapters",
        caption=_caption(result),
        title_style="bold",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    shown.add_column("task and score", no_wrap=True)
    shown.add_column("answered by")
    shown.add_column("bare base", justify="right", no_wrap=True)
    shown.add_column("adapter", justify="right", no_wrap=True)
    shown.add_column("gain", justify="right", no_wrap=True)
    for task in result.tasks:
        shown.add_row(f"[bold]{task.task}[/], {len(task.rows)} rows")
        for column in task.columns[1:]:
            for name, score in column.scores.items():
                base = task.base.scores[name]
                shown.add_row(
                    f"  {name}",
                    column.label,
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
        f"held-out rows; percent, with 95 % bootstrap intervals\n"
        f"{result.requests} requests{failed}, {tokens} tokens in {result.seconds:.0f} s"
    )


def _interval(score: Score) -> str:
    return f"{100 * score.mean:.1f} [dim]({100 * score.low:.0f} to {100 * score.high:.0f})[/]"


def _gain(difference: float) -> str:
    colour = "green" if difference > 0 else "red" if difference < 0 else "dim"
    return f"[{colour}]{100 * difference:+.1f}[/]"
