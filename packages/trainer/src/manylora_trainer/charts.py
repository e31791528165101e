"""Charts as numbers: where lines, dots and ticks of a picture lie. Templates draw them as SVG."""

# matplotlib is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
WIDTH, HEIGHT = 560.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 10.0, 12.0, 36.0
MOST_POINTS = 400
"""Longer lines are drawn by the means of as many stretches."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    shade: int
    """Which of the page's colours."""
    style: Literal["line", "dots"] = "line"


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """Lines over steps; every place in the picture's units."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    """Points in the picture's units."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> LineChart | None:
    """Lays out a chart; None where there is nothing to draw. What is not finite is left out."""
    finite = [
        Series(
            one.label,
            [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)],
            one.shade,
            one.style,
        )
        for one in series
    ]
    points = [point for one in finite for point in one.points]
    if not points:
        return None
    x_axis = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    placed = tuple(
        Series(
            one.label,
            [(x_axis.place(x), y_axis.place(y)) for x, y in _thinned(one.points)],
            one.shade,
            one.style,
        )
        for one in finite
        if one.points
    )
    return LineChart(title, x_label, placed, x_axis.ticks, y_axis.ticks)


@dataclass(frozen=True)
class ParallelAxis:
    """One setting, or the result, as an upright line."""

    label: str
    x: float
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class ParallelLine:
    """One trial across all axes."""

    label: str
    points: tuple[Point, ...]
    warmth: float
    """0 the worst, 1 the best of the trials."""
    best: bool


@dataclass(frozen=True)
class ParallelChart:
    """Parallel coordinates (Inselberg 1985): each trial one line over its settings."""

    axes: tuple[ParallelAxis, ...]
    lines: tuple[ParallelLine, ...]
    width: float
    height: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Coordinates:
    """The values of one axis, one for each trial."""

    label: str
    values: Sequence[float | str]
    """All numbers, or all names."""
    log: bool = False


PARALLEL_HEIGHT, PARALLEL_TOP, PARALLEL_BOTTOM = 340.0, 46.0, 316.0
AXIS_GAP = 170.0


def parallel_chart(
    trials: Sequence[str], coordinates: Sequence[Coordinates], best: str | None
) -> ParallelChart | None:
    """Lays out trials over their settings; the last axis is the result, and lower is better."""
    if not trials:
        return None
    axes: list[ParallelAxis] = []
    heights: list[list[float]] = []
    for number, one in enumerate(coordinates):
        x = 90.0 + AXIS_GAP * number
        placed, ticks = _upright(one)
        axes.append(ParallelAxis(one.label, x, ticks))
        heights.append(placed)
    span = PARALLEL_BOTTOM - PARALLEL_TOP
    lines = [
        ParallelLine(
            label,
            tuple((axis.x, column[row]) for axis, column in zip(axes, heights, strict=True)),
            (heights[-1][row] - PARALLEL_TOP) / span,
            label == best,
        )
        for row, label in enumerate(trials)
    ]
    # The best one is drawn last, over the others.
    lines.sort(key=lambda line: (line.best, line.warmth))
    width = 90.0 + AXIS_GAP * (len(axes) - 1) + 90.0
    return ParallelChart(
        tuple(axes), tuple(lines), width, PARALLEL_HEIGHT, PARALLEL_TOP, PARALLEL_BOTTOM
    )


def _upright(one: Coordinates) -> tuple[list[float], tuple[Tick, ...]]:
    """Heights of the values on an upright axis, and its ticks."""
    names = [value for value in one.values if isinstance(value, str)]
    if names:
        order = sorted(set(map(str, one.values)))
        step = (PARALLEL_BOTTOM - PARALLEL_TOP) / max(1, len(order) - 1)
        places = {name: PARALLEL_BOTTOM - step * place for place, name in enumerate(order)}
        ticks = tuple(Tick(places[name], name) for name in order)
        return [places[str(value)] for value in one.values], ticks
    numbers = [float(value) for value in one.values]
    axis = _Axis(numbers, PARALLEL_BOTTOM, PARALLEL_TOP, log=one.log)
    return [axis.place(number) for number in numbers], axis.ticks


class _Axis:
    """Maps values to places, and finds round numbers to mark."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, log: bool = False
    ) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        low, high = min(values), max(values)
        if low == high:
            margin = abs(low) / 2 or 0.5
            low, high = (low / 2, high * 2) if log else (low - margin, high + margin)
        self._log = log
        self._start, self._end = start, end
        self._low, self._high = self._scaled(low), self._scaled(high)
        whole = all(value == int(value) for value in values)
        locator = (
            LogLocator(subs=(1.0, 2.0, 5.0))
            if log
            else MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole)
        )
        # Rounding of the locator may step a hair over the ends.
        slack = 1e-9 * (self._high - self._low)
        self.ticks = tuple(
            Tick(self.place(value), f"{value:.6g}")
            for value in map(float, locator.tick_values(low, high))
            if (value > 0 or not log)
            and self._low - slack <= self._scaled(value) <= self._high + slack
        )

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 2)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    stretch = math.ceil(len(points) / MOST_POINTS)
    if stretch <= 1:
        return points
    parts = [points[at : at + stretch] for at in range(0, len(points), stretch)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]
