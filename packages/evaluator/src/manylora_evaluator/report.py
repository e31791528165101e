"""One self-contained HTML page of an evaluation: no script, nothing loaded from elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from manylora_evaluator.results import (
    Column,
    EvaluationResult,
    Output,
    RowResult,
    Score,
    TaskResult,
)

SHOWN_ROWS = 200
"""Rows of a task shown side by side; results.json has them all."""


def write_report(result: EvaluationResult, directory: Path) -> None:
    """Writes results.json and report.html into `directory`, which is made if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(result.to_json(), encoding="utf-8")
    (directory / "report.html").write_text(render(result), encoding="utf-8")


def render(result: EvaluationResult) -> str:
    """The page as HTML. What models wrote is escaped: it may well be HTML itself."""
    environment = Environment(
        loader=PackageLoader("manylora_evaluator"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        result=result,
        charts=[(task, chart(task)) for task in result.tasks],
        shown_rows=SHOWN_ROWS,
        percent=percent,
        verdict=verdict,
        adapters_right=adapters_right,
    )


def percent(share: float) -> str:
    """`share` of 1 in percent."""
    return f"{100 * share:.1f} %"


def verdict(output: Output) -> str:
    """`right`, `partly` or `wrong`: how one output fared over all its scores."""
    weighed = [score for score in output.scores.values() if score is not None]
    if all(score == 1 for score in weighed):
        return "right"
    return "wrong" if all(score == 0 for score in weighed) else "partly"


def adapters_right(row: RowResult) -> bool:
    """Whether every adapter is right on `row`; the bare base may be wrong."""
    return all(verdict(output) == "right" for output in row.outputs[1:])


@dataclass(frozen=True)
class Bar:
    """One column's score in a chart; lengths in the chart's units."""

    label: str
    shade: int
    """0: the bare base; adapters count from 1."""
    y: float
    length: float
    low: float
    """Ends of the confidence interval."""
    high: float
    score: Score


@dataclass(frozen=True)
class Group:
    """The bars of one score."""

    name: str
    y: float
    """Of the heading's baseline."""
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Chart:
    """Horizontal bars of one task's scores, grouped by score."""

    left: float
    """Where the bars begin."""
    width: float
    """Length of a bar at 100 %."""
    height: float
    groups: tuple[Group, ...]


LEFT, WIDTH, BAR, HEADING, GAP = 150.0, 300.0, 26.0, 26.0, 12.0


def chart(task: TaskResult) -> Chart:
    """Lays out the chart of `task`."""
    groups: list[Group] = []
    y = 0.0
    for name in task.base.scores:
        top = y + HEADING
        groups.append(Group(name, y + HEADING - 8, tuple(_bars(task.columns, name, top))))
        y = top + BAR * len(task.columns) + GAP
    return Chart(LEFT, WIDTH, y, tuple(groups))


def _bars(columns: Sequence[Column], name: str, top: float) -> Iterator[Bar]:
    for index, column in enumerate(columns):
        score = column.scores[name]
        yield Bar(
            label=column.label,
            shade=index,
            y=top + BAR * index,
            length=WIDTH * score.mean,
            low=LEFT + WIDTH * score.low,
            high=LEFT + WIDTH * score.high,
            score=score,
        )
