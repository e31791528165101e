"""Makes a GPU compute the same bits again, as far as its libraries can."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import os
from typing import Any

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def compute_repeatably(device: torch.device) -> None:
    """From now on sums of this process are added up in an order that chance has no part in.

    Otherwise the backward of attention adds from many threads as they come. A CPU needs none of
    this.
    """
    if device.type != "cuda":
        return
    # Read by cuBLAS when it is first used: a workspace of fixed size lets it choose alike.
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    # Not just with warnings: then attention would stay as it is.
    torch.use_deterministic_algorithms(True)
    # Every tensor here is written before it is read; filling each of them first costs a pass.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
