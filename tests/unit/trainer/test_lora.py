"""The hand-written adapter layer, loss and optimiser equal what autograd and torch compute."""

import numpy as np
import pytest
import torch
from torch import nn

from manylora_trainer.adapter_settings import Optimizer
from manylora_trainer.base_model import BaseModel
from manylora_trainer.lora import Adapter, Routing, attach
from manylora_trainer.optimizer import AdamW, learning_rate
from manylora_trainer.packing import Batch, Range, pack_batches
from manylora_trainer.tokenization import Example

CPU = torch.device("cpu")


def adapter(shapes, rank, alpha, seed) -> Adapter:
    made = Adapter(shapes, rank, alpha, torch.Generator().manual_seed(seed), CPU)
    # B starts at zero, which would leave A without a gradient to compare.
    made.weights.add_(torch.randn(made.weights.shape, generator=torch.Generator().manual_seed(9)))
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_its_gradients_equal_autograd(bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    model = nn.ModuleDict({"layer": linear})
    shapes = {"layer": (5, 6)}
    adapters = [adapter(shapes, 2, 4, 1), adapter(shapes, 3, 3, 2)]
    routing = Routing(CPU)
    attach(model, adapters, routing)
    inputs = torch.randn(1, 10, 6, requires_grad=True)
    slope = torch.randn(1, 10, 5)
    with routing.through([Range(1, 0, 4), Range(0, 4, 9)]):
        outputs = model["layer"](inputs)
        outputs.backward(slope)

    plain = inputs.detach().clone().requires_grad_()
    expected = nn.functional.linear(plain, linear.weight, linear.bias)
    leaves = []
    for number, rows, scale in ((1, slice(0, 4), 1.0), (0, slice(4, 9), 2.0)):
        matrices = adapters[number].matrices["layer"]
        down = matrices.down.clone().requires_grad_()
        up = matrices.up.clone().requires_grad_()
        update = torch.zeros(1, 10, 5)
        update[:, rows] = 1
        expected = expected + update * (plain @ down.t() @ up.t()) * scale
        leaves.append((matrices, down, up))
    expected.backward(slope)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(inputs.grad, plain.grad)
    for matrices, down, up in leaves:
        torch.testing.assert_close(matrices.down_gradient, down.grad)
        torch.testing.assert_close(matrices.up_gradient, up.grad)


def test_initial_weights_are_pefts():
    from peft import LoraConfig, inject_adapter_in_model

    layer = Adapter({"layer": (5, 400)}, 8, 16, torch.Generator().manual_seed(3), CPU).matrices
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"])
    peft = inject_adapter_in_model(config, nn.ModuleDict({"layer": nn.Linear(400, 5)}))
    theirs = peft.get_parameter("layer.lora_A.default.weight").detach()
    assert not layer["layer"].up.any()
    assert layer["layer"].scaling == 16 / 8
    # Uniform: the bound and the spread say all.
    assert layer["layer"].down.abs().max() == pytest.approx(float(theirs.abs().max()), rel=0.01)
    assert layer["layer"].down.std() == pytest.approx(float(theirs.std()), rel=0.05)


def test_loss_equals_cross_entropy_of_full_logits(tiny_base):
    base = BaseModel(tiny_base, torch.float32, CPU)
    random = np.random.default_rng(0)
    batches = [
        Batch(a, [Example(random.integers(3, 250, 90).astype(np.int32), np.arange(90) >= 5)] * 4)
        for a in range(2)
    ]
    (pack,) = pack_batches(batches, 4096)
    weights = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        logits = base.logits(pack)
    each = nn.functional.cross_entropy(logits, torch.from_numpy(pack.targets), reduction="none")
    owner = torch.from_numpy(pack.target_adapters)
    losses = base.losses(pack, weights)
    # More predictions than one chunk of the head, or the chunking is not tested.
    assert len(pack.targets) > 256
    torch.testing.assert_close(losses.sums, torch.stack([each[owner == a].sum() for a in (0, 1)]))
    torch.testing.assert_close(losses.total, (each * weights[owner]).sum())


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_optimizer_equals_torch_adamw(clip_norm):
    torch.manual_seed(0)
    start = torch.randn(300)
    settings = Optimizer(learning_rate=0.01, weight_decay=0.1, clip_norm=clip_norm, warmup_steps=3)
    ours, theirs = start.clone(), nn.Parameter(start.clone())
    optimizer = AdamW(settings, ours)
    reference = torch.optim.AdamW([theirs], weight_decay=0.1)
    for step in range(10):
        gradient = torch.randn(300)
        theirs.grad = gradient.clone()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([theirs], clip_norm)
        reference.param_groups[0]["lr"] = learning_rate(settings, step, 10)
        reference.step()
        optimizer.step(gradient, float(gradient.norm()), step, 10)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_schedules_warm_up_and_decay():
    def rates(schedule):
        settings = Optimizer(learning_rate=1.0, schedule=schedule, warmup_steps=2)
        return [round(learning_rate(settings, step, 6), 3) for step in range(6)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == [0.5, 1, 1, 0.854, 0.5, 0.146]
