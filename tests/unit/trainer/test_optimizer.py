"""Optimisers over flat weights equal torch's own; schedules are what their names say."""

import pytest
import torch
from torch import nn

from manylora_trainer.adapter_settings import Optimizer
from manylora_trainer.optimizer import learning_rate, make_optimizer

UP_FROM = 100


def reference(kind, parameters, settings):
    if kind == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=0.1)
    return torch.optim.SGD(parameters, momentum=settings.momentum)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_optimizers_equal_torchs(kind, clip_norm, ratio):
    torch.manual_seed(0)
    start = torch.randn(300)
    settings = Optimizer(
        kind=kind,
        learning_rate=0.01,
        lora_plus_ratio=ratio,
        weight_decay=0.1 if kind == "adamw" else 0.0,
        clip_norm=clip_norm,
        warmup_steps=3,
    )
    ours = start.clone()
    theirs = [nn.Parameter(part.clone()) for part in start.split([UP_FROM, 300 - UP_FROM])]
    optimizer = make_optimizer(settings, ours, UP_FROM)
    torchs = reference(kind, [{"params": [parameter]} for parameter in theirs], settings)
    for step in range(10):
        gradient = torch.randn(300)
        for parameter, part in zip(theirs, gradient.split([UP_FROM, 300 - UP_FROM]), strict=True):
            parameter.grad = part.clone()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(theirs, clip_norm)
        rate = learning_rate(settings, step, 10)
        torchs.param_groups[0]["lr"], torchs.param_groups[1]["lr"] = rate, rate * ratio
        torchs.step()
        assert optimizer.step(gradient, float(gradient.norm()), step, 10) == rate
        torch.testing.assert_close(ours, torch.cat([*theirs]).detach(), rtol=1e-5, atol=1e-7)


def test_weight_decay_of_sgd_is_decoupled_from_its_momentum():
    weights = torch.ones(4)
    optimizer = make_optimizer(
        Optimizer(kind="sgd", learning_rate=0.5, schedule="constant", weight_decay=0.2), weights, 0
    )
    for step in range(3):
        optimizer.step(torch.zeros(4), 0.0, step, 3)
    torch.testing.assert_close(weights, torch.full((4,), 0.9**3))


def rates(steps=6, **settings):
    optimizer = Optimizer(learning_rate=1.0, **settings)
    return [round(learning_rate(optimizer, step, steps), 3) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.854, 0.5, 0.146]),
    ],
)
def test_schedules_warm_up_and_decay(schedule, expected):
    assert rates(schedule=schedule, warmup_steps=2) == expected
    assert rates(schedule=schedule, warmup_share=0.34) == expected


def test_wsd_warms_up_stays_and_falls_at_the_end():
    assert rates(10, schedule="wsd", warmup_share=0.2, decay_share=0.4) == [
        *(0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25),
    ]
