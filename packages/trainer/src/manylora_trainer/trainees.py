"""Every adapter of a run in training: one forward and backward of the base moves them all."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from manylora_trainer.base_model import BaseModel
from manylora_trainer.dataset import TaskData
from manylora_trainer.lora import Adapter, Routing, attach
from manylora_trainer.optimizer import AdamW
from manylora_trainer.packing import Batch, Pack, pack_batches
from manylora_trainer.recipe import Task
from manylora_trainer.result import TaskProgress
from manylora_trainer.sampling import Sampler
from manylora_trainer.targets import Shapes
from manylora_trainer.workers import Workers, own_share


@dataclass(frozen=True)
class StepReport:
    """What one step did to one adapter."""

    loss: float
    """Mean cross-entropy of its completion tokens, in nats."""
    tokens: int
    """Tokens of its examples."""
    tokens_per_s: float
    """Of the whole step, all adapters together."""
    grad_norm: float
    """L2 norm before clipping."""
    lr: float | None
    """None when the step was not applied, because something was not finite."""


class Trainee:
    """One task on its way: its data, its adapter, its optimiser and how far it has come."""

    def __init__(
        self, task: Task, data: TaskData, targets: Shapes, *, seed: int, device: torch.device
    ) -> None:
        """Sets the task up as at its start. Nothing in it depends on the other tasks."""
        digest = hashlib.sha256(f"{seed}/{task.name}/weights".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        self.task = task
        self.data = data
        self.targets = targets
        self.progress = TaskProgress()
        self.adapter = Adapter(targets, task.lora.rank, task.lora.alpha, generator, device)
        self.optimizer = AdamW(task.optimizer, self.adapter.weights)
        self.sampler = Sampler(len(data.train), task.batch_size, seed=seed, task=task.name)

    @property
    def name(self) -> str:
        """Of the task and its adapter."""
        return self.task.name

    def trains_at(self, step: int) -> bool:
        """Whether it takes part in step `step`, counted from 0."""
        return self.progress.stopped is None and step < self.task.steps

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and optimiser state; the live tensors, by name."""
        return {
            f"{self.name}/weights": self.adapter.weights,
            f"{self.name}/mean": self.optimizer.mean,
            f"{self.name}/square": self.optimizer.square,
        }

    def go_on_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the weights of an adapter of the same shape, by their PEFT names."""
        own = self.adapter.tensors()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def restore(self, progress: TaskProgress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up where a checkpoint left it."""
        self.progress = progress
        self.sampler.move_to(progress.cursor)
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

    def next_batch(self, index: int) -> Batch:
        """The examples of its next step, for the adapter number `index` of the run."""
        batch = Batch(index, [self.data.train[i] for i in self.sampler.next_batch()])
        self.progress.cursor = self.sampler.cursor
        return batch


class Trainees:
    """All adapters of a run, attached to one base."""

    def __init__(
        self, base: BaseModel, trainees: Sequence[Trainee], pack_tokens: int, workers: Workers
    ) -> None:
        self._base = base
        self._workers = workers
        self._trainees = trainees
        self._pack_tokens = pack_tokens
        self._routing = Routing(base.device)
        attach(base.model, [trainee.adapter for trainee in trainees], self._routing)
        workers.share(base.decoder)

    def __iter__(self) -> Iterator[Trainee]:
        return iter(self._trainees)

    def train_step(self, step: int) -> dict[str, StepReport]:
        """Step `step`, counted from 0, of every adapter that takes part in it.

        An adapter whose loss or gradient is not finite is left as it was and marked as stopped.
        """
        started = time.perf_counter()
        batches = [
            trainee.next_batch(index)
            for index, trainee in enumerate(self._trainees)
            if trainee.trains_at(step)
        ]
        # Every adapter's loss is the mean over its own completion tokens of the whole step, so
        # neither the packing nor the other adapters weigh in.
        trained = torch.ones(len(self._trainees))
        for batch in batches:
            trained[batch.adapter] = batch.trained_tokens
        weights = (1.0 / trained).to(self._base.device)
        sums = torch.zeros_like(weights)
        for pack, counts in self._own_packs(batches):
            with self._routing.through(pack.ranges):
                losses = self._base.losses(pack, weights * counts)
                losses.total.backward()
            sums.add_(losses.sums * counts)
        self._workers.add_up(
            sums, *(self._trainees[batch.adapter].adapter.gradients for batch in batches)
        )
        means = cast("list[float]", (sums * weights).tolist())
        applied = [self._apply(step, batch.adapter, means[batch.adapter]) for batch in batches]
        seconds = time.perf_counter() - started
        total = sum(batch.tokens for batch in batches)
        reports: dict[str, StepReport] = {}
        for batch, (norm, rate) in zip(batches, applied, strict=True):
            trainee, loss = self._trainees[batch.adapter], means[batch.adapter]
            reports[trainee.name] = StepReport(loss, batch.tokens, total / seconds, norm, rate)
            if rate is not None:
                trainee.progress.record(loss, batch.tokens, seconds * batch.tokens / total)
        return reports

    @torch.no_grad()
    def validation_losses(self, names: Sequence[str]) -> dict[str, float]:
        """Mean cross-entropy over the validation examples of these tasks that have any."""
        batches = [
            Batch(index, trainee.data.validation)
            for index, trainee in enumerate(self._trainees)
            if trainee.name in names and trainee.data.validation
        ]
        sums = torch.zeros(len(self._trainees), device=self._base.device)
        for pack, counts in self._own_packs(batches):
            with self._routing.through(pack.ranges):
                sums.add_(self._base.losses(pack, torch.ones_like(sums)).sums * counts)
        self._workers.add_up(sums)
        losses: dict[str, float] = {}
        for batch in batches:
            trainee = self._trainees[batch.adapter]
            loss = float(sums[batch.adapter]) / batch.trained_tokens
            trainee.progress.validation_loss = losses[trainee.name] = loss
        return losses

    def _own_packs(self, batches: Sequence[Batch]) -> list[tuple[Pack, bool]]:
        """This worker's share of the packs of a step, each with whether it counts."""
        return own_share(
            pack_batches(batches, self._pack_tokens, self._workers.size), self._workers
        )

    def _apply(self, step: int, index: int, loss: float) -> tuple[float, float | None]:
        """Applies one adapter's gradient, if it is finite; gives its norm and the rate."""
        trainee = self._trainees[index]
        gradients = trainee.adapter.gradients
        norm = cast("float", torch.linalg.vector_norm(gradients).item())
        rate = None
        if math.isfinite(loss) and math.isfinite(norm):
            rate = trainee.optimizer.step(gradients, norm, step, trainee.task.steps)
        else:
            trainee.progress.stopped = f"step {step + 1}: loss {loss}, gradient norm {norm}"
        gradients.zero_()
        return norm, rate
