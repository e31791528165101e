"""One self-contained HTML page of an evaluation: one script, nothing loaded from elsewhere."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from manylora_evaluator.errors import ReportError
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
SHOWN_CHARACTERS = 6_000
"""Of one text."""
CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""Unicode's pictures of them, where it has any."""


def write_report(result: EvaluationResult, directory: Path) -> None:
    """Writes results.json and report.html into `directory`, which is made if needed.

    Raises:
        ReportError: it cannot be written; what was there is left whole.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / "results.json", result.to_json())
        _replace(directory / "report.html", render(result))
    except OSError as error:
        raise ReportError(
            f"the report cannot be written into {directory}: {error.strerror}", result
        ) from error


def _replace(path: Path, text: str) -> None:
    """Writes `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render(result: EvaluationResult) -> str:
    """The page as HTML. What models wrote is escaped: it may well be HTML itself."""
    environment = Environment(
        loader=PackageLoader("manylora_evaluator"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("report.js").render()
    baselines = [_baseline(result, task) for task in result.tasks]
    return environment.get_template("report.html.jinja").render(
        result=result,
        script=Markup(script),  # noqa: S704 - a file of ours
        script_hash=_hash(script),
        charts=[(task, chart(task)) for task in result.tasks],
        side_by_side=[
            (task, baseline, _shown(task, baseline))
            for task, baseline in zip(result.tasks, baselines, strict=True)
        ],
        slices=sorted(
            {name for task in result.tasks for row in task.rows for name in slice_names(row)}
        ),
        percent=percent,
        verdict=verdict,
        adapters_right=adapters_right,
        change=change,
        slice_names=slice_names,
        cut=cut,
    )


def _hash(script: str) -> str:
    """By which the page's policy knows the script, as CSP writes it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _baseline(result: EvaluationResult, task: TaskResult) -> int:
    """The column that better and worse are told beside: the gate's baseline, else the bare base."""
    named = {gate.comparison.baseline for gate in result.gates if gate.comparison}
    places = (index for index, column in enumerate(task.columns) if column.adapter in named)
    return next(places, 0)


def _shown(task: TaskResult, baseline: int) -> list[tuple[int, RowResult]]:
    """The rows on the page with their numbers, in order; worse ones are the last to be left out."""
    numbered = list(enumerate(task.rows, start=1))
    kept = sorted(numbered, key=lambda entry: change(task, entry[1], baseline) != "worse")
    return sorted(kept[:SHOWN_ROWS], key=lambda entry: entry[0])


def change(task: TaskResult, row: RowResult, baseline: int) -> str:
    """`worse` if some adapter is worse on `row` than the baseline, else `better` or `same`."""
    score = task.compare[0]
    before = row.outputs[baseline].scores[score] or 0.0
    others = (output for index, output in enumerate(row.outputs) if index not in (0, baseline))
    moves = [(output.scores[score] or 0.0) - before for output in others]
    if any(move < 0 for move in moves):
        return "worse"
    return "better" if any(move > 0 for move in moves) else "same"


def slice_names(row: RowResult) -> list[str]:
    """The slices `row` belongs to, e.g. `language: en`."""
    return [f"{column}: {' '.join(cut(value).split())}" for column, value in row.slices.items()]


def cut(text: str) -> str:
    """As much of `text` as the page shows, with signs for the controls that no page may hold."""
    text = text.translate(CONTROLS)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} [cut]"


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
    """Whether every adapter is right on `row`; what they are told beside may be wrong."""
    return all(verdict(output) == "right" for output in row.outputs[1:])


@dataclass(frozen=True)
class Bar:
    """One column's score in a chart; lengths in the chart's units."""

    label: str
    shade: int
    """0: what adapters are told beside; they count from 1."""
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
    # Parts of a score, named SCORE.PART, are in the table alone.
    names = [name for name in task.beside.scores if "." not in name or name in task.compare]
    for name in names:
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
