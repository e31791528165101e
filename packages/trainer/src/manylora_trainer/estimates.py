"""What a run will need, reckoned from shapes before anything is loaded: memory and time."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.memory import (
    Architecture,
    activation_dtype_of,
    architecture_of,
    base_bytes,
    dtype_of,
    kept_bytes,
    largest_pack,
    logits_chunk,
    recomputes,
)
from manylora_trainer.recipe import Recipe
from manylora_trainer.targets import linears_of, targets_of, trainable_parameters

MEASURED_SECONDS = 0.5
FLOAT32 = 4


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
    shapes = _shapes_of(recipe.base, identity)
    device = _device()
    dtype = dtype_of(recipe, device)
    trained = shapes.weights if recipe.kind == "full" else 0
    parameters = trained or sum(trained_parameters(recipe, identity).values())
    tokens = math.ceil(min(largest_pack(recipe), step_tokens))
    recomputed = recomputes(recipe, shapes, device)
    return MemoryEstimate(
        base_weights=base_bytes(recipe, shapes, device),
        # With the gradients a copy of the last weights that gave a finite loss.
        adapters=(2 if trained else 3) * parameters * FLOAT32,
        optimizers=2 * parameters * FLOAT32,
        activations=kept_bytes(
            shapes, tokens, activation_dtype_of(recipe, device), recomputed=recomputed
        ),
        # Logits in float32, once more in the base's own type for the product with the head.
        logits=min(tokens, logits_chunk(device))
        * shapes.vocabulary
        * (FLOAT32 + (0 if dtype == torch.float32 else dtype.itemsize)),
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
    shapes = _shapes_of(recipe.base, identity)
    parameters = trained_parameters(recipe, identity)
    flops = 0.0
    for name, task in work.items():
        per_token = 4 * shapes.linear_weights + 6 * parameters[name]
        per_token += 4 * shapes.vocabulary * shapes.hidden * task.trained_share
        per_token += 12 * shapes.layers * shapes.hidden * task.length
        flops += task.tokens * per_token
    rate = _measure(recipe, shapes)
    tokens = math.ceil(sum(task.tokens for task in work.values()))
    return TimeEstimate(flops / rate, tokens, flops, rate)


def trained_parameters(recipe: Recipe, identity: BaseModelIdentity) -> dict[str, int]:
    """Weights of every task's adapter, by its name."""
    linears = linears_of(identity)
    return {
        task.name: trainable_parameters(targets_of(task, linears), task.lora.rank)
        for task in recipe.tasks
    }


def _shapes_of(base: Path, identity: BaseModelIdentity) -> Architecture:
    try:
        config: Any = AutoConfig.from_pretrained(base, local_files_only=True)
        return architecture_of(config, identity)
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedBaseError(f"{base}: its config.json cannot be used: {error}") from error


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure(recipe: Recipe, shapes: Architecture) -> float:
    """Floating-point operations a second of a product as large as those of a pack."""
    device = _device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.training.threads or os.cpu_count() or 1)
    kind = dtype_of(recipe, device)
    rows = torch.rand(recipe.training.pack_tokens, shapes.hidden, dtype=kind, device=device)
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
