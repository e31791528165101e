"""The frozen layers of a base: how their weights are kept, and what they are multiplied in."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import functools
from collections.abc import Generator
from contextlib import contextmanager
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
            module.forward = cast("Any", functools.partial(product, module))
        elif isinstance(module, nn.Embedding):
            module.forward = functools.partial(_widened, module.forward)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


@contextmanager
def computing_in_float32(model: nn.Module) -> Generator[None]:
    """Inside the block each module's weights are widened while it computes, one after the other.

    What a narrow type makes of them stays, as does the place they take.
    """
    hooks: list[Any] = []
    four_bit: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            four_bit.append(module)
            continue
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        narrow: list[Tensor] = []
        hooks += [
            module.register_forward_pre_hook(functools.partial(_widen, own, narrow)),
            module.register_forward_hook(functools.partial(_narrow, own, narrow), always_call=True),
        ]
    for module in four_bit:
        module.forward = functools.partial(_widened_product, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in four_bit:
            del module.forward


def _widen(own: list[nn.Parameter], narrow: list[Tensor], *_: Any) -> None:
    narrow[:] = [parameter.data for parameter in own]
    for parameter in own:
        parameter.data = parameter.data.float()


def _narrow(own: list[nn.Parameter], narrow: list[Tensor], *_: Any) -> None:
    for parameter, kept in zip(own, narrow, strict=True):
        parameter.data = kept


def _widened_product(linear: Any, inputs: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(inputs, dense_weight(linear).float(), bias)


def _widened(forward: Any, *tokens: Tensor, **named: Any) -> Tensor:
    # Learned positions (OPT) are told more than their number.
    return forward(*tokens, **named).to(torch.float32)
