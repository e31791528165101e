"""The weights of frozen linear layers, however they are kept."""

from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight of a frozen linear, [out, in]; of a 4-bit one, what its bits stand for."""
    state: Any = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    functional = import_module("bitsandbytes.functional")  # Of the extra `qlora`.
    return cast("Tensor", functional.dequantize_4bit(linear.weight.data, state))
