"""A small model's worth of LoRA weights in vLLM's layout, and what each row should get of them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping

from manylora_gateway.cpu_lora.wrapper import GroupedLoRAWrapper

VOCABULARY = 50


def kernels_for(row_slots: Sequence[int], slots: int) -> GroupedLoRAWrapper:
    """Kernels told of a batch of these rows, as tokens and as sampled positions alike."""
    kernels = GroupedLoRAWrapper(max(len(row_slots), 1), max(len(row_slots), 1), device="cpu")
    announce(kernels, row_slots, slots)
    return kernels


def announce(kernels: GroupedLoRAWrapper, row_slots: Sequence[int], slots: int) -> None:
    """Tells the kernels of the next batch as vLLM does: by adapter ids, 0 for none."""
    ids: list[int | None] = [slot + 100 for slot in range(slots)]
    rows = tuple(0 if slot < 0 else slot + 100 for slot in row_slots)
    kernels.update_metadata(LoRAMapping(rows, rows, is_prefill=True), ids, slots + 1, VOCABULARY)


def stacked(
    ranks: Sequence[int],
    max_rank: int,
    width_in: int,
    width_out: int,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """A [slots, 1, rank, in] and B [slots, 1, out, rank], random up to each slot's rank, then 0."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.zeros(len(ranks), 1, max_rank, width_in, dtype=dtype)
    b = torch.zeros(len(ranks), 1, width_out, max_rank, dtype=dtype)
    for slot, rank in enumerate(ranks):
        a[slot, 0, :rank] = torch.randn(rank, width_in, generator=generator) / width_in**0.5
        b[slot, 0, :, :rank] = torch.randn(width_out, rank, generator=generator)
    return a, b


def expected(
    y: Tensor,
    x: Tensor,
    row_slots: Sequence[int],
    weights: Sequence[tuple[Tensor, Tensor]],
    scale: float = 1.0,
) -> Tensor:
    """y with each row's own adapter applied, slice by slice and row by row in float64."""
    result = y.double().clone()
    for row, slot in enumerate(row_slots):
        start = 0
        for a, b in weights:
            width = b.shape[2]
            if slot >= 0:
                delta = b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double())
                result[row, start : start + width] += scale * delta
            start += width
    return result
