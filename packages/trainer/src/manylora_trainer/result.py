"""What a run has done so far, and what it gives back at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora_trainer.adapter_settings import EarlyStopping
from manylora_trainer.sampling import Cursor

RECENT_STEPS = 20
"""Steps over which the reported training loss is averaged."""


@dataclass
class TaskProgress:
    """How far one task has come; part of every checkpoint."""

    cursor: Cursor = field(default_factory=Cursor)
    recent_losses: list[float] = field(default_factory=list[float])
    """Of the last steps, oldest first."""
    validation_loss: float | None = None
    tokens: int = 0
    """Trained on so far, prompts included, padding and repetition not."""
    seconds: float = 0.0
    """Wall time of the steps, divided among the tasks by their tokens."""
    size_bytes: int | None = None
    """Of the saved weights; None until they are saved."""
    stopped: str | None = None
    """Why this adapter failed before its last step."""
    ended_early: str | None = None
    """Why it ended well before its last step."""
    best_validation_loss: float | None = None
    best_step: int | None = None
    validations_without_gain: int = 0

    def record(self, loss: float, tokens: int, seconds: float) -> None:
        """Counts one step."""
        self.recent_losses = [*self.recent_losses, loss][-RECENT_STEPS:]
        self.tokens += tokens
        self.seconds += seconds

    def validated(self, step: int, loss: float, settings: EarlyStopping | None) -> bool:
        """Takes note of a validation loss; True if these are the weights to keep."""
        self.validation_loss = loss
        if settings is None:
            return False
        best = self.best_validation_loss
        if best is None or loss < best - settings.min_delta:
            self.best_validation_loss, self.best_step = loss, step
            self.validations_without_gain = 0
            return True
        self.validations_without_gain += 1
        if self.validations_without_gain >= settings.patience:
            self.ended_early = (
                f"step {step}: no better validation loss than {best:.4f} of step {self.best_step}"
            )
        return False

    @property
    def metrics(self) -> dict[str, float]:
        """The losses known so far, by name."""
        metrics: dict[str, float] = {}
        if self.recent_losses:
            metrics["train_loss"] = sum(self.recent_losses) / len(self.recent_losses)
        if self.validation_loss is not None:
            metrics["validation_loss"] = self.validation_loss
        return metrics


@dataclass(frozen=True)
class TaskResult:
    """What became of one task."""

    adapter: Path | None
    """PEFT-format directory; None when the adapter stopped early."""
    metrics: Mapping[str, float]
    """`train_loss` (mean of the last steps) and `validation_loss`, in nats a token."""
    tokens: int
    seconds: float
    stopped: str | None
    """Why it failed before its last step."""
    ended_early: str | None
    """Why it ended well before its last step."""
    overlong_dropped: int
    """Examples left out because they are longer than `max_length`, in every epoch anew."""
    overlong_truncated: int
    """Examples cut to `max_length`, in every epoch anew."""
    rows_skipped: int
    """Malformed rows passed over, of those looked through at the start."""


@dataclass(frozen=True)
class RunResult:
    """What a run made."""

    run_directory: Path
    tasks: Mapping[str, TaskResult]
    seconds: float
    """Wall time of the training steps."""
    tokens_per_s: float

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "run_directory": str(self.run_directory),
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "tasks": {
                name: {
                    "adapter": None if task.adapter is None else str(task.adapter),
                    "metrics": dict(task.metrics),
                    "tokens": task.tokens,
                    "seconds": round(task.seconds, 3),
                    "stopped": task.stopped,
                    "ended_early": task.ended_early,
                    "overlong_dropped": task.overlong_dropped,
                    "overlong_truncated": task.overlong_truncated,
                    "rows_skipped": task.rows_skipped,
                }
                for name, task in self.tasks.items()
            },
        }
