"""How much memory activations take, and how much there is."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import os
from pathlib import Path
from typing import Any

import torch

ACTIVATION_SHARE = 0.4
"""Of the memory there is; with more than that, activations are computed again instead of kept."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def activation_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """About what the backward of a pack of `tokens` keeps, from a base's configuration.

    Per layer and token: ten vectors of the hidden width (inputs of norms and linears, queries,
    keys, values and what attention gives) and four of the inner width of the MLP.
    """
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", 4 * hidden)
    return config.num_hidden_layers * tokens * (10 * hidden + 4 * inner) * dtype.itemsize


def device_memory(device: torch.device) -> int:
    """Bytes of memory this process may fill."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(physical, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        # No control group, or one without a limit ("max").
        return physical
