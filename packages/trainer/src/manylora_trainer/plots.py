"""The curves of a run as a picture."""

# matplotlib is only partly typed.
# pyright: reportUnknownMemberType=false

import json
from pathlib import Path
from typing import Any


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draws training and validation loss of every task in `metrics` (JSONL) as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries: list[dict[str, Any]] = [
        json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()
    ]
    names = list(dict.fromkeys(entry["task"] for entry in entries))
    # Not pyplot: it keeps global state and looks for a display.
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        for key, label, style in (
            ("loss", "training", {"linewidth": 1.2}),
            ("validation_loss", "validation", {"marker": "o", "markersize": 4}),
        ):
            points = [(e["step"], e[key]) for e in entries if e["task"] == name and key in e]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_ylabel("loss (nats a token)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=130)
