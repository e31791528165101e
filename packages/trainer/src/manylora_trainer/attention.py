"""Attention over packs: every example sees its shared prefix and itself, and nothing else.

Registered with transformers under `ATTENTION_NAME`; a model loaded with that implementation gets
its tokens as one row, and finds who may see whom in the plan set by `attending(...)`. Under
`WINDOWS_NAME` it also notes for each layer the window or chunk that only the model's mask tells.
"""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingTypeStubs=false, reportUntypedBaseClass=false

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from manylora_trainer.device import on_device
from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.packing import Pack
from manylora_trainer.varlen import VarlenPlan, takes_varlen, varlen_attention

ATTENTION_NAME = "manylora_packed"
WINDOWS_NAME = "manylora_packed_noting_windows"
"""For one pass at the start: transformers waits for the device to make a mask."""


@dataclass(frozen=True)
class _Call:
    """One rectangular attention call over the next rows of the gathered queries and keys."""

    examples: int
    prefix: int
    prefix_at: int
    """Where in the pack the shared prefix starts; of no meaning without one."""
    mask: Tensor | None
    """[own, prefix + own], None where plain causality says it."""


class AttentionPlan:
    """The buckets of a pack as index tensors, made once and used by every layer."""

    def __init__(self, pack: Pack, device: torch.device, dtype: torch.dtype) -> None:
        self.calls: list[_Call] = []
        self.longest_key = 0
        for bucket in pack.buckets:
            examples, own = bucket.queries.shape
            mask = None if bucket.prefix == 0 else _mask(own, bucket.prefix).to(device, dtype)
            self.calls.append(_Call(examples, bucket.prefix, int(bucket.keys[0, 0]), mask))
            self.longest_key = max(self.longest_key, bucket.prefix + own)
        # Rows of each call, to split by: the gradient of a split is one concatenation, that of a
        # slice a tensor of zeros as long as all calls.
        self.query_rows = [bucket.queries.size for bucket in pack.buckets]
        self.key_rows = [bucket.keys.size for bucket in pack.buckets]
        queries = np.concatenate([bucket.queries.ravel() for bucket in pack.buckets])
        keys = np.concatenate([bucket.keys.ravel() for bucket in pack.buckets])
        is_own = np.concatenate(
            [
                np.tile(np.arange(bucket.keys.shape[1]) >= bucket.prefix, len(bucket.keys))
                for bucket in pack.buckets
            ]
        )
        self.gathers_queries = not np.array_equal(queries, np.arange(len(pack)))
        self.gathers_keys = not np.array_equal(keys, np.arange(len(pack)))
        self.query_index = on_device(queries, device)
        self.key_index = on_device(keys, device)
        # Where each token stands as itself. Fillers repeat a token behind its own first place.
        self.query_home = on_device(np.unique(queries, return_index=True)[1], device)
        homes = np.flatnonzero(is_own)
        homes = homes[np.unique(keys[is_own], return_index=True)[1]]
        self.key_home = on_device(homes, device)


class _TakeQueries(torch.autograd.Function):
    """Gathers rows that each have one home; torch's own backward would add row by row."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return source.index_select(0, plan.query_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Fillers have no gradient, as their outputs are not used.
        return gradients[0].index_select(0, ctx.plan.query_home), None


class _TakeKeys(torch.autograd.Function):
    """The same for keys and values, where a shared prefix also collects from all its examples."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return source.index_select(0, plan.key_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        plan: AttentionPlan = ctx.plan
        result = gradients[0].index_select(0, plan.key_home)
        for call, rows in zip(plan.calls, gradients[0].split(plan.key_rows), strict=True):
            if call.prefix:
                shared = rows.unflatten(0, (call.examples, -1))[:, : call.prefix].sum(dim=0)
                result[call.prefix_at : call.prefix_at + call.prefix] += shared
        return result, None


class _PutBack(torch.autograd.Function):
    """Outputs back in the order of the pack, without the fillers."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        ctx.rows = len(outputs)
        return outputs.index_select(0, plan.query_home)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        result = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
        return result.index_copy_(0, ctx.plan.query_home, gradient), None


def _mask(own: int, prefix: int) -> Tensor:
    # Added to the scores, not boolean: torch would make that of it again in every layer, and keep
    # each for the backward.
    hidden = torch.arange(prefix + own)[None, :] > torch.arange(own)[:, None] + prefix
    return torch.zeros(own, prefix + own).masked_fill_(hidden, float("-inf"))


Plan = AttentionPlan | VarlenPlan


def plan_attention(pack: Pack, device: torch.device, dtype: torch.dtype, head_dim: int) -> Plan:
    """How the attention of a pack is computed: where there are kernels for it, in one call."""
    if takes_varlen(device, dtype, head_dim):
        return VarlenPlan(pack, device)
    return AttentionPlan(pack, device, dtype)


_plans: list[Plan] = []


@contextmanager
def attending(plan: Plan) -> Generator[None]:
    """Sets the plan that packed attention follows inside the block."""
    _plans.append(plan)
    try:
        yield
    finally:
        _plans.pop()


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (the signature is transformers'; the plan says it)
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [1, heads, tokens, head] to [1, tokens, heads, head].

    Raises:
        UnsupportedBaseError: the model asks for attention that is not plain and causal.
    """
    plan = _plans[-1]
    if softcap is not None or s_aux is not None or dropout:
        raise UnsupportedBaseError("bases with soft-capped or sink attention cannot be trained yet")
    if any(others.get(name) is not None for name in ("indices", "block_indices")):
        raise UnsupportedBaseError("bases that attend to chosen tokens cannot be trained yet")
    sliding_window = sliding_window or getattr(module, WINDOWS_NAME, None)
    if sliding_window is not None and plan.longest_key > sliding_window:
        raise UnsupportedBaseError(
            f"the base attends to the last {sliding_window} tokens only; lower max_length to that"
        )
    # Not states[0], whose gradient is a copy into zeros.
    queries, keys, values = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if isinstance(plan, VarlenPlan):
        return varlen_attention(plan, queries, keys, values, scaling).unsqueeze(0), None
    if plan.gathers_queries:
        queries = _TakeQueries.apply(queries, plan)
    if plan.gathers_keys:
        keys = _TakeKeys.apply(keys, plan)
        values = _TakeKeys.apply(values, plan)
    groups = queries.shape[1] // keys.shape[1]
    if keys.is_cuda and groups > 1:
        # torch's fused kernels for float32 and for masks want as many heads as the queries have.
        keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
    attended = [
        F.scaled_dot_product_attention(
            _rectangle(query_rows, call.examples),
            _rectangle(key_rows, call.examples),
            _rectangle(value_rows, call.examples),
            attn_mask=call.mask,
            is_causal=call.mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        .transpose(1, 2)
        .flatten(0, 1)
        for call, query_rows, key_rows, value_rows in zip(
            plan.calls,
            queries.split(plan.query_rows),
            keys.split(plan.key_rows),
            values.split(plan.key_rows),
            strict=True,
        )
    ]
    outputs = attended[0] if len(attended) == 1 else torch.cat(attended)
    if plan.gathers_queries:
        outputs = _PutBack.apply(outputs, plan)
    return outputs.unsqueeze(0), None


def _rectangle(rows: Tensor, examples: int) -> Tensor:
    """[examples * length, heads, head] -> [examples, heads, length, head]."""
    return rows.unflatten(0, (examples, -1)).transpose(1, 2)


def _noting_windows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        setattr(module, WINDOWS_NAME, int(attention_mask))
    return packed_attention(module, query, key, value, None, **others)


def _window(*_: Any, local_size: int | None = None, **__: Any) -> Tensor | None:
    """In place of a mask, how many tokens it lets each one see; None where that is all before."""
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionInterface.register(WINDOWS_NAME, _noting_windows)
AttentionMaskInterface.register(WINDOWS_NAME, _window)
