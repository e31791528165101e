"""How much memory activations take, and how much there is."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from manylora_trainer.errors import DeviceMemoryError

ACTIVATION_SHARE = 0.4
"""Of a machine's memory, which is for other things too."""
ACTIVATION_SHARE_ON_GPU = 0.8
"""Of what is free on a GPU beside the base; adapters and the logits need some."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@contextmanager
def stating_memory_faults(pack_tokens: int, how_to_resume: str) -> Generator[None]:
    """States it as one line with what to do, when a GPU has no memory left.

    Raises:
        DeviceMemoryError: instead of torch's error from inside the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the GPU is out of memory with training.pack_tokens {pack_tokens}: lower that, set "
            "training.gradient_checkpointing to on or training.quantization to nf4, or shorten "
            "max_length. The last checkpoint is whole; allow the change and go on with: "
            f"{how_to_resume}"
        ) from error


def activation_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """About what the backward of a pack of `tokens` keeps, from a base's configuration.

    Per layer and token: ten vectors of the hidden width (inputs of norms and linears, queries,
    keys, values and what attention gives) and four of the inner width of the MLP.
    """
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", 4 * hidden)
    return config.num_hidden_layers * tokens * (10 * hidden + 4 * inner) * dtype.itemsize


def memory_for_activations(device: torch.device) -> float:
    """Bytes they may take; what needs more is computed again instead of kept."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return ACTIVATION_SHARE_ON_GPU * free
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return ACTIVATION_SHARE * min(physical, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        # No control group, or one without a limit ("max").
        return ACTIVATION_SHARE * physical
