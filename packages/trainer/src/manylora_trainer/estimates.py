"""What a run will need, reckoned from shapes before anything is loaded: memory and time."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.recipe import Recipe
from manylora_trainer.targets import linears_of, targets_of, trainable_parameters

LOGITS_CHUNK = 256
"""Predictions whose logits exist at one time, as in `base_model`."""
MEASURED_SECONDS = 0.5
FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step. Libraries and the allocator come on top."""

    base_weights: int
    adapters: int
    """Weights of all adapters, and their gradients."""
    optimizers: int
    """Two running means of every adapter."""
    activations: int
    """What the backward of one pack keeps."""
    logits: int

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


@dataclass(frozen=True)
class _Shapes:
    """What counts of a base's architecture."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    linear_weights: int
    weights: int


def estimate_memory(recipe: Recipe, identity: BaseModelIdentity) -> MemoryEstimate:
    """Reckons the peak of a step.

    A layer's backward keeps of every token about ten vectors of the hidden width (inputs of norms
    and linears, queries, keys, values, what attention gives) and four of the inner width.
    """
    shapes = _shapes_of(recipe.base, identity)
    item = dtype_of(recipe).itemsize
    parameters = sum(trained_parameters(recipe, identity).values())
    tokens = max(recipe.training.pack_tokens, *(task.max_length for task in recipe.tasks))
    return MemoryEstimate(
        base_weights=shapes.weights * item,
        adapters=2 * parameters * FLOAT32,
        optimizers=2 * parameters * FLOAT32,
        activations=shapes.layers * tokens * (10 * shapes.hidden + 4 * shapes.inner) * item,
        # Logits in float32, once more in the base's own type for the product with the head, and
        # the hidden states' gradient.
        logits=LOGITS_CHUNK * shapes.vocabulary * (FLOAT32 + item) + tokens * shapes.hidden * item,
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


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The base's, on this machine."""
    if recipe.training.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.float32 if recipe.training.dtype == "float32" else torch.bfloat16


def _shapes_of(base: Path, identity: BaseModelIdentity) -> _Shapes:
    config: dict[str, Any] = json.loads((base / "config.json").read_bytes())
    hidden = int(config["hidden_size"])
    return _Shapes(
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        inner=int(config.get("intermediate_size", 4 * hidden)),
        vocabulary=int(config["vocab_size"]),
        linear_weights=sum(out * into for out, into in linears_of(identity).values()),
        weights=sum(math.prod(shape) for shape in identity.tensors.values()),
    )


def _measure(recipe: Recipe, shapes: _Shapes) -> float:
    """Floating-point operations a second of a product as large as those of a pack."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(recipe.training.threads or os.cpu_count() or 1)
    kind = dtype_of(recipe)
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
