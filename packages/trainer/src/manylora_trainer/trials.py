"""The trials of a sweep and what came of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from manylora_trainer.sweep_settings import Settings


@dataclass(frozen=True)
class Trial:
    """One set of settings and what came of it."""

    number: int
    run: int
    """Which of the sweep's runs trains it."""
    settings: Settings
    state: Literal["running", "finished", "stopped", "invalid"] = "running"
    loss: float | None = None
    """Validation loss at its end, or where it stopped."""
    step: int = 0
    """Steps behind it."""
    rungs: Mapping[int, float] = field(default_factory=dict[int, float])
    """Loss at the steps where trials are compared."""
    why: str | None = None
    """Why it stopped, or why its settings cannot be trained."""
    data: str | None = None
    """Fingerprint of the rows it was trained and measured on."""

    @property
    def name(self) -> str:
        """Of its task in the run."""
        return f"trial-{self.number:03d}"


@dataclass(frozen=True)
class SweepResult:
    """All trials so far, in their order."""

    directory: Path
    task: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The finished trial with the lowest loss; None where none has finished."""
        finished = [trial for trial in self.trials if trial.state == "finished"]
        return min(finished, key=_by_loss, default=None)

    @property
    def ranked(self) -> list[Trial]:
        """Finished ones by loss, then those that came farthest."""
        finished = sorted((t for t in self.trials if t.state == "finished"), key=_by_loss)
        others = [trial for trial in self.trials if trial.state != "finished"]
        return finished + sorted(others, key=lambda t: (-t.step, _by_loss(t)))

    def run_directory(self, trial: Trial) -> Path:
        """The run that trains a trial."""
        return run_directory(self.directory, trial.run)

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        best = self.best
        return {
            "sweep_directory": str(self.directory),
            "task": self.task,
            "best": None if best is None else {**asdict(best), "name": best.name},
            "trials": [{**asdict(trial), "name": trial.name} for trial in self.trials],
        }


def run_directory(sweep_directory: Path, number: int) -> Path:
    """The directory of one run of a sweep."""
    return sweep_directory / "runs" / f"{number:03d}"


def _by_loss(trial: Trial) -> tuple[float, int]:
    return (float("inf") if trial.loss is None else trial.loss, trial.number)
