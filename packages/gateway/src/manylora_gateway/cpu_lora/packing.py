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

import torch
from torch import Tensor

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
    """Packs the stacked weights of a layer, one tensor of each for each slice."""
    sources = tuple((source, source.data_ptr(), source._version) for source in (*lora_a, *lora_b))
    ranks = [max(slot_ranks) for slot_ranks in zip(*map(_ranks, lora_a), strict=True)]
    starts = list(accumulate(ranks, initial=0))
    columns = [slice(start, stop) for start, stop in pairwise(starts)]
    a = torch.empty(len(lora_a), starts[-1], lora_a[0].shape[3])
    blocks: list[tuple[int, int, int]] = []
    b: list[Tensor] = []
    first = 0
    for index, (slice_a, slice_b) in enumerate(zip(lora_a, lora_b, strict=True)):
        width = slice_b.shape[2]
        offsets = range(0, width, OUTPUTS)
        blocks += [(index, first + offset, min(OUTPUTS, width - offset)) for offset in offsets]
        padded = torch.zeros(starts[-1], len(offsets) * OUTPUTS)
        for slot, rank in enumerate(ranks):
            a[index, columns[slot]] = slice_a[slot, 0, :rank]
            padded[columns[slot], :width] = slice_b[slot, 0, :, :rank].t()
        b.append(padded.view(-1, len(offsets), OUTPUTS).transpose(0, 1))
        first += width
    return PackedLayer(
        ranks=tuple(ranks),
        starts=torch.tensor(starts),
        width=first,
        blocks=torch.tensor(blocks),
        a=a,
        b=torch.cat(b).contiguous(),
        empty=not any(ranks),
        sources=sources,
    )


def _ranks(lora_a: Tensor) -> list[int]:
    """The rank in use in each slot of [slots, 1, maximum rank, in]: up to its last nonzero row."""
    used = lora_a[:, 0].ne(0).any(dim=-1)
    positions = torch.arange(1, used.shape[1] + 1)
    return cast("list[int]", (used * positions).amax(dim=1).tolist())
