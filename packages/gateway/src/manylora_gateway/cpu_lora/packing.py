"""A layer's adapters packed for the kernel: the ranks in use alone, side by side, in float32.

vLLM keeps for each slice of a layer (q, k and v of a fused projection are three) the A weights as
[slots, 1, maximum rank, in] and the B weights as [slots, 1, out, maximum rank], zero where a slot
is empty, does not adapt the layer, or has a lower rank.
"""

# torch's members are not all typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 1e6
"""The largest output of a layer with an adapter, far beyond any model's. An adapter may have more
than a model can bear: its squares and products would overflow, and a NaN in the cache of keys and
values, which attention reads by whole blocks, would be in everybody's answers."""

OUTPUTS = 96
"""Outputs in a block of B: small enough to share out evenly, and a divisor of usual widths."""


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A layer's weights, and what they were packed from.

    Its columns are those of slot 0, then of slot 1, ... as many for each as its highest rank over
    the slices.
    """

    ranks: tuple[int, ...]
    """Columns of each slot."""
    starts: Tensor
    """First column of each slot, and the one after the last: int64 [slots + 1]."""
    width: int
    """Outputs of all slices."""
    blocks: Tensor
    """Slice, first output and number of outputs of each block of B: int64 [blocks, 3]."""
    a: Tensor
    """float32 [slices, columns, in]"""
    b: Tensor
    """float32 [blocks, columns, OUTPUTS], so that a block is read from one end to the other."""
    empty: bool
    """Whether no slot adapts the layer."""
    sources: tuple[tuple[Tensor, int, int], ...]
    """What it was packed from, A then B: each tensor, the address of its data and its version."""

    def holds(self, sources: Sequence[Tensor]) -> bool:
        """Whether this is what packing `sources` again would give.

        A tensor's version is the counter that autograd finds overwritten tensors with: every write
        to it or a view of it moves it. It counts in inference mode too, for tensors made outside
        of it, as vLLM's are; reading it of one made inside raises. Only a write that goes around
        PyTorch (an array from `.numpy()`) escapes.
        """
        # A plain loop: this runs for each layer in each step.
        for source, (packed, address, version) in zip(sources, self.sources, strict=True):
            if source is not packed or source._version != version or source.data_ptr() != address:
                return False
        return True


def pack(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> PackedLayer:
    """Packs the stacked weights of a layer, one tensor of each for each slice.

    By NumPy: it is hundreds of small copies in all layers while the engine stands still, and a call
    of PyTorch costs more than most of them.
    """
    sources = tuple((source, source.data_ptr(), source._version) for source in (*lora_a, *lora_b))
    slices_a, slices_b = [_array(a) for a in lora_a], [_array(b) for b in lora_b]
    ranks = [max(slot_ranks) for slot_ranks in zip(*map(_ranks, slices_a), strict=True)]
    starts = list(accumulate(ranks, initial=0))
    columns = [slice(start, stop) for start, stop in pairwise(starts)]
    widths = [slice_b.shape[1] for slice_b in slices_b]
    counts = [-(-width // OUTPUTS) for width in widths]
    a = np.empty((len(slices_a), starts[-1], slices_a[0].shape[2]), np.float32)
    b = np.empty((sum(counts), starts[-1], OUTPUTS), np.float32)
    blocks: list[tuple[int, int, int]] = []
    first = at = 0
    for index, (slice_a, slice_b) in enumerate(zip(slices_a, slices_b, strict=True)):
        whole, rest = divmod(widths[index], OUTPUTS)
        offsets = range(0, widths[index], OUTPUTS)
        blocks += [
            (index, first + offset, min(OUTPUTS, widths[index] - offset)) for offset in offsets
        ]
        full, last = b[at : at + whole], b[at + whole : at + counts[index]]
        last[..., rest:] = 0
        for slot, rank in enumerate(ranks):
            if rank:
                a[index, columns[slot]] = slice_a[slot, :rank]
                used = slice_b[slot, :, :rank]
                in_blocks = used[: whole * OUTPUTS].reshape(whole, OUTPUTS, rank)
                full[:, columns[slot]] = in_blocks.transpose(0, 2, 1)
                last[:, columns[slot], :rest] = used[whole * OUTPUTS :].T
        first += widths[index]
        at += counts[index]
    return PackedLayer(
        ranks=tuple(ranks),
        starts=torch.from_numpy(np.array(starts)),
        width=first,
        blocks=torch.from_numpy(np.array(blocks)),
        a=torch.from_numpy(a),
        b=torch.from_numpy(b),
        empty=not any(ranks),
        sources=sources,
    )


def _array(stacked: Tensor) -> NDArray[np.float32]:
    """[slots, 1, ...] as float32 [slots, ...], not copied where that is its type."""
    return cast("NDArray[np.float32]", stacked[:, 0].to(torch.float32).numpy())


def _ranks(slice_a: NDArray[np.float32]) -> list[int]:
    """The rank in use in each slot of [slots, maximum rank, in]: up to its last nonzero row."""
    used = (slice_a != 0).any(axis=2)
    positions = np.arange(1, slice_a.shape[1] + 1, dtype=np.int64)
    return cast("list[int]", (used * positions).max(axis=1).tolist())
