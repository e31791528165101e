"""Runs side by side: results, curves laid over each other, and where their recipes differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora_trainer.charts import LineChart, Series, line_chart
from manylora_trainer.dotted import differing, dotted, written
from manylora_trainer.pages import write_page
from manylora_trainer.plots import plot_lines
from manylora_trainer.saved_runs import SavedRun, read_run

NOT_COMPARED = {"run_directory"}
"""Where a run goes decides nothing of what it trains."""
CURVES = (("loss", "training loss"), ("validation_loss", "validation loss"))


@dataclass(frozen=True)
class ResultRow:
    """One metric of one adapter over all runs."""

    adapter: str
    metric: str
    values: tuple[float | None, ...]
    """One for each run; None where it has none."""
    best: int | None
    """Which run has the lowest loss; None for what is no loss, or where all are equal."""


@dataclass(frozen=True)
class DifferenceRow:
    """One setting in which the recipes differ."""

    path: str
    values: tuple[str, ...]
    """One for each run; empty where it has none."""


@dataclass(frozen=True)
class Comparison:
    """Two or more runs."""

    labels: tuple[str, ...]
    """What each run is called here."""
    runs: tuple[SavedRun, ...]
    results: tuple[ResultRow, ...]
    differences: tuple[DifferenceRow, ...]

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "runs": [run.as_json() for run in self.runs],
            "results": [
                {"adapter": row.adapter, "metric": row.metric, "values": list(row.values)}
                for row in self.results
            ],
            "differences": {row.path: list(row.values) for row in self.differences},
        }


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads runs and sets them side by side.

    Raises:
        UnreadableRunError: one of the directories holds no run, or a damaged one.
    """
    runs = tuple(read_run(path) for path in paths)
    recipes = [_settings(run) for run in runs]
    flat = [dotted(recipe) for recipe in recipes]
    tasks = {name: task for recipe in recipes for name, task in recipe["tasks"].items()}
    # A task that a run does without differs in its name alone, not in each of its settings.
    filled = [
        {**recipe, "tasks": {n: recipe["tasks"].get(n, {**tasks[n], "name": None}) for n in tasks}}
        for recipe in recipes
    ]
    differences = tuple(
        DifferenceRow(path, tuple(_shown(entry.get(path)) for entry in flat))
        for path in differing(*filled)
    )
    return Comparison(_labels(paths), runs, tuple(_results(runs)), differences)


def write_comparison(comparison: Comparison, directory: Path) -> None:
    """Writes comparison.html and comparison.png into a directory, which is made if needed.

    Raises:
        UnreadableRunError: the metrics of a run are damaged.
    """
    series = {
        f"{adapter}: {title}": _series(comparison, adapter, key)
        for adapter in _adapters(comparison.runs)
        for key, title in CURVES
    }
    charts: list[LineChart] = []
    for title, lines in series.items():
        if (chart := line_chart(title, lines)) is not None:
            charts.append(chart)
    directory.mkdir(parents=True, exist_ok=True)
    write_page(directory / "comparison.html", "comparison", comparison=comparison, charts=charts)
    plot_lines(series, directory / "comparison.png")


def _settings(run: SavedRun) -> dict[str, Any]:
    """The recipe with its tasks by name, so that their order makes no difference."""
    kept = {key: value for key, value in run.recipe.items() if key not in NOT_COMPARED}
    return {**kept, "tasks": {task["name"]: task for task in run.recipe["tasks"]}}


def _adapters(runs: Sequence[SavedRun]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.tasks))


def _results(runs: Sequence[SavedRun]) -> Iterator[ResultRow]:
    for adapter in _adapters(runs):
        tasks = [run.tasks.get(adapter) for run in runs]
        found = [dict[str, float]() if task is None else task.metrics for task in tasks]
        for metric in dict.fromkeys(name for metrics in found for name in metrics):
            values = tuple(metrics.get(metric) for metrics in found)
            yield ResultRow(adapter, metric, values, _best(metric, values))
        steps = tuple(None if task is None else float(task.step) for task in tasks)
        yield ResultRow(adapter, "steps", steps, None)
    speeds = tuple(run.tokens_per_s for run in runs)
    yield ResultRow("all", "tokens/s", speeds, None)


def _best(metric: str, values: Sequence[float | None]) -> int | None:
    known = [value for value in values if value is not None]
    if not metric.endswith("loss") or len(set(known)) < 2:
        return None
    return values.index(min(known))


def _series(comparison: Comparison, adapter: str, key: str) -> list[Series]:
    return [
        Series(label, run.curve(adapter, key), number, "line" if key == "loss" else "dots")
        for number, (label, run) in enumerate(zip(comparison.labels, comparison.runs, strict=True))
        if adapter in run.tasks
    ]


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """The ends of the paths, as much of each as tells them all apart."""
    whole = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        ends = tuple("/".join(parts[-length:]) for parts in whole)
        if len(set(ends)) == len(ends):
            return ends
    return tuple(map(str, paths))


def _shown(value: Any) -> str:
    return "" if value is None else written(value)
