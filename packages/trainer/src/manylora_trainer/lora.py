"""Many LoRA adapters over one frozen linear layer, each on its own range of tokens.

Every adapter keeps its weights in one flat float32 buffer and its gradients in another; the
matrices of the layers are views into them. The optimiser, the clipping and a checkpoint then
handle one tensor an adapter, whatever the number of layers.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUntypedBaseClass=false

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.packing import Range


@dataclass(frozen=True)
class LoraMatrices:
    """One adapter's part of one linear layer; views into the adapter's flat buffers."""

    down: Tensor
    """LoRA A, [rank, in]."""
    up: Tensor
    """LoRA B, [out, rank]."""
    down_gradient: Tensor
    up_gradient: Tensor
    scaling: float
    """alpha / rank."""


class Adapter:
    """The weights of one adapter over all layers it targets."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        alpha: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        """Initialises as PEFT does: A Kaiming-uniform from the adapter's own generator, B zero.

        `shapes` gives (out, in) of every targeted linear, by module name.
        """
        self.rank = rank
        size = sum(rank * (out + into) for out, into in shapes.values())
        self.weights = torch.zeros(size)
        self.gradients = torch.zeros(size, device=device)
        at = 0
        for out, into in shapes.values():
            down = self.weights[at : at + rank * into].view(rank, into)
            # On the CPU, so that a seed means the same weights on every device.
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            at += rank * (into + out)
        self.weights = self.weights.to(device)
        self.matrices: dict[str, LoraMatrices] = {}
        at = 0
        for name, (out, into) in shapes.items():
            middle, end = at + rank * into, at + rank * (into + out)
            self.matrices[name] = LoraMatrices(
                self.weights[at:middle].view(rank, into),
                self.weights[middle:end].view(out, rank),
                self.gradients[at:middle].view(rank, into),
                self.gradients[middle:end].view(out, rank),
                alpha / rank,
            )
            at = end

    def tensors(self) -> dict[str, Tensor]:
        """The weights under PEFT's names."""
        named: dict[str, Tensor] = {}
        for module, matrices in self.matrices.items():
            named[f"base_model.model.{module}.lora_A.weight"] = matrices.down
            named[f"base_model.model.{module}.lora_B.weight"] = matrices.up
        return named


class Routing:
    """Which tokens go through which adapter; shared by all layers, set for one pack at a time."""

    def __init__(self, device: torch.device) -> None:
        self.ranges: Sequence[Range] = ()
        # Autograd records a function only if an input needs a gradient; the adapters' weights,
        # which do, are not inputs, and the embeddings that enter the first layer do not.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    @contextmanager
    def through(self, ranges: Sequence[Range]) -> Generator[None]:
        """Routes the packs computed inside the block."""
        self.ranges = ranges
        try:
            yield
        finally:
            self.ranges = ()


class MultiLoraLinear(nn.Module):
    """A frozen linear layer and the adapters attached to it."""

    def __init__(
        self, base: nn.Linear, adapters: Sequence[LoraMatrices | None], routing: Routing
    ) -> None:
        super().__init__()
        self.base = base
        self._adapters = adapters
        self._routing = routing

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]; the last but one dimension is the pack's tokens."""
        routed = [
            (matrices, route.start, route.end)
            for route in self._routing.ranges
            if (matrices := self._adapters[route.adapter]) is not None
        ]
        if not routed:
            return self.base(inputs)
        rows = inputs.flatten(0, -2)
        base = self.base
        anchor = self._routing.anchor
        outputs = cast("Tensor", _LoraLinear.apply(rows, anchor, base.weight, base.bias, routed))
        return outputs.view(*inputs.shape[:-1], -1)


Routed = Sequence[tuple[LoraMatrices, int, int]]


class _LoraLinear(torch.autograd.Function):
    """Frozen linear plus its adapters as one node: the input is kept once, for the adapters only.

    Gradients of the adapters are added to their buffers here instead of being returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,  # noqa: ARG004 (makes autograd record this node)
        weight: Tensor,
        bias: Tensor | None,
        routed: Routed,
    ) -> Tensor:
        outputs = F.linear(inputs, weight, bias)
        inner: list[Tensor] = []
        for lora, start, end in routed:
            lowered = inputs[start:end] @ lora.down.to(inputs.dtype).t()
            outputs[start:end].addmm_(lowered, lora.up.to(inputs.dtype).t(), alpha=lora.scaling)
            inner.append(lowered)
        ctx.routed = routed
        ctx.save_for_backward(inputs, weight, *inner)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = gradients
        inputs, weight, *inner = ctx.saved_tensors
        routed: Routed = ctx.routed
        needs_input: bool = ctx.needs_input_grad[0]
        input_gradient = gradient @ weight if needs_input else None
        for (lora, start, end), lowered in zip(routed, inner, strict=True):
            rows = gradient[start:end]
            through = (rows @ lora.up.to(rows.dtype)).mul_(lora.scaling)
            _accumulate(lora.down_gradient, through.t(), inputs[start:end], 1.0)
            _accumulate(lora.up_gradient, rows.t(), lowered, lora.scaling)
            if input_gradient is not None:
                input_gradient[start:end].addmm_(through, lora.down.to(rows.dtype))
        return input_gradient, None, None, None, None


def _accumulate(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if left.dtype == into.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_(left @ right, alpha=scale)


def attach(model: nn.Module, adapters: Sequence[Adapter], routing: Routing) -> None:
    """Wraps every linear that an adapter targets; the others stay as they are.

    Raises:
        UnsupportedBaseError: a targeted weight does not belong to a plain linear layer.
    """
    for name in sorted({name for adapter in adapters for name in adapter.matrices}):
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedBaseError(f"the base has no module {name}") from error
        if not isinstance(linear, nn.Linear):
            raise UnsupportedBaseError(
                f"{name} is a {type(linear).__name__}, and adapters are made for linear layers"
            )
        matrices = [adapter.matrices.get(name) for adapter in adapters]
        setattr(parent, child, MultiLoraLinear(linear, matrices, routing))
