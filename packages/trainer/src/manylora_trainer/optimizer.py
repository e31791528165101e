"""Optimisers, schedules and clipping of one adapter; nothing is shared with the others."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from manylora_trainer.adapter_settings import Optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`, counted from 0."""
    warmup = settings.warmup(steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    match settings.schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * (1.0 - progress)
        case "cosine":
            return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            decay = max(1, round(settings.decay_share * steps))
            return settings.learning_rate * min(1.0, (steps - step) / decay)


class FlatOptimizer(Protocol):
    """An optimiser over one flat tensor of weights."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps beside the weights; the live tensors."""
        ...

    def step(self, gradient: Tensor, norm: float, step: int, steps: int) -> float:
        """Clips `gradient`, whose L2 norm is `norm`, in place and applies it; returns the rate.

        `step` counts from 0.
        """
        ...


def make_optimizer(settings: Optimizer, weights: Tensor, up_from: int) -> FlatOptimizer:
    """The optimiser that the settings name; from `up_from` on, the weights are LoRA B's."""
    match settings.kind:
        case "adamw":
            return AdamW(settings, weights, up_from)
        case "sgd":
            return Sgd(settings, weights, up_from)


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    def __init__(self, settings: Optimizer, weights: Tensor, up_from: int) -> None:
        self._settings = settings
        self._weights = weights
        self._up_from = up_from
        self._mean = torch.zeros_like(weights)
        self._square = torch.zeros_like(weights)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """See `FlatOptimizer`."""
        return {"mean": self._mean, "square": self._square}

    @torch.no_grad()
    def step(self, gradient: Tensor, norm: float, step: int, steps: int) -> float:
        """See `FlatOptimizer`."""
        settings = self._settings
        _clip(gradient, norm, settings.clip_norm)
        rate = learning_rate(settings, step, steps)
        fast, slow = settings.betas
        self._mean.lerp_(gradient, 1.0 - fast)
        self._square.mul_(slow).addcmul_(gradient, gradient, value=1.0 - slow)
        scale = (self._square / (1.0 - slow ** (step + 1))).sqrt_().add_(settings.epsilon)
        for part, part_rate in _parts(settings, self._up_from, rate):
            weights = self._weights[part]
            weights.mul_(1.0 - part_rate * settings.weight_decay)
            unbiased = part_rate / (1.0 - fast ** (step + 1))
            weights.addcdiv_(self._mean[part], scale[part], value=-unbiased)
        return rate


class Sgd:
    """SGD with momentum and decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    def __init__(self, settings: Optimizer, weights: Tensor, up_from: int) -> None:
        self._settings = settings
        self._weights = weights
        self._up_from = up_from
        self._momentum = torch.zeros_like(weights)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """See `FlatOptimizer`."""
        return {"momentum": self._momentum}

    @torch.no_grad()
    def step(self, gradient: Tensor, norm: float, step: int, steps: int) -> float:
        """See `FlatOptimizer`."""
        settings = self._settings
        _clip(gradient, norm, settings.clip_norm)
        rate = learning_rate(settings, step, steps)
        self._momentum.mul_(settings.momentum).add_(gradient)
        for part, part_rate in _parts(settings, self._up_from, rate):
            weights = self._weights[part]
            weights.mul_(1.0 - part_rate * settings.weight_decay)
            weights.add_(self._momentum[part], alpha=-part_rate)
        return rate


def _clip(gradient: Tensor, norm: float, limit: float | None) -> None:
    if limit is not None and norm > limit:
        gradient.mul_(limit / (norm + 1e-6))


def _parts(settings: Optimizer, up_from: int, rate: float) -> list[tuple[slice, float]]:
    """The weights that share a rate: all of them, or LoRA A and B apart."""
    if settings.lora_plus_ratio == 1.0:
        return [(slice(None), rate)]
    return [(slice(up_from), rate), (slice(up_from, None), rate * settings.lora_plus_ratio)]
