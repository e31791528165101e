"""Cross-entropy under a linear head, whose logits never all exist at one time."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manylora_trainer.fused import fused
from manylora_trainer.memory import HEAD_BLOCK, HEAD_ROWS, logits_chunk


def head_loss(states: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy of each target under a frozen linear head, float32 [targets].

    Args:
        states: final hidden states, [targets, hidden].
        head: weight, [vocabulary, hidden].
        bias: [vocabulary], or None.
        targets: token ids, [targets].
    """
    return _HeadLoss.apply(states, head, bias, targets)


def trainable_head_loss(states: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The same where the head itself learns: each chunk's logits are made again in the backward."""

    def chunk_loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="none")

    rows = logits_chunk(states.device)
    chunks = zip(states.split(rows), targets.split(rows), strict=True)
    losses = [
        cast("Tensor", checkpoint(chunk_loss, *chunk, use_reentrant=False)) for chunk in chunks
    ]
    return torch.cat(losses)


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in chunks, whose gradient is made on the way.

    The head is frozen, so each target's gradient with respect to its own hidden state is all there
    is to keep; what the losses are then summed up to only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        losses = torch.empty(len(targets), device=states.device)
        needs_gradient: bool = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if needs_gradient else None
        rows, compute = (
            (logits_chunk(states.device), _loss_of_rows)
            if states.is_cuda
            else (HEAD_ROWS, _loss_by_blocks)
        )
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            into = None if gradient is None else gradient[chunk]
            losses[chunk] = compute(states[chunk], head, bias, targets[chunk, None], into)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None


def _loss_of_rows(
    states: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, gradient: Tensor | None
) -> Tensor:
    """Few large calls, for a GPU. Targets are [rows, 1]; `gradient` is filled, [rows, hidden]."""
    logits = F.linear(states, head, bias)
    if gradient is None:
        return F.cross_entropy(logits.float(), targets[:, 0], reduction="none")
    losses, slope = fused(_losses_and_slopes)(logits, targets)
    torch.mm(slope, head, out=gradient)
    return losses


def _losses_and_slopes(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and its gradient, in as few passes as a compiler makes of it."""
    exact = logits.float()
    normaliser = exact.logsumexp(-1, keepdim=True)
    columns = torch.arange(logits.shape[1], device=logits.device)
    slope = (exact - normaliser).exp() - (columns == wanted).float()
    return (normaliser - exact.gather(1, wanted))[:, 0], slope.to(logits.dtype)


def _loss_by_blocks(
    states: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, gradient: Tensor | None
) -> Tensor:
    """Of a block of the vocabulary after the other, for a CPU: its logits stay in the cache.

    What the sum so far is relative to changes with the largest logit so far, as in the online
    softmax of https://arxiv.org/abs/1805.02867; the gradient's sum goes along.
    """
    narrow = states.to(head.dtype)
    largest = states.new_full((len(states), 1), -torch.inf)
    total = torch.zeros_like(largest)
    if gradient is not None:
        gradient.zero_()
    for start in range(0, len(head), HEAD_BLOCK):
        block = slice(start, start + HEAD_BLOCK)
        weight, offset = head[block], None if bias is None else bias[block]
        logits = F.linear(narrow, weight, offset).float()
        larger = torch.maximum(largest, logits.amax(-1, keepdim=True))
        fading = (largest - larger).exp_()
        logits.sub_(larger).exp_()
        total.mul_(fading).add_(logits.sum(-1, keepdim=True))
        if gradient is not None:
            gradient.mul_(fading).add_(logits.to(head.dtype) @ weight)
        largest = larger
    wanted = head[targets[:, 0]].float()
    logit = (states * wanted).sum(-1)
    if gradient is not None:
        gradient.div_(total).sub_(wanted)
    return (largest + total.log())[:, 0] - (logit if bias is None else logit + bias[targets[:, 0]])
