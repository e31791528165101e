"""The loss under a head whose logits are made in parts equals that of all logits at once."""

import pytest
import torch
from torch import nn

from manylora_trainer.head import head_loss

WIDTH = 24
# More predictions and more tokens than are computed at one time.
PREDICTIONS, VOCABULARY = 700, 5000


def a_head(seed, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(PREDICTIONS, WIDTH, generator=random) * scale
    head = torch.randn(VOCABULARY, WIDTH, generator=random)
    bias = torch.randn(VOCABULARY, generator=random)
    targets = torch.randint(VOCABULARY, (PREDICTIONS,), generator=random)
    return states.requires_grad_(), head, bias, targets


def of_all_logits(states, head, bias, targets, weights):
    plain = states.detach().double().requires_grad_()
    logits = nn.functional.linear(plain, head.double(), None if bias is None else bias.double())
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach().float(), plain.grad.float()


def off(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_losses_and_gradients_equal_those_of_all_logits(biased, scale):
    states, head, bias, targets = a_head(0, scale)
    bias = bias if biased else None
    weights = torch.linspace(-1, 2, PREDICTIONS)
    expected, gradient = of_all_logits(states, head, bias, targets, weights)
    losses = head_loss(states, head, bias, targets)
    (losses * weights).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    assert off(states.grad, gradient) < 1e-5


@pytest.mark.parametrize("place", [0, 2047, 2048, VOCABULARY - 1])
def test_one_token_may_be_far_ahead_of_all_others_wherever_it_stands(place):
    states, head, _, targets = a_head(1)
    bias = torch.zeros(VOCABULARY)
    bias[place] = 300.0
    targets[::2] = place
    expected, gradient = of_all_logits(states, head, bias, targets, torch.ones(()))
    losses = head_loss(states, head, bias, targets)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    assert off(states.grad, gradient) < 1e-5


def test_without_a_gradient_losses_are_the_same():
    states, head, bias, targets = a_head(2)
    with torch.no_grad():
        alone = head_loss(states, head, bias, targets)
    torch.testing.assert_close(alone, head_loss(states, head, bias, targets).detach())


def test_a_state_that_is_not_finite_keeps_to_itself():
    states, head, bias, targets = a_head(3)
    with torch.no_grad():
        states[5], states[6] = torch.nan, torch.inf
    losses = head_loss(states, head, bias, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    others = torch.ones(PREDICTIONS, dtype=torch.bool)
    others[5:7] = False
    assert not losses[~others].isfinite().any()
    assert losses[others].isfinite().all()
    assert gradient[others].isfinite().all()


def test_a_head_in_bfloat16_gives_losses_in_float32():
    states, head, bias, targets = a_head(4)
    head, bias = head.bfloat16(), bias.bfloat16()
    expected, gradient = of_all_logits(states, head, bias, targets, torch.ones(()))
    losses = head_loss(states, head, bias, targets)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert (losses - expected).abs().mean() < 0.05
    assert off(states.grad, gradient) < 0.02
