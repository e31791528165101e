"""What a run will need, reckoned from shapes before anything is loaded: memory and time."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.memory import FLOAT32, Footprint, dtype_of, logits_at_once
from manylora_trainer.recipe import Recipe

MEASURED_SECONDS = 0.5


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step. Libraries and the allocator come on top."""

    base_weights: int
    adapters: int
    """Weights of all adapters, the last sound copy of them, and their gradients."""
    optimizers: int
    """Two running means of every adapter."""
    activations: int
    """What the backward of one pack keeps."""
    logits: int
    pack_tokens: int
    """Of the largest pack."""
    recomputed: bool
    """Whether layers are computed again in the backward (gradient checkpointing)."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.base_weights + self.adapters + self.optimizers + self.activations + self.logits


@dataclass(frozen=True)
class Work:
    """What one task computes, as its sampled rows tell."""

    tokens: float
    """Over the whole run."""
    trained_share: float
    length: float
    """Of an example, in tokens; the mean over tokens."""


@dataclass(frozen=True)
class TimeEstimate:
    """How long the matrix products alone take, if every token is computed.

    Packing computes a prefix that examples share only once, which takes less; all else a step does
    comes on top.
    """

    seconds: float
    tokens: int
    flops: float
    flops_per_s: float
    """Of one large matrix product, measured here and now."""


def estimate_memory(
    recipe: Recipe, identity: BaseModelIdentity, step_tokens: float = math.inf
) -> MemoryEstimate:
    """Reckons the peak of a step, in which all tasks together have `step_tokens` tokens."""
    device = _device()
    footprint = Footprint.of(recipe, identity, device)
    dtype = dtype_of(recipe, device)
    tokens = math.ceil(min(footprint.largest_pack, step_tokens))
    recomputed = footprint.recomputes
    return MemoryEstimate(
        base_weights=footprint.base_bytes,
        adapters=footprint.adapter_bytes,
        optimizers=footprint.optimizer_bytes,
        activations=footprint.activation_bytes(tokens, recomputed=recomputed),
        # Logits in float32, once more in the base's own type for the product with the head.
        logits=logits_at_once(recipe, device, tokens, footprint.shapes.vocabulary)
        * (FLOAT32 + (0 if dtype == torch.float32 else dtype.itemsize)),
        pack_tokens=tokens,
        recomputed=recomputed,
    )


def estimate_time(
    recipe: Recipe, identity: BaseModelIdentity, work: Mapping[str, Work]
) -> TimeEstimate:
    """Reckons floating-point operations and divides them by the rate of a product measured here.

    A frozen linear costs 2 operations a weight and token forward and 2 backward, as it has no
    weight gradient; an adapter's 2 and 4; the head 4 on tokens that train; attention 12 times the
    length and the hidden width in every layer.
    """
    footprint = Footprint.of(recipe, identity, _device())
    shapes, parameters = footprint.shapes, footprint.parameters
    flops = 0.0
    for name, task in work.items():
        per_token = 4 * shapes.linear_weights + 6 * parameters[name]
        per_token += 4 * shapes.vocabulary * shapes.hidden * task.trained_share
        per_token += 12 * shapes.layers * shapes.hidden * task.length
        flops += task.tokens * per_token
    rate = _measure(footprint)
    tokens = math.ceil(sum(task.tokens for task in work.values()))
    return TimeEstimate(flops / rate, tokens, flops, rate)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure(footprint: Footprint) -> float:
    """Floating-point operations a second of a product as large as those of a pack."""
    recipe, shapes, device = footprint.recipe, footprint.shapes, footprint.device
    if device.type == "cpu":
        torch.set_num_threads(recipe.training.threads or os.cpu_count() or 1)
    kind = dtype_of(recipe, device)
    rows = torch.rand(footprint.pack_tokens, shapes.hidden, dtype=kind, device=device)
    weight = torch.rand(shapes.hidden, shapes.inner, dtype=kind, device=device)

    product = rows @ weight

    def seconds(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            torch.mm(rows, weight, out=product)
        # Reading a number back waits for the device.
        product[0, 0].item()
        return time.perf_counter() - started

    seconds(2)
    times = 1
    while (taken := seconds(times)) < MEASURED_SECONDS:
        times = max(2 * times, int(times * MEASURED_SECONDS / max(taken, 1e-6)))
    return times * 2 * rows.numel() * shapes.inner / taken
