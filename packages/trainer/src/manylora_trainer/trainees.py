"""Every adapter of a run in training: one forward and backward of the base moves them all."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from manylora_trainer.base_model import BaseModel
from manylora_trainer.device import on_device
from manylora_trainer.dropout import token_keys
from manylora_trainer.errors import DataError
from manylora_trainer.lora import Routing, attach
from manylora_trainer.objectives import (
    DirectPreference,
    MeanCrossEntropy,
    Objective,
    losses_by_adapter,
    margin_sums,
    preference_figures,
    sums_by_example,
)
from manylora_trainer.packer import Packer
from manylora_trainer.packing import Batch, Pack, Range, pack_batches
from manylora_trainer.trainee import Trainee
from manylora_trainer.workers import Workers, own_share


@dataclass(frozen=True)
class StepReport:
    """What one step did to one adapter."""

    loss: float
    """Of its whole batch; for supervised tasks the mean cross-entropy, in nats."""
    tokens: int
    """Tokens of its examples."""
    trained_tokens: int
    """Those of them that were learned."""
    computed_tokens: int
    """Those that went through the base: prefixes that examples share count once a pack."""
    tokens_per_s: float
    """Of the whole step, all adapters together."""
    grad_norm: float
    """L2 norm before clipping."""
    lr: float | None
    """None when the step was not applied, because something was not finite."""
    preference: Mapping[str, float]
    """Of a preference task: share of pairs it gets right, and by how much; else empty."""


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
        adapters = [trainee.adapter for trainee in trainees]
        # Frozen copies, which preferences are measured against, stand behind the adapters.
        self._references: dict[int, int] = {}
        for index, trainee in enumerate(trainees):
            if trainee.reference is not None:
                self._references[index] = len(adapters)
                adapters.append(trainee.reference)
        attach(base.model, adapters, self._routing)
        streams = [trainee.stream for trainee in trainees]
        self._packer = Packer(streams, pack_tokens, workers.size)

    def prepared_ahead(self) -> AbstractContextManager[None]:
        """Inside the block a step's rows are read, tokenised and packed during the one before."""
        return self._packer.prepared_ahead()

    def __iter__(self) -> Iterator[Trainee]:
        return iter(self._trainees)

    def train_step(self, step: int) -> dict[str, StepReport]:
        """Step `step`, counted from 0, of every adapter that takes part in it.

        An adapter whose loss or gradient is not finite is left as it was and marked as stopped.

        Raises:
            DataError: the rows of an adapter failed, be it for another worker; nothing changed.
        """
        started = time.perf_counter()
        batches = self._draw(step)
        # Once all are there: a source that fails must not leave others a batch ahead.
        for batch in batches:
            trainee = self._trainees[batch.adapter]
            trainee.progress.cursor = trainee.stream.cursor
        packs = self._packer.packs(batches)
        objectives = self._objectives(batches)
        means = self._backward(step, batches, packs, objectives)
        norms = self._gradient_norms(batches)
        if self._routing.stacked and not all(map(math.isfinite, [*means, *norms])):
            # One that breaks may have broken its neighbours' sums: again, each for itself.
            for batch in batches:
                self._trainees[batch.adapter].gradients.zero_()
            objectives = self._objectives(batches)
            self._routing.apart = True
            means = self._backward(step, batches, packs, objectives)
            self._routing.apart = False
            norms = self._gradient_norms(batches)
        device = self._base.device
        sums = torch.stack([margin_sums(objective, device) for objective in objectives])
        self._workers.add_up(sums)
        margins = cast("list[list[float]]", sums.tolist())
        rates = [
            self._trainees[batch.adapter].apply_gradient(step, means[batch.adapter], norm)
            for batch, norm in zip(batches, norms, strict=True)
        ]
        seconds = time.perf_counter() - started
        total = sum(batch.tokens for batch in batches)
        reports: dict[str, StepReport] = {}
        for batch, norm, rate in zip(batches, norms, rates, strict=True):
            trainee, loss = self._trainees[batch.adapter], means[batch.adapter]
            reports[trainee.name] = StepReport(
                loss=loss,
                tokens=batch.tokens,
                trained_tokens=int(batch.trained.sum()),
                computed_tokens=sum(
                    r.end - r.start for p in packs for r in p.ranges if r.adapter == batch.adapter
                ),
                tokens_per_s=total / seconds,
                grad_norm=norm,
                lr=rate,
                preference=preference_figures(*margins[batch.adapter]),
            )
            if rate is not None:
                trainee.progress.record(loss, batch.tokens, seconds * batch.tokens / total)
        return reports

    def _draw(self, step: int) -> list[Batch]:
        batches: list[Batch] = []
        failure: DataError | None = None
        try:
            batches = [self._trainees[index].next_batch(index) for index in self._taking_part(step)]
        except DataError as error:
            failure = error
        # Else the others would wait for the worker whose rows failed, and never save what they did.
        if (failure := self._workers.agreed(failure)) is not None:
            raise failure
        return batches

    @torch.no_grad()
    def validate(self, step: int, names: Sequence[str]) -> dict[str, float]:
        """Loss of these tasks after `step` steps over the validation examples, if they have any."""
        batches = [
            Batch.of(index, trainee.data.validation)
            for index, trainee in enumerate(self._trainees)
            if trainee.name in names and trainee.data.validation
        ]
        sums = torch.zeros(len(self._trainees), device=self._base.device)
        objectives = self._objectives(batches)
        packs = pack_batches(batches, self._pack_tokens, self._workers.size)
        for pack, counts in own_share(packs, self._workers):
            with self._base.reading(pack), self._routing.through(pack.ranges):
                summed = sums_by_example(pack, self._base.cross_entropy(pack))
            for adapter, loss in losses_by_adapter(pack, summed, objectives, counts):
                sums[adapter] += loss
        self._workers.add_up(sums)
        losses: dict[str, float] = {}
        for batch in batches:
            trainee = self._trainees[batch.adapter]
            loss = float(sums[batch.adapter])
            losses[trainee.name] = loss
            trainee.validated(step, loss)
        return losses

    def _taking_part(self, step: int) -> list[int]:
        """Numbers of the adapters that train in step `step`, as far as is known."""
        return [index for index, t in enumerate(self._trainees) if t.trains_at(step)]

    def _backward(
        self,
        step: int,
        batches: Sequence[Batch],
        packs: Sequence[Pack],
        objectives: Sequence[Objective | None],
    ) -> list[float]:
        """Adds up every adapter's gradient over a step; gives their losses by adapter number."""
        sums = torch.zeros(len(self._trainees), device=self._base.device)
        for pack, counts in own_share(packs, self._workers):
            keys = self._dropout_keys(step, pack)
            with self._base.reading(pack), self._routing.through(pack.ranges, keys):
                summed = sums_by_example(pack, self._base.cross_entropy(pack))
                losses = losses_by_adapter(pack, summed, objectives, counts)
                # A GPU has a whole forward to work on now, and need not wait for Python's lock.
                self._packer.prepare(self._taking_part(step + 1))
                torch.stack([loss for _, loss in losses]).sum().backward()
            for adapter, loss in losses:
                sums[adapter] += loss.detach()
        self._workers.add_up(sums, *(self._trainees[b.adapter].gradients for b in batches))
        return cast("list[float]", sums.tolist())

    def _gradient_norms(self, batches: Sequence[Batch]) -> list[float]:
        """L2 norm of the gradient of each batch's adapter, read at once."""
        gradients = [self._trainees[batch.adapter].gradients for batch in batches]
        norms: list[torch.Tensor] = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        # None where all have ended before the last step.
        return cast("list[float]", torch.stack(norms).tolist()) if norms else []

    def _objectives(self, batches: Sequence[Batch]) -> list[Objective | None]:
        """By adapter number; None for those without a batch."""
        objectives: list[Objective | None] = [None] * len(self._trainees)
        preferences = [b for b in batches if self._trainees[b.adapter].task.kind == "dpo"]
        before = self._before_training(preferences)
        for batch in batches:
            task = self._trainees[batch.adapter].task
            objectives[batch.adapter] = (
                MeanCrossEntropy(batch, task.optimizer.normalizer, self._base.device)
                if task.kind == "sft"
                else DirectPreference(task.beta, before[batch.adapter])
            )
        return objectives

    @torch.no_grad()
    def _before_training(self, batches: Sequence[Batch]) -> dict[int, torch.Tensor]:
        """Summed cross-entropy of all examples as it was before training, by adapter number.

        That is the base with adapters off, or the adapter that a task went on from.
        """
        device = self._base.device
        found = {b.adapter: torch.zeros(len(b.examples), device=device) for b in batches}
        for pack in pack_batches(batches, self._pack_tokens):
            ranges = [
                Range(self._references[r.adapter], r.start, r.end)
                for r in pack.ranges
                if r.adapter in self._references
            ]
            with self._base.reading(pack), self._routing.through(ranges):
                summed = sums_by_example(pack, self._base.cross_entropy(pack))
            at = 0
            for span in pack.spans:
                part = summed[at : at + len(span.sequences)]
                found[span.adapter][on_device(np.array(span.sequences), device)] = part
                at += len(span.sequences)
        return found

    def _dropout_keys(self, step: int, pack: Pack) -> torch.Tensor | None:
        """What the dropout of each of a pack's tokens follows from; None where no task drops."""
        if not any(self._trainees[r.adapter].task.lora.dropout for r in pack.ranges):
            return None
        keys = np.empty(len(pack), dtype=np.uint32)
        for r in pack.ranges:
            part = slice(r.start, r.end)
            key = self._trainees[r.adapter].dropout_key(step)
            keys[part] = token_keys(key, pack.token_sequences[part], pack.positions[part])
        return on_device(keys.view(np.int32), self._base.device)
