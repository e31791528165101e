"""From numpy to where a model computes."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of these values, which on a GPU is there in the order of its work.

    A plain copy would first wait until the GPU has done all it was given, and leave it idle then.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
