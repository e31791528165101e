"""What a run leaves on disk as it goes: its record, checkpoints, metrics and adapters."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.adapter_files import save_adapter
from manylora_trainer.cards import adapter_card
from manylora_trainer.checkpoint import Checkpoint, save_checkpoint
from manylora_trainer.environment import peak_memory_bytes
from manylora_trainer.metrics_file import MetricsFile, NoMetrics
from manylora_trainer.plots import plot_curves
from manylora_trainer.recipe import Recipe
from manylora_trainer.run_directory import RunDirectory, end_run, update_run
from manylora_trainer.trainee import Trainee
from manylora_trainer.trainees import StepReport


class RunWriter:
    """Writes a run that has begun; of several workers the first one's alone does anything."""

    def __init__(
        self,
        directory: RunDirectory,
        recipe: Recipe,
        base: BaseModelIdentity,
        trainees: Iterable[Trainee],
        metrics: MetricsFile | NoMetrics,
        *,
        writes: bool,
    ) -> None:
        self._directory = directory
        self._recipe = recipe
        self._base = base
        self._trainees = list(trainees)
        self._metrics = metrics
        self._writes = writes
        self._run = directory.read_run() or {}
        self._run["kind"] = recipe.kind
        self._progress = {trainee.name: trainee.progress for trainee in self._trainees}

    def went_on_from(self, digests: Mapping[str, str]) -> None:
        """Takes note of the adapters whose weights tasks have begun with."""
        for name, digest in digests.items():
            self._run["tasks"][name]["init_from"] = digest

    def start(self, metrics_bytes: int) -> None:
        """Keeps the metrics up to the checkpoint that the run goes on from."""
        self._metrics.cut(metrics_bytes)
        if self._writes:
            update_run(self._directory, self._run, self._progress)

    def step(self, done: int, trainee: Trainee, report: StepReport) -> None:
        """Writes what an adapter's step came to."""
        self._metrics.write(
            {
                "step": done,
                "task": trainee.name,
                "loss": report.loss,
                "tokens": report.tokens,
                "trained_tokens": report.trained_tokens,
                "computed_tokens": report.computed_tokens,
                "tokens_per_s": round(report.tokens_per_s, 1),
                "grad_norm": report.grad_norm,
                "lr": report.lr,
                **report.preference,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )

    def note(self, done: int, trainee: Trainee, **what: float | str) -> None:
        """Writes what else there is to say of an adapter after `done` steps."""
        self._metrics.write({"step": done, "task": trainee.name, **what})

    def checkpoint(self, done: int) -> None:
        """Writes all that a resume goes on from after `done` steps."""
        if not self._writes:
            return
        tensors = {name: tensor for t in self._trainees for name, tensor in t.state().items()}
        save_checkpoint(
            self._directory.checkpoints,
            Checkpoint(done, self._metrics.sync(), self._progress, tensors),
            self._recipe.training.keep_checkpoints,
        )
        update_run(self._directory, self._run, self._progress)

    def finished(self, trainee: Trainee) -> None:
        """Writes the weights of a task at its end."""
        trainee.progress.size_bytes = self._weights(self._directory.adapters, trainee)

    def stopped(self, trainee: Trainee) -> None:
        """Writes the last sound weights of a task that came to no end."""
        self._weights(self._directory.path / "stopped", trainee)

    def end(self) -> None:
        """Writes the curves, the run's page and that it has ended."""
        if self._writes:
            plot_curves(self._directory.metrics, self._directory.curves)
            end_run(self._directory, self._run, self._progress)

    def _weights(self, place: Path, trainee: Trainee) -> int:
        if not self._writes:
            return 0
        if trainee.whole is not None:
            return trainee.whole.save(place / trainee.name, self._recipe.base)
        return save_adapter(
            place / trainee.name,
            trainee.adapter.tensors(),
            trainee.task,
            trainee.targets,
            self._base.fingerprint,
            adapter_card(
                trainee.task,
                self._base.fingerprint,
                self._run["tasks"][trainee.name]["data_fingerprint"],
                trainee.progress.metrics,
            ),
        )
