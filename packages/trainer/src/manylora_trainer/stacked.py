"""Many LoRA adapters over one frozen linear layer, for devices where the number of calls counts.

A product with one adapter's narrow matrices is over before a GPU has started the next, and what it
costs is reading the wide activations. So the adapters of a pack stand side by side, one product
serves them all, and what a token gets from adapters that are not its own is blanked out in between.

That keeps every token's outputs and gradients its own. The weights' gradients are sums over all
tokens, and there a token that is not finite reaches every adapter: 0 times NaN is NaN. Who finds
that one is not takes the step again with `apart`, which adds up range by range.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUntypedBaseClass=false
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from manylora_trainer.device import on_device
from manylora_trainer.dropout import keep_mask
from manylora_trainer.frozen import dense_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora_trainer.adapter import LoraMatrices
    from manylora_trainer.packing import Range

MAX_STACKED_RANK = 256
"""Ranks that stand side by side. Blanked products cost nothing while reading the activations takes
longer than they do, which on today's GPUs is up to about here."""


@dataclass
class PackOwners:
    """Which adapter each token of a pack goes through, on the device."""

    tokens: Tensor
    """Number of the adapter, -1 for none, [tokens]."""
    _masks: dict[tuple[tuple[int, int], ...], Tensor] = field(
        default_factory=dict[tuple[tuple[int, int], ...], Tensor]
    )

    @classmethod
    def of(cls, ranges: Sequence[Range], tokens: int, device: torch.device) -> PackOwners:
        """Of these ranges."""
        owners = np.full(tokens, -1, dtype=np.int32)
        for r in ranges:
            owners[r.start : r.end] = r.adapter
        return cls(on_device(owners, device))

    def foreign(self, members: Sequence[Member], start: int, end: int) -> Tensor | None:
        """True where a column belongs to another adapter than the token's, [tokens, ranks].

        None where every token goes through the only member.
        """
        if len(members) == 1 and (members[0].start, members[0].end) == (start, end):
            return None
        key = (*((member.adapter, member.rank) for member in members), (start, end))
        if key not in self._masks:
            columns = np.repeat(
                np.array([member.adapter for member in members], dtype=np.int32),
                [member.rank for member in members],
            )
            owners = on_device(columns, self.tokens.device)
            self._masks[key] = self.tokens[start:end, None] != owners[None]
        return self._masks[key]


@dataclass(frozen=True)
class Member:
    """One adapter of a stack and its tokens."""

    adapter: int
    start: int
    end: int
    lora: LoraMatrices
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Of its matrices."""
        return len(self.down)


@dataclass(frozen=True)
class Stack:
    """Neighbouring adapters of a pack side by side, over tokens `start:end`."""

    start: int
    end: int
    members: Sequence[Member]
    down: Tensor
    """[ranks, in]"""
    up: Tensor
    """[out, ranks]"""
    foreign: Tensor | None
    apart: bool
    """Whether the weights' gradients are taken adapter by adapter."""


def stacks_of(
    members: Sequence[Member], owners: PackOwners, tokens: int, *, apart: bool
) -> list[Stack]:
    """The adapters of a layer in stacks that together cover all tokens of a pack."""
    groups: list[list[Member]] = [[]]
    for member in members:
        if groups[-1] and sum(m.rank for m in groups[-1]) + member.rank > MAX_STACKED_RANK:
            groups.append([])
        groups[-1].append(member)
    starts = [0, *(group[0].start for group in groups[1:]), tokens]
    stacks: list[Stack] = []
    for group, start, end in zip(groups, starts[:-1], starts[1:], strict=True):
        if len(group) == 1:
            down, up = group[0].down, group[0].up
        else:
            down = torch.cat([member.down for member in group])
            up = torch.cat([member.up for member in group], dim=1)
        foreign = owners.foreign(group, start, end)
        stacks.append(Stack(start, end, group, down, up, foreign, apart))
    return stacks


def stacked_linear(
    inputs: Tensor,
    anchor: Tensor,
    base: nn.Linear,
    stacks: Sequence[Stack],
    keys: Tensor | None,
) -> Tensor:
    """A frozen linear and its adapters, [tokens, in] to [tokens, out].

    Args:
        inputs: [tokens, in].
        anchor: anything with a gradient; makes autograd record the call.
        base: the frozen layer.
        stacks: `stacks_of` its adapters.
        keys: the tokens' dropout keys, [tokens]; None where nothing is dropped.
    """
    return cast("Tensor", _StackedLinear.apply(inputs, anchor, base, stacks, keys))


class _StackedLinear(torch.autograd.Function):
    """Frozen linear plus its adapters as one node; their gradients go to their buffers.

    What the adapters add is computed first: the large product then takes it up as it writes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,  # noqa: ARG004 (makes autograd record this node)
        base: nn.Linear,
        stacks: Sequence[Stack],
        keys: Tensor | None,
    ) -> Tensor:
        weight = dense_weight(base).t()
        outputs = inputs.new_empty(len(inputs), weight.shape[1])
        inner: list[Tensor] = []
        for stack in stacks:
            rows, results = inputs[stack.start : stack.end], outputs[stack.start : stack.end]
            lowered = _blank(_dropped(rows, stack, keys) @ stack.down.t(), stack)
            torch.mm(lowered, stack.up.t(), out=results)
            results.addmm_(rows, weight)
            inner.append(lowered)
        bias = cast("Tensor | None", base.bias)
        if bias is not None:
            outputs += bias
        ctx.base, ctx.stacks, ctx.keys = base, stacks, keys
        ctx.save_for_backward(inputs, *inner)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, *inner = ctx.saved_tensors
        stacks: Sequence[Stack] = ctx.stacks
        keys: Tensor | None = ctx.keys
        needs_input: bool = ctx.needs_input_grad[0]
        input_gradient = torch.empty_like(inputs) if needs_input else None
        weight = dense_weight(ctx.base) if needs_input else None
        for stack, lowered in zip(stacks, inner, strict=True):
            tokens = slice(stack.start, stack.end)
            outer, seen = gradient[tokens], _dropped(inputs[tokens], stack, keys)
            through = _blank(outer @ stack.up, stack)
            _add_gradients(stack, seen, lowered, outer, through)
            if input_gradient is not None:
                results = input_gradient[tokens]
                torch.mm(through, stack.down, out=results)
                _drop_in_place(results, stack, keys)
                results.addmm_(outer, cast("Tensor", weight))
        return input_gradient, None, None, None, None


def _blank(products: Tensor, stack: Stack) -> Tensor:
    # Not a product with zeros: what is not finite would stay so.
    return products if stack.foreign is None else products.masked_fill_(stack.foreign, 0.0)


def _dropped(rows: Tensor, stack: Stack, keys: Tensor | None) -> Tensor:
    """The inputs as each token's adapter sees them in training."""
    if keys is None or not any(member.lora.dropout for member in stack.members):
        return rows
    seen = rows.clone()
    _drop_in_place(seen, stack, keys)
    return seen


def _drop_in_place(rows: Tensor, stack: Stack, keys: Tensor | None) -> None:
    for member in stack.members:
        if keys is not None and member.lora.dropout:
            own = rows[member.start - stack.start : member.end - stack.start]
            share, layer = member.lora.dropout, member.lora.layer
            own.mul_(keep_mask(keys[member.start : member.end], layer, rows.shape[1], share))
            own.mul_(1.0 / (1.0 - share))


def _add_gradients(
    stack: Stack, seen: Tensor, lowered: Tensor, outer: Tensor, through: Tensor
) -> None:
    ranks = [member.rank for member in stack.members]
    if stack.apart:
        own = [slice(m.start - stack.start, m.end - stack.start) for m in stack.members]
        columns = zip(own, _columns(through, ranks), _columns(lowered, ranks), strict=True)
        downs, ups = zip(
            *(
                (_exact(behind[at].t(), seen[at]), _exact(outer[at].t(), ahead[at]))
                for at, behind, ahead in columns
            ),
            strict=True,
        )
    else:
        downs = cast("tuple[Tensor, ...]", _exact(through.t(), seen).split(ranks))
        ups = _columns(_exact(outer.t(), lowered), ranks)
    loras = [member.lora for member in stack.members]
    _add_all([lora.down_gradient for lora in loras], list(downs), 1.0)
    for scaling in dict.fromkeys(lora.scaling for lora in loras):
        alike = [at for at, lora in enumerate(loras) if lora.scaling == scaling]
        _add_all([loras[at].up_gradient for at in alike], [ups[at] for at in alike], scaling)


def _add_all(into: list[Tensor], gradients: list[Tensor], scale: float) -> None:
    # In one call: on a GPU most of what small sums cost is handing them over one by one.
    torch._foreach_add_(into, gradients, alpha=scale)


def _columns(stacked: Tensor, ranks: list[int]) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", stacked.split(ranks, dim=1))


def _exact(left: Tensor, right: Tensor) -> Tensor:
    """A product in float32, not rounded to the base's dtype first."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
