"""Packed attention on a GPU: the whole pack in one variable-length FlashAttention call.

Every example is one sequence of queries, its own tokens, over keys that are its prefix and its own
tokens. The causal mask of FlashAttention (Dao 2023, https://arxiv.org/abs/2307.08691) is aligned
to the last key, which is exactly who may see whom here, so there are no masks and no fillers, and
memory grows linearly with length.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from manylora_trainer.device import on_device
from manylora_trainer.fused import fused
from manylora_trainer.packing import Pack

MAX_HEAD_DIM = 256
"""Of the kernels that come with torch; they also want a multiple of 8."""


def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention of this kind runs in one variable-length call."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
    )


class VarlenPlan:
    """The examples of a pack as sequences, made once and used by every layer."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        starts = np.concatenate([bucket.queries[:, 0] for bucket in pack.buckets])
        # Fillers repeat an example's last token, so first and last tell how many are its own.
        ends = np.concatenate([bucket.queries[:, -1] for bucket in pack.buckets]) + 1
        prefixes = np.concatenate(
            [np.full(len(bucket.queries), bucket.prefix) for bucket in pack.buckets]
        )
        own = ends - starts
        self.longest_query = int(own.max())
        self.longest_key = int((own + prefixes).max())
        key_ends = np.cumsum(own + prefixes)
        self.query_offsets = _offsets(np.cumsum(own), device)
        self.key_offsets = _offsets(key_ends, device)
        self.gathers = bool(prefixes.any())
        if not self.gathers:
            return
        prefix_starts = np.concatenate(
            [np.full(len(bucket.queries), bucket.keys[0, 0]) for bucket in pack.buckets]
        )
        keys = [
            part
            for start, end, prefix, prefix_start in zip(
                starts, ends, prefixes, prefix_starts, strict=True
            )
            for part in (np.arange(prefix_start, prefix_start + prefix), np.arange(start, end))
        ]
        self.key_index = on_device(np.concatenate(keys), device)
        homes = [np.arange(end - n, end) for end, n in zip(key_ends, own, strict=True)]
        # Examples stand in the pack in the order of the sequences.
        self.key_home = on_device(np.concatenate(homes), device)
        firsts = key_ends - own - prefixes
        having = [
            np.flatnonzero((prefix_starts == start) & (prefixes > 0))
            for start in np.unique(prefix_starts[prefixes > 0])
        ]
        lengths = [int(prefixes[examples[0]]) for examples in having]
        # -1 where a token has no more copies, or is in no prefix.
        copies = np.full((max(map(len, having)), sum(lengths)), -1)
        shared = np.full(len(pack), -1)
        at = 0
        for examples, length in zip(having, lengths, strict=True):
            end, start = at + length, int(prefix_starts[examples[0]])
            copies[: len(examples), at:end] = firsts[examples][:, None] + np.arange(length)
            shared[start : start + length] = np.arange(at, end)
            at = end
        self.copies = on_device(copies, device)
        """Rows of the gathered keys that repeat each token of all prefixes, [most, tokens]."""
        self.shared = on_device(shared, device)
        """Which column of `copies` each token of the pack has, [tokens]."""


def _offsets(ends: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    return on_device(np.concatenate([[0], ends]).astype(np.int32), device)


class _RepeatPrefixes(torch.autograd.Function):
    """Rows in the order of the sequences' keys; a prefix collects gradients from all its copies.

    Sums in a fixed order, unlike torch's own backward of a gather, which adds as threads come.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, plan: VarlenPlan) -> Tensor:
        ctx.plan = plan
        return source.index_select(0, plan.key_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        plan: VarlenPlan = ctx.plan
        sums = fused(_sum_copies)(gradient, plan.copies)
        return fused(_add_shared)(gradient, plan.key_home, sums, plan.shared), None


def _sum_copies(rows: Tensor, copies: Tensor) -> Tensor:
    """Adds up `copies` [most, tokens] of `rows`, [tokens, ...]; where it is -1 there is none."""
    some = rows[copies.clamp(min=0)]
    return torch.where((copies >= 0)[:, :, None, None], some, 0.0).sum(dim=0)


def _add_shared(rows: Tensor, home: Tensor, sums: Tensor, shared: Tensor) -> Tensor:
    """`rows` of each token's own place, plus its sum where it has one."""
    added = torch.where((shared >= 0)[:, None, None], sums[shared.clamp(min=0)], 0.0)
    return rows[home] + added


def varlen_attention(
    plan: VarlenPlan, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None
) -> Tensor:
    """[tokens, heads, head] each, with fewer heads of keys and values or as many; likewise out."""
    if plan.gathers:
        heads = keys.shape[1]
        # Together: one gather, and one sum a prefix, for both.
        both = cast("Tensor", _RepeatPrefixes.apply(torch.cat([keys, values], dim=1), plan))
        keys, values = both.split(heads, dim=1)
    # Below torch.nn.attention.varlen, whose arguments differ between torch's releases.
    outputs: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        plan.query_offsets,
        plan.key_offsets,
        plan.longest_query,
        plan.longest_key,
        0.0,  # dropout
        True,  # causal
        False,  # no debugging mask
        scale=scaling,
    )
    return outputs[0]
