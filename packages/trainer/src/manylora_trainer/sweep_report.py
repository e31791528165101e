"""What a sweep found, as a page and as a picture."""

from collections.abc import Sequence

from manylora_trainer.charts import Coordinates, LineChart, Series, line_chart, parallel_chart
from manylora_trainer.dotted import rounded
from manylora_trainer.pages import write_page
from manylora_trainer.plots import plot_parallel
from manylora_trainer.saved_runs import read_run
from manylora_trainer.sweep_settings import Range, Sweep
from manylora_trainer.trials import SweepResult, Trial

REPORT_FILE = "report.html"


def write_sweep_report(result: SweepResult, sweep: Sweep) -> None:
    """Writes report.html and plots/parallel.png into the sweep's directory.

    Raises:
        UnreadableRunError: a run of the sweep is damaged.
    """
    measured = [trial for trial in result.ranked if trial.loss is not None]
    names = [trial.name for trial in measured]
    best = None if result.best is None else result.best.name
    coordinates = _coordinates(measured, sweep)
    write_page(
        result.directory / REPORT_FILE,
        "sweep",
        result=result,
        sweep=sweep,
        paths={path: path.split(".", 2)[2] for path in sweep.space},
        parallel=parallel_chart(names, coordinates, best),
        losses=_losses(result),
    )
    plot_parallel(names, coordinates, best, result.directory / "plots" / "parallel.png")


def _coordinates(trials: Sequence[Trial], sweep: Sweep) -> list[Coordinates]:
    settings: list[Coordinates] = []
    for path, space in sweep.space.items():
        values = [trial.settings[path] for trial in trials]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        log = isinstance(space, Range) and space.log
        shown = values if numbers else [rounded(value) for value in values]
        settings.append(Coordinates(path.split(".", 2)[2], shown, log))
    return [*settings, Coordinates("validation loss", [trial.loss or 0.0 for trial in trials])]


def _losses(result: SweepResult) -> LineChart | None:
    series: list[Series] = []
    for number, trial in enumerate(result.ranked):
        if trial.state in ("finished", "stopped"):
            run = read_run(result.run_directory(trial))
            series.append(
                Series(trial.name, run.curve(trial.name, "validation_loss"), number, "dots")
            )
    return line_chart("validation loss, best trial first", series)
