"""Where an adapter starts, beyond chance: PiSSA from the base, EVA from the task's data."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manylora_trainer.adapter import Adapter
from manylora_trainer.base_model import BaseModel
from manylora_trainer.frozen import dense_weight
from manylora_trainer.lora import frozen_linear
from manylora_trainer.packing import Batch, pack_batches

OVERSAMPLING = 16
"""Directions beyond the rank that the randomised decomposition looks at."""
TOKENS_AT_ONCE = 2048
"""Of inputs that EVA looks at; not `training.pack_tokens`, whose default is smaller where more
adapters leave less memory, and each cut of the inputs gives other directions."""


def start_from_weights(adapter: Adapter, base: BaseModel, seed: int) -> None:
    """PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948).

    B·A begins as the principal part of each weight. The base stays whole for the other adapters:
    what is subtracted from it is part of the adapter, kept as it began in `Adapter.origin`.
    """
    for name, lora in adapter.matrices.items():
        weight = dense_weight(frozen_linear(base.model, name)).float()
        left, values, right = _decompose(weight, len(lora.down), f"{seed}/{name}")
        roots = (values / lora.scaling).sqrt()
        # A rank beyond the layer's smaller side has no part left: A stays by chance there, B zero.
        lora.down[: len(roots)].copy_(roots[:, None] * right.t())
        lora.up[:, : len(roots)].copy_(left * roots)
    assert adapter.origin is not None, "made for an adapter that is to start from weights"
    adapter.origin.copy_(adapter.weights)


@torch.no_grad()
def start_from_data(adapter: Adapter, base: BaseModel, batches: Sequence[Batch], seed: int) -> None:
    """EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170), every layer at the full rank.

    A begins as the directions in which each layer's inputs vary most over the first batches of the
    task, found by an incremental decomposition; B begins at zero.
    """
    sketches: dict[str, Tensor] = {}

    def look(name: str, rank: int, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        seen = rows if name not in sketches else torch.cat([sketches[name], rows])
        _, values, right = _decompose(seen, rank, f"{seed}/{name}")
        sketches[name] = values[:, None] * right.t()

    hooks: list[Any] = [
        base.model.get_submodule(name).register_forward_pre_hook(
            partial(look, name, len(lora.down))
        )
        for name, lora in adapter.matrices.items()
    ]
    try:
        for batch in batches:
            for pack in pack_batches([batch], TOKENS_AT_ONCE):
                with base.reading(pack):
                    base.hidden_states(pack)
    finally:
        for hook in hooks:
            hook.remove()
    for name, lora in adapter.matrices.items():
        directions = nn.functional.normalize(sketches[name], dim=1)
        # With fewer tokens than the rank, the rest stays as chance made it.
        lora.down[: len(directions)].copy_(directions)


def _decompose(matrix: Tensor, rank: int, seed: str) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values and vectors: U [rows, k], S [k], V [columns, k]."""
    # Randomised (Halko et al. 2009), so it must not depend on what was drawn before.
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(number)
        looked_at = min(rank + OVERSAMPLING, *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, q=looked_at, niter=8)
    return left[:, :rank], values[:rank], right[:, :rank]
