"""Pictures as PNG files: curves over steps, and trials in parallel coordinates."""

# matplotlib is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora_trainer.charts import Coordinates, Series, parallel_chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4
DOTS_PER_INCH = 130
LABEL = 40
"""Characters of a line's name."""


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draws training and validation loss of every task in `metrics` (JSONL) as a PNG."""
    entries: list[dict[str, Any]] = [
        json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()
    ]
    names = dict.fromkeys(entry["task"] for entry in entries)

    def curve(task: str, key: str) -> list[tuple[float, float]]:
        return [(e["step"], e[key]) for e in entries if e["task"] == task and key in e]

    series = {
        name: [
            Series("training", curve(name, "loss"), 0),
            Series("validation", curve(name, "validation_loss"), 1, "dots"),
        ]
        for name in names
    }
    plot_lines(series, picture)


def plot_lines(charts: Mapping[str, Sequence[Series]], picture: Path) -> None:
    """Draws charts beside each other, by their titles."""
    columns = max(1, min(COLUMNS, len(charts)))
    rows = max(1, math.ceil(len(charts) / columns))
    figure = _figure(4.2 * columns, 3.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, series) in zip(axes, charts.items(), strict=False):
        for one in series:
            style = {"marker": "o", "markersize": 4} if one.style == "dots" else {"linewidth": 1.2}
            if one.points:
                axis.plot(
                    *zip(*one.points, strict=True),
                    label=_short(one.label),
                    color=f"C{one.shade}",
                    **style,
                )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel("loss (nats a token)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize="small")
    for axis in axes[len(charts) :]:
        axis.set_visible(False)
    _save(figure, picture)


def plot_parallel(
    trials: Sequence[str], coordinates: Sequence[Coordinates], best: str | None, picture: Path
) -> None:
    """Draws trials in parallel coordinates, as the page of a sweep does."""
    chart = parallel_chart(trials, coordinates, best)
    if chart is None:
        return
    figure = _figure(chart.width / 80, chart.height / 80)
    axis = figure.subplots()
    axis.set(xlim=(0, chart.width), ylim=(chart.height, 0))
    axis.set_axis_off()
    for line in chart.lines:
        style: dict[str, Any] = (
            {"color": "#2b9a66", "linewidth": 2.6}
            if line.best
            else {"color": "#3d63dd", "linewidth": 1.0, "alpha": 0.15 + 0.7 * line.warmth}
        )
        axis.plot(*zip(*line.points, strict=True), **style)
    for upright in chart.axes:
        axis.plot([upright.x] * 2, [chart.top, chart.bottom], color="#9aa1ab", linewidth=1)
        axis.text(upright.x, 18, upright.label, ha="center", fontsize=8)
        for tick in upright.ticks:
            axis.text(upright.x - 6, tick.at, tick.label, ha="right", va="center", fontsize=7)
    _save(figure, picture)


def _short(label: str) -> str:
    # A longer one leaves the axes no room.
    return label if len(label) <= LABEL else f"…{label[1 - LABEL :]}"


def _figure(width: float, height: float) -> "Figure":
    # Not pyplot: it keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", picture: Path) -> None:
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=DOTS_PER_INCH)
