"""Many LoRA adapters over one frozen linear layer, each on its own range of tokens."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUntypedBaseClass=false

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from manylora_trainer.adapter import Adapter, LoraMatrices, Working
from manylora_trainer.dropout import keep_mask
from manylora_trainer.errors import UnfitTaskError
from manylora_trainer.frozen import input_gradient, product
from manylora_trainer.packing import Range
from manylora_trainer.stacked import Member, PackOwners, stacked_linear, stacks_of
from manylora_trainer.targets import Shapes, last_names


class Routing:
    """Which tokens go through which adapter; shared by all layers, set for one pack at a time."""

    def __init__(self, device: torch.device, *, stacked: bool | None = None) -> None:
        """`stacked`: adapters side by side, as by default on a GPU; else one after the other."""
        self.adapters: Sequence[Adapter] = ()
        self.ranges: Sequence[Range] = ()
        self.dropout: Tensor | None = None
        self.stacked = device.type == "cuda" if stacked is None else stacked
        self.apart = False
        """Whether stacked adapters' gradients are taken one by one, as neighbours may be broken."""
        self._device = device
        self._working: dict[int, Working] = {}
        self._owners: PackOwners | None = None
        # Autograd records a function only if an input needs a gradient; the adapters' weights,
        # which do, are not inputs, and the embeddings that enter the first layer do not.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    @contextmanager
    def through(self, ranges: Sequence[Range], dropout: Tensor | None = None) -> Generator[None]:
        """Routes the packs computed inside the block, forward and backward.

        `dropout` holds the tokens' keys, int32 [tokens]; without it nothing is dropped.
        """
        self.ranges = ranges
        self.dropout = dropout
        try:
            yield
        finally:
            self.ranges = ()
            self.dropout = None
            self._working = {}
            self._owners = None

    def working(self, adapter: int, dtype: torch.dtype) -> Working:
        """An adapter's weights for the products of this pack."""
        if adapter not in self._working:
            self._working[adapter] = self.adapters[adapter].working(dtype)
        return self._working[adapter]

    def owners(self, tokens: int) -> PackOwners:
        """Whose the tokens of this pack are."""
        if self._owners is None:
            self._owners = PackOwners.of(self.ranges, tokens, self._device)
        return self._owners


class MultiLoraLinear(nn.Module):
    """A frozen linear layer and the adapters attached to it."""

    def __init__(
        self,
        name: str,
        base: nn.Linear,
        adapters: Sequence[LoraMatrices | None],
        routing: Routing,
    ) -> None:
        super().__init__()
        self.base = base
        self._module_name = name
        self._adapters = adapters
        self._routing = routing

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]; the last but one dimension is the pack's tokens."""
        keys = self._routing.dropout
        routed = [
            _Route(matrices, route.start, route.end, keys)
            for route in self._routing.ranges
            if (matrices := self._adapters[route.adapter]) is not None
        ]
        if not routed:
            return self.base(inputs)
        rows = inputs.flatten(0, -2)
        if self._routing.stacked and not any(route.lora.origin for route in routed):
            outputs = self._stacked(rows)
            return outputs.view(*inputs.shape[:-1], -1)
        outputs = cast("Tensor", _LoraLinear.apply(rows, self._routing.anchor, self.base, routed))
        return outputs.view(*inputs.shape[:-1], -1)

    def _stacked(self, rows: Tensor) -> Tensor:
        routing = self._routing
        members = [
            Member(
                route.adapter,
                route.start,
                route.end,
                matrices,
                *routing.working(route.adapter, rows.dtype).matrices[self._module_name],
            )
            for route in routing.ranges
            if (matrices := self._adapters[route.adapter]) is not None
        ]
        owners = routing.owners(len(rows))
        stacks = stacks_of(members, owners, len(rows), apart=routing.apart)
        return stacked_linear(rows, routing.anchor, self.base, stacks, routing.dropout)


@dataclass(frozen=True)
class _Route:
    """Tokens `start:end` through one adapter's part of a layer."""

    lora: LoraMatrices
    start: int
    end: int
    keys: Tensor | None

    def keep(self, width: int) -> Tensor | None:
        """What its dropout leaves, [tokens, width]; None where all of it stays."""
        if self.keys is None or not self.lora.dropout:
            return None
        keys = self.keys[self.start : self.end]
        return keep_mask(keys, self.lora.layer, width, self.lora.dropout)

    @property
    def scaling(self) -> float:
        """Factor of the update, with what makes up for dropped inputs."""
        dropped = 0.0 if self.keys is None else self.lora.dropout
        return self.lora.scaling / (1.0 - dropped)


class _LoraLinear(torch.autograd.Function):
    """Frozen linear plus its adapters as one node: the input is kept once, for the adapters only.

    Gradients of the adapters are added to their buffers here instead of being returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor,  # noqa: ARG004 (makes autograd record this node)
        base: nn.Linear,
        routed: Sequence[_Route],
    ) -> Tensor:
        outputs = product(base, inputs)
        kept: list[Tensor | None] = []
        inner: list[Tensor] = []
        for route in routed:
            lora, rows = route.lora, inputs[route.start : route.end]
            keep = route.keep(inputs.shape[1])
            lowered = (rows if keep is None else rows * keep) @ lora.down.to(inputs.dtype).t()
            outputs[route.start : route.end].addmm_(
                lowered, lora.up.to(inputs.dtype).t(), alpha=route.scaling
            )
            if lora.origin is not None:
                down, up = (matrix.to(inputs.dtype) for matrix in lora.origin)
                outputs[route.start : route.end].addmm_(
                    rows @ down.t(), up.t(), alpha=-lora.scaling
                )
            kept.append(keep)
            inner.append(lowered)
        ctx.base = base
        ctx.routed = routed
        ctx.save_for_backward(inputs, *kept, *inner)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        routed: Sequence[_Route] = ctx.routed
        inputs, *saved = ctx.saved_tensors
        kept, inner = saved[: len(routed)], saved[len(routed) :]
        needs_input: bool = ctx.needs_input_grad[0]
        passed = input_gradient(ctx.base, gradient) if needs_input else None
        for route, keep, lowered in zip(routed, kept, inner, strict=True):
            lora, part = route.lora, slice(route.start, route.end)
            rows, outer = inputs[part], gradient[part]
            through = (outer @ lora.up.to(outer.dtype)).mul_(route.scaling)
            seen = rows if keep is None else rows * keep
            _accumulate(lora.down_gradient, through.t(), seen, 1.0)
            _accumulate(lora.up_gradient, outer.t(), lowered, route.scaling)
            if passed is None:
                continue
            if lora.origin is not None:
                down, up = (matrix.to(outer.dtype) for matrix in lora.origin)
                passed[part].addmm_(outer @ up, down, alpha=-lora.scaling)
            if keep is None:
                passed[part].addmm_(through, lora.down.to(outer.dtype))
            else:
                passed[part].add_((through @ lora.down.to(outer.dtype)).mul_(keep))
        return passed, None, None, None


def _accumulate(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if left.dtype == into.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_(left @ right, alpha=scale)


def frozen_linear(model: nn.Module, name: str) -> nn.Linear:
    """The base's own linear layer of that name, below any adapters."""
    module = model.get_submodule(name)
    return module.base if isinstance(module, MultiLoraLinear) else cast("nn.Linear", module)


def attach(model: nn.Module, adapters: Sequence[Adapter], routing: Routing) -> None:
    """Wraps every linear that an adapter targets; the others stay as they are."""
    for name in sorted({name for adapter in adapters for name in adapter.matrices}):
        parent, _, child = name.rpartition(".")
        linear = cast("nn.Linear", model.get_submodule(name))
        matrices = [adapter.matrices.get(name) for adapter in adapters]
        wrapped = MultiLoraLinear(name, linear, matrices, routing)
        setattr(model.get_submodule(parent), child, wrapped)
    routing.adapters = adapters


def require_linear_layers(model: nn.Module, task: str, targets: Shapes) -> None:
    """Sees that what a task targets, which was told by the weights alone, can be adapted.

    Raises:
        UnfitTaskError: a weight, as of experts, does not belong to a plain linear layer; it tells
            which names do.
    """
    modules: dict[str, nn.Module] = dict(cast("Any", model).named_modules())
    others = [name for name in targets if not isinstance(modules.get(name), nn.Linear)]
    if others:
        within = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        fit = last_names([name for name in within if re.search(r"\.\d+\.", name)])
        names = ", ".join(name for name in fit if name not in last_names(others))
        what = f"write lora.target_modules: [{names}], or some of them" if names else "it has none"
        raise UnfitTaskError(
            task,
            f"{others[0]} is no linear layer of its own, as those of experts are not, and adapters "
            f"are made for linear layers: {what}",
        )
