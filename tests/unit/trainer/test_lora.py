"""The hand-written adapter layer and loss equal what autograd and torch compute."""

import numpy as np
import pytest
import torch
from torch import nn

from manylora_trainer.adapter import Adapter
from manylora_trainer.adapter_settings import Lora
from manylora_trainer.base_model import BaseModel
from manylora_trainer.dropout import keep_mask, layer_key, token_keys
from manylora_trainer.head import head_loss
from manylora_trainer.lora import Routing, attach
from manylora_trainer.objectives import MeanCrossEntropy, losses_by_adapter, sums_by_example
from manylora_trainer.packing import Batch, Range, pack_batches
from manylora_trainer.tokenization import Example

CPU = torch.device("cpu")


def adapter(shapes, seed, **settings) -> Adapter:
    made = Adapter(shapes, Lora(**settings), torch.Generator().manual_seed(seed), CPU)
    # B starts at zero, which would leave A without a gradient to compare.
    made.weights.add_(torch.randn(made.weights.shape, generator=torch.Generator().manual_seed(9)))
    return made


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layer_and_its_gradients_equal_autograd(bias, dropout, stacked):
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    model = nn.ModuleDict({"layer": linear})
    shapes = {"layer": (5, 6)}
    adapters = [
        adapter(shapes, 1, rank=2, alpha=4),
        adapter(shapes, 2, rank=4, alpha=3, use_rslora=True, dropout=dropout),
    ]
    routing = Routing(CPU, stacked=stacked)
    attach(model, adapters, routing)
    inputs = torch.randn(1, 10, 6, requires_grad=True)
    slope = torch.randn(1, 10, 5)
    keys = torch.from_numpy(token_keys(7, np.zeros(10, np.int64), np.arange(10)).view(np.int32))
    with routing.through([Range(1, 0, 4), Range(0, 4, 9)], keys):
        outputs = model["layer"](inputs)
        outputs.backward(slope)

    keep = torch.ones(1, 10, 6)
    if dropout:
        keep[:, :4] = keep_mask(keys[:4], layer_key("layer"), 6, dropout) / (1 - dropout)
        assert 0 < int((keep == 0).sum()) < 24
    plain = inputs.detach().clone().requires_grad_()
    expected = nn.functional.linear(plain, linear.weight, linear.bias)
    leaves = []
    for number, rows, scale in ((1, slice(0, 4), 3 / 2), (0, slice(4, 9), 2.0)):
        matrices = adapters[number].matrices["layer"]
        down = matrices.down.clone().requires_grad_()
        up = matrices.up.clone().requires_grad_()
        update = torch.zeros(1, 10, 5)
        update[:, rows] = 1
        expected = expected + update * ((plain * keep) @ down.t() @ up.t()) * scale
        leaves.append((matrices, down, up))
    expected.backward(slope)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(inputs.grad, plain.grad)
    for matrices, down, up in leaves:
        torch.testing.assert_close(matrices.down_gradient, down.grad)
        torch.testing.assert_close(matrices.up_gradient, up.grad)


def routed_layer(adapters, *, stacked, apart=False):
    """A layer with these adapters, ten tokens of each, forward and backward."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(6, 5, bias=False).requires_grad_(False)})
    routing = Routing(CPU, stacked=stacked)
    routing.apart = apart
    attach(model, adapters, routing)
    inputs = torch.randn(10 * len(adapters), 6, requires_grad=True)
    with routing.through([Range(a, 10 * a, 10 * a + 10) for a in range(len(adapters))]):
        outputs = model["layer"](inputs)
        outputs.backward(torch.ones_like(outputs))
    assert inputs.grad is not None
    return outputs, inputs.grad, [a.gradients for a in adapters]


@pytest.mark.parametrize("apart", [False, True])
def test_stacked_adapters_beyond_the_largest_stack_equal_one_after_the_other(apart):
    ranks = (100, 200, 120, 120, 256, 3)
    results = [
        routed_layer(
            [adapter({"layer": (5, 6)}, n, rank=rank, alpha=4) for n, rank in enumerate(ranks)],
            stacked=stacked,
            apart=apart,
        )
        for stacked in (False, True)
    ]
    torch.testing.assert_close(*results)


def test_an_adapter_that_overflows_does_not_reach_its_stacked_neighbours():
    def make(scale):
        adapters = [adapter({"layer": (5, 6)}, n, rank=2, alpha=4) for n in range(3)]
        adapters[1].weights.mul_(scale)
        return adapters

    plain, reckless = (routed_layer(make(scale), stacked=True, apart=True) for scale in (1.0, 1e39))
    assert not reckless[0][10:20].isfinite().all()
    for part in (slice(10), slice(20, 30)):
        assert torch.equal(plain[0][part], reckless[0][part])
        assert torch.equal(plain[1][part], reckless[1][part])
    assert torch.equal(plain[2][0], reckless[2][0])
    assert torch.equal(plain[2][2], reckless[2][2])


def test_initial_weights_are_pefts():
    from peft import LoraConfig, inject_adapter_in_model

    layer = Adapter({"layer": (5, 400)}, Lora(), torch.Generator().manual_seed(3), CPU).matrices
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"])
    peft = inject_adapter_in_model(config, nn.ModuleDict({"layer": nn.Linear(400, 5)}))
    theirs = peft.get_parameter("layer.lora_A.default.weight").detach()
    assert not layer["layer"].up.any()
    assert layer["layer"].scaling == 16 / 8
    # Uniform: the bound and the spread say all.
    assert layer["layer"].down.abs().max() == pytest.approx(float(theirs.abs().max()), rel=0.01)
    assert layer["layer"].down.std() == pytest.approx(float(theirs.std()), rel=0.05)


@pytest.mark.parametrize("normalizer", ["tokens", "examples"])
def test_losses_and_their_slope_equal_cross_entropy_of_full_logits(tiny_base, normalizer):
    base = BaseModel(tiny_base, torch.float32, CPU)
    random = np.random.default_rng(0)
    batches = [
        Batch(
            a,
            [
                Example(random.integers(3, 250, 90).astype(np.int32), np.arange(90) >= prompt)
                for prompt in (5, 20, 60, 70)
            ],
        )
        for a in range(2)
    ]
    (pack,) = pack_batches(batches, 4096)
    objectives = [MeanCrossEntropy(batch, normalizer, CPU) for batch in batches]
    states = torch.randn(len(pack.targets), 32, requires_grad=True)
    targets = torch.from_numpy(pack.targets)
    losses = head_loss(states, base.model.lm_head.weight, None, targets)
    ours = [loss for _, loss in losses_by_adapter(pack, sums_by_example(pack, losses), objectives)]
    (ours[0] + ours[1]).backward()

    plain = states.detach().clone().requires_grad_()
    each = nn.functional.cross_entropy(base.model.lm_head(plain), targets, reduction="none")
    owner = torch.from_numpy(pack.target_sequences) // 4
    theirs = [each[owner == a].mean() for a in (0, 1)]
    if normalizer == "examples":
        of = torch.from_numpy(pack.target_sequences)
        means = torch.stack([each[of == number].mean() for number in range(8)])
        theirs = [means[:4].mean(), means[4:].mean()]
    (theirs[0] + theirs[1]).backward()
    torch.testing.assert_close(losses, each)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))
    torch.testing.assert_close(states.grad, plain.grad)
