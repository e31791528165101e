"""AdamW, schedule and clipping of one adapter; nothing is shared with the others."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import math

import torch
from torch import Tensor

from manylora_trainer.adapter_settings import Optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`, counted from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (steps - settings.warmup_steps)
    match settings.schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * (1.0 - progress)
        case "cosine":
            return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) over one flat tensor of weights."""

    def __init__(self, settings: Optimizer, weights: Tensor) -> None:
        self._settings = settings
        self._weights = weights
        self.mean = torch.zeros_like(weights)
        self.square = torch.zeros_like(weights)

    @torch.no_grad()
    def step(self, gradient: Tensor, norm: float, step: int, steps: int) -> float:
        """Clips `gradient`, whose L2 norm is `norm`, in place and applies it; returns the rate.

        `step` counts from 0.
        """
        settings = self._settings
        if settings.clip_norm is not None and norm > settings.clip_norm:
            gradient.mul_(settings.clip_norm / (norm + 1e-6))
        rate = learning_rate(settings, step, steps)
        fast, slow = settings.betas
        self.mean.lerp_(gradient, 1.0 - fast)
        self.square.mul_(slow).addcmul_(gradient, gradient, value=1.0 - slow)
        scale = (self.square / (1.0 - slow ** (step + 1))).sqrt_().add_(settings.epsilon)
        self._weights.mul_(1.0 - rate * settings.weight_decay)
        self._weights.addcdiv_(self.mean, scale, value=-rate / (1.0 - fast ** (step + 1)))
        return rate
