"""One adapter of a run in training: its rows, its weights and how far it has come."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from manylora_trainer.adapter import Adapter
from manylora_trainer.base_model import BaseModel
from manylora_trainer.dataset import TaskData
from manylora_trainer.dropout import step_key
from manylora_trainer.formats import Rendered
from manylora_trainer.full import BaseWeights
from manylora_trainer.initialisation import start_from_data, start_from_weights
from manylora_trainer.optimizer import make_optimizer
from manylora_trainer.packing import Batch
from manylora_trainer.recipe import Task
from manylora_trainer.result import TaskProgress
from manylora_trainer.sampling import ExampleStream
from manylora_trainer.targets import Shapes

INITIAL_BATCHES = 4
"""A task's first batches, from which EVA takes the directions of its inputs."""


class Trainee:
    """One task on its way: its data, its adapter, its optimiser and how far it has come."""

    def __init__(
        self,
        task: Task,
        data: TaskData[Rendered, Any],
        targets: Shapes,
        *,
        seed: int,
        device: torch.device,
        whole: BaseWeights | None = None,
    ) -> None:
        """Sets the task up as at its start. Nothing in it depends on the other tasks.

        With `whole`, these weights of the base are trained and no adapter.
        """
        digest = hashlib.sha256(f"{seed}/{task.seed_name}/weights".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        self._seed = seed
        self.task = task
        self.data = data
        self.targets = targets
        self.progress = TaskProgress()
        self.whole = whole
        self.adapter = Adapter(targets if whole is None else {}, task.lora, generator, device)
        # What learns, flat: all the rest of a trainee handles either alike.
        self._weights, self.gradients = (
            (self.adapter.weights, self.adapter.gradients)
            if whole is None
            else (whole.weights, whole.gradients)
        )
        self.optimizer = make_optimizer(task.optimizer, self._weights, self.adapter.up_from)
        self.reference: Adapter | None = None
        """Frozen, for preferences: the adapter that the task went on from; None: the bare base."""
        if task.kind == "dpo" and task.lora.init_from is not None:
            self.reference = Adapter(targets, task.lora, generator, device)
        self._best = self._weights.clone() if task.early_stopping else None
        self._sound = self._weights.clone()
        self.stream = ExampleStream(task, data, seed=seed)

    @property
    def name(self) -> str:
        """Of the task and its adapter."""
        return self.task.name

    def trains_at(self, step: int) -> bool:
        """Whether it takes part in step `step`, counted from 0."""
        progress = self.progress
        return not (progress.stopped or progress.ended_early) and step < self.data.steps

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and optimiser state; the live tensors, by name."""
        kept: dict[str, torch.Tensor] = {}
        if self._best is not None:
            kept[f"{self.name}/best"] = self._best
        if self.reference is not None:
            kept[f"{self.name}/reference"] = self.reference.weights
        if self.adapter.origin is not None:
            kept[f"{self.name}/origin"] = self.adapter.origin
        return {
            **kept,
            f"{self.name}/weights": self._weights,
            f"{self.name}/sound": self._sound,
            **{f"{self.name}/{name}": kept for name, kept in self.optimizer.state.items()},
        }

    def go_on_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the weights of an adapter of the same shape, by their PEFT names."""
        own = self.adapter.tensors()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self._sound.copy_(self._weights)
        if self.reference is not None:
            self.reference.weights.copy_(self.adapter.weights)

    def start(self, base: BaseModel) -> None:
        """Initialises fresh weights as the task says, beyond what chance made of them."""
        match self.task.lora.init_weights:
            case "kaiming":
                return
            case "pissa":
                start_from_weights(self.adapter, base, self._seed)
            case "eva":
                stream = ExampleStream(self.task, self.data, seed=self._seed)
                count = min(INITIAL_BATCHES, self.data.steps)
                batches = [Batch.of(0, stream.next_batch()) for _ in range(count)]
                start_from_data(self.adapter, base, batches, self._seed)
        self._sound.copy_(self._weights)

    def restore(self, progress: TaskProgress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up where a checkpoint left it."""
        self.progress = progress
        self.stream.move_to(progress.cursor)
        # A checkpoint of before they were kept has no sound weights but its own.
        kept = {f"{self.name}/sound": tensors[f"{self.name}/weights"], **tensors}
        for name, tensor in self.state().items():
            tensor.copy_(kept[name])

    def apply_gradient(self, step: int, loss: float, norm: float) -> float | None:
        """Applies the gradient of step `step`, if it is finite; gives the rate.

        What is not finite is not applied, and stops the adapter: the rate is None then.
        """
        gradients = self.gradients
        rate = None
        if math.isfinite(loss) and math.isfinite(norm):
            self._sound.copy_(self._weights)
            rate = self.optimizer.step(gradients, norm, step, self.data.steps)
        else:
            self.progress.stopped = f"step {step + 1}: loss {loss}, gradient norm {norm}"
        gradients.zero_()
        return rate

    def validated(self, step: int, loss: float) -> None:
        """Takes note of the validation loss after `step` steps, and keeps the best weights."""
        if not math.isfinite(loss):
            self.progress.stopped = f"step {step}: validation loss {loss}"
        elif (
            self.progress.validated(step, loss, self.task.early_stopping) and self._best is not None
        ):
            self._best.copy_(self._weights)

    def settle(self) -> None:
        """At its end: goes back to its best weights, where these are kept."""
        if self._best is not None and self.progress.best_step is not None:
            self._weights.copy_(self._best)
            self.progress.validation_loss = self.progress.best_validation_loss

    def retreat(self) -> None:
        """When it has stopped: goes back to the last weights that gave a finite loss."""
        self._weights.copy_(self._sound)

    def dropout_key(self, step: int) -> int:
        """What all of its dropout in a step follows from."""
        return step_key(self._seed, self.task.seed_name, step)

    def next_batch(self, index: int) -> Batch:
        """The examples of its next step, for the adapter number `index` of the run."""
        return Batch.of(index, self.stream.next_batch())
