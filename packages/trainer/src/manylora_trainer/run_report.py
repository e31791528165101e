"""The page of one run: result, curves of every adapter, held-out rows, settings, machine."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from manylora_trainer.charts import LineChart, Series, line_chart
from manylora_trainer.dotted import dotted
from manylora_trainer.errors import UnreadableRunError
from manylora_trainer.pages import write_page
from manylora_trainer.saved_runs import SavedRun

SHOWN_ROWS = 8
"""Held-out rows of each adapter on the page."""


def write_run_report(run: SavedRun, page: Path) -> None:
    """Writes the page of a run, finished or not.

    Raises:
        UnreadableRunError: its metrics or held-out rows are damaged.
    """
    metric_names = dict.fromkeys(name for task in run.tasks.values() for name in task.metrics)
    write_page(
        page,
        "run",
        run=run,
        metric_names=list(metric_names),
        curves={name: _charts(run, name) for name in run.tasks},
        samples={name: _samples(run.path / "held_out" / f"{name}.jsonl") for name in run.tasks},
        settings=dotted(run.recipe),
    )


def _charts(run: SavedRun, name: str) -> list[LineChart]:
    def curve(label: str, key: str, shade: int = 0) -> Series:
        return Series(label, run.curve(name, key), shade)

    measured = Series("validation", run.curve(name, "validation_loss"), 1, "dots")
    charts = [
        line_chart("loss", [curve("training", "loss"), measured]),
        line_chart("learning rate", [curve("learning rate", "lr")]),
        line_chart("gradient norm", [curve("gradient norm", "grad_norm")]),
        line_chart("tokens/s, all adapters together", [curve("tokens/s", "tokens_per_s")]),
    ]
    return [chart for chart in charts if chart is not None]


def _samples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, SHOWN_ROWS)]
        _ = [row["expected"] for row in rows]
        _ = [(m["role"], m["content"]) for row in rows for m in row["messages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableRunError(f"{path} cannot be read: {error}") from error
    return rows
