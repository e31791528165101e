"""One LoRA adapter's weights over all layers it targets.

They lie in one flat float32 buffer, all As before all Bs, and their gradients in another; the
matrices of the layers are views into them. The optimiser, the clipping and a checkpoint then handle
one tensor an adapter, whatever the number of layers.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from manylora_trainer.adapter_settings import Lora
from manylora_trainer.dropout import layer_key
from manylora_trainer.targets import Shapes


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
    """Factor of the update."""
    dropout: float
    """Share of the inputs that A does without in training."""
    layer: int
    """Tells this layer's dropout from the others'."""
    origin: tuple[Tensor, Tensor] | None
    """A and B as they began, where their product is taken off the base."""


@dataclass
class Working:
    """One adapter's weights as products take them: in the base's dtype, B times its scaling."""

    flat: Tensor
    matrices: dict[str, tuple[Tensor, Tensor]]
    """A [rank, in] and B [out, rank] of each layer; views into `flat`."""


class Adapter:
    """The weights of one adapter over all layers it targets."""

    def __init__(
        self, shapes: Shapes, settings: Lora, generator: torch.Generator, device: torch.device
    ) -> None:
        """Initialises as PEFT does: A Kaiming-uniform from the adapter's own generator, B zero.

        `shapes` gives (out, in) of every targeted linear, by module name.
        """
        rank = settings.rank
        self.scaling = settings.scaling
        downs = [rank * into for _, into in shapes.values()]
        sizes = [*downs, *(rank * out for out, _ in shapes.values())]
        self.up_from = sum(downs)
        """Where in the flat buffers the Bs follow the As."""
        self.weights = torch.zeros(sum(sizes))
        for down, (_, into) in zip(_split(self.weights, sizes), shapes.values(), strict=False):
            # On the CPU, so that a seed means the same weights on every device.
            nn.init.kaiming_uniform_(down.view(rank, into), a=math.sqrt(5), generator=generator)
        self.weights = self.weights.to(device)
        self.gradients = torch.zeros_like(self.weights)
        self.origin: Tensor | None = None
        """The weights as they began, where the base is to do without their product (PiSSA)."""
        if settings.init_weights == "pissa":
            self.origin = torch.zeros_like(self.weights)
        self._sizes = sizes
        self._working: Working | None = None
        weights, gradients = _split(self.weights, sizes), _split(self.gradients, sizes)
        origins = weights if self.origin is None else _split(self.origin, sizes)
        layers = len(shapes)
        self.matrices = {
            name: LoraMatrices(
                weights[number].view(rank, into),
                weights[layers + number].view(out, rank),
                gradients[number].view(rank, into),
                gradients[layers + number].view(out, rank),
                settings.scaling,
                settings.dropout,
                layer_key(name),
                None
                if self.origin is None
                else (origins[number].view(rank, into), origins[layers + number].view(out, rank)),
            )
            for number, (name, (out, into)) in enumerate(shapes.items())
        }

    def working(self, dtype: torch.dtype) -> Working:
        """A copy of the weights for products in this dtype, as they are now."""
        if self._working is None or self._working.flat.dtype != dtype:
            flat = torch.empty_like(self.weights, dtype=dtype)
            parts, layers = _split(flat, self._sizes), len(self.matrices)
            self._working = Working(
                flat,
                {
                    name: (parts[at].view_as(lora.down), parts[layers + at].view_as(lora.up))
                    for at, (name, lora) in enumerate(self.matrices.items())
                },
            )
        downs, ups = self.weights[: self.up_from], self.weights[self.up_from :]
        # An adapter that runs away overflows by itself; stacked products must not see it infinite.
        most = torch.finfo(dtype).max
        self._working.flat[: self.up_from].copy_(downs.clamp(-most, most))
        self._working.flat[self.up_from :].copy_((ups * self.scaling).clamp(-most, most))
        return self._working

    def tensors(self) -> dict[str, Tensor]:
        """The weights under PEFT's names; what is taken off the base is folded in, negated."""
        named: dict[str, Tensor] = {}
        for module, matrices in self.matrices.items():
            down, up = matrices.down, matrices.up
            if matrices.origin is not None:
                down = torch.cat([down, matrices.origin[0]])
                up = torch.cat([up, -matrices.origin[1]], dim=1)
            named[f"base_model.model.{module}.lora_A.weight"] = down
            named[f"base_model.model.{module}.lora_B.weight"] = up
        return named


def _split(flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", flat.split(sizes))
