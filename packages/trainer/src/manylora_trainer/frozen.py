"""The frozen layers of a base: how their weights are kept, and what they are multiplied in."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import functools
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight of a frozen linear, [out, in]; of a 4-bit one, what its bits stand for."""
    state: Any = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    functional = import_module("bitsandbytes.functional")  # Of the extra `qlora`.
    return cast("Tensor", functional.dequantize_4bit(linear.weight.data, state))


def product(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """A frozen linear, multiplied in the dtype of its weight, in and out in that of the inputs."""
    weight = dense_weight(linear)
    return F.linear(inputs.to(weight.dtype), weight, linear.bias).to(inputs.dtype)


def input_gradient(linear: nn.Linear, gradient: Tensor) -> Tensor:
    """What `product` hands back to its inputs, [tokens, out] to [tokens, in]."""
    weight = dense_weight(linear)
    return (gradient.to(weight.dtype) @ weight).to(gradient.dtype)


def keep_activations_in_float32(model: nn.Module) -> None:
    """Leaves the narrow type of a model's weights to its embeddings and linear products.

    A processor gains from the narrow type where it has instructions for products; everything else
    it does sooner without.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(product, module)
        elif isinstance(module, nn.Embedding):
            module.forward = functools.partial(_widened, module.forward)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _widened(forward: Any, *tokens: Tensor, **named: Any) -> Tensor:
    # Learned positions (OPT) are told more than their number.
    return forward(*tokens, **named).to(torch.float32)
