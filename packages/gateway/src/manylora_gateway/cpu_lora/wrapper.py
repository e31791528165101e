"""LoRA kernels for vLLM on a CPU: each row gets its own adapter, each weight is read once a batch.

vLLM's own (`PunicaWrapperCPU`) index the weights with slot -1, in Python the last slot, for rows
without an adapter, and copy a slot's weights once for each row.
"""

# ruff: noqa: ARG002 - the signatures are vLLM's
# Neither torch's members nor vLLM's are all typed.
# pyright: reportUnknownMemberType=false

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from manylora_gateway.cpu_lora.batch import Batch
from manylora_gateway.cpu_lora.kernel import FewRows
from manylora_gateway.cpu_lora.packing import LARGEST, pack
from manylora_gateway.cpu_lora.shortcut import install

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


class GroupedLoRAWrapper(PunicaWrapperBase):
    """What vLLM tells of each batch and calls from each of the model's layers.

    In the shapes below, rows are the batch's tokens (for the logits: its sampled positions), A is
    stacked as [slots, 1, rank, in] and B as [slots, 1, out, rank]. All write to `y` in place, and
    only in rows that have an adapter.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **_kwargs: Any,
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        install(GroupedLoRAWrapper)
        self._tokens = Batch([], 0)
        self._samples = Batch([], 0)
        self._layers: dict[int, FewRows] = {}

    def update_metadata(
        self,
        mapping: "LoRAMapping",
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Takes the next batch: once a step at most, before any layer."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        self._tokens = _batch(self.token_lora_indices, len(lora_index_to_id))
        self._samples = _batch(self.sampler_indices, len(lora_index_to_id))
        self.no_lora = self._tokens.bare

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds each row's x @ A @ B * scale to y, slice by slice.

        Args:
            y: [rows, sum of output_slices].
            x: [rows, in].
            lora_a_stacked: one for each slice.
            lora_b_stacked: one for each slice.
            scale: a factor; the adapters' own scaling is already in their B.
            output_slices: the width in y of each slice, as in its B.
            buffer: unused.
            **kwargs: unused.
        """
        self._add(self._tokens, y, x, lora_a_stacked, lora_b_stacked, scale)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """As `add_lora_linear` for one slice, where a row is a sampled position."""
        self._add(self._samples, y, x, (lora_a_stacked,), (lora_b_stacked,), scale)

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds (`add_inputs` false: writes) each row's x @ B; x [rows, rank] was looked up in A."""
        if add_inputs and not x.any():
            return  # nobody adapts the embedding, or not these tokens
        self.add_expand(y, (x,), (lora_b_stacked,), (y.shape[-1],), add_inputs=add_inputs)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Adds each row's x @ A * scale to y[i] [rows, rank] for each slice i (sharded layers)."""
        x = x.view(-1, x.shape[-1])
        for out, weights in zip(y, lora_a_stacked, strict=True):
            out = out.view(-1, out.shape[-1])
            for slot, rows in self._tokens.slots:
                shrunk = x[rows].to(out.dtype) @ weights[slot, 0].t().to(out.dtype)
                out.index_add_(0, rows, shrunk, alpha=scale)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds (`add_inputs` false: writes) each row's x[i] @ B to its slice i of y.

        The slices lie side by side in y from column `offset_start` on.
        """
        y = y.view(-1, y.shape[-1])
        start = offset_start
        for shrunk, weights, width in zip(x, lora_b_stacked, output_slices, strict=True):
            out = y[:, start : start + width]
            start += width
            for slot, rows in self._tokens.slots:
                b = weights[slot, 0].t().to(shrunk.dtype)
                expanded = (shrunk[rows] @ b).to(out.dtype)
                if add_inputs:
                    out.index_add_(0, rows, expanded)
                else:
                    out.index_copy_(0, rows, expanded)

    def apply_lora_full_linear(
        self,
        y: Tensor,
        x: Tensor,
        weight_stacked: Tensor,
        bias_stacked: Tensor,
        module_enabled: Tensor,
    ) -> None:
        """Writes x @ weight + bias to the rows whose slot has a whole classifier of its own."""
        for slot, rows in self._samples.slots:
            if module_enabled[slot]:
                whole = x[rows] @ weight_stacked[slot, 0].t()
                y.index_copy_(0, rows, whole.to(y.dtype) + bias_stacked[slot].to(y.dtype))

    def _add(
        self,
        batch: Batch,
        y: Tensor,
        x: Tensor,
        lora_a: tuple[Tensor, ...],
        lora_b: tuple[Tensor, ...],
        scale: float,
    ) -> None:
        if batch.bare:
            return
        few = self._layers.get(id(lora_a[0]))
        if few is None or not few.layer.holds((*lora_a, *lora_b)):
            few = FewRows(pack(lora_a, lora_b))
            # The layer holds the tensor, so that its id is not used again.
            self._layers[id(lora_a[0])] = few
        layer = few.layer
        if layer.empty:
            return
        if min(y.shape[0], x.shape[0]) < batch.size or y.shape[1] < layer.width:
            raise ValueError(
                f"A LoRA layer of {layer.width} outputs and a batch of {batch.size} rows do "
                f"not fit x {tuple(x.shape)} and y {tuple(y.shape)}."
            )
        if batch.has_few:
            _add_few(y, x, few, batch, scale)
        for slot, rows in batch.many:
            if layer.ranks[slot]:
                _add_many(y, x, lora_a, lora_b, slot, layer.ranks[slot], rows, scale)


def _batch(indices: Tensor, slots: int) -> Batch:
    return Batch(cast("list[int]", indices.tolist()), slots)


def _add_few(y: Tensor, x: Tensor, few: FewRows, batch: Batch, scale: float) -> None:
    """The kernel's product, whatever the types and strides of x and y."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.to(torch.float32).contiguous()
    if scale != 1.0:
        x = x * scale
    if y.dtype == torch.float32 and y.is_contiguous():
        few.add(y, x, batch)
    else:
        delta = torch.zeros(y.shape)
        few.add(delta, x, batch)
        y.add_(delta)


def _add_many(
    y: Tensor,
    x: Tensor,
    lora_a: tuple[Tensor, ...],
    lora_b: tuple[Tensor, ...],
    slot: int,
    rank: int,
    rows: slice | Tensor,
    scale: float,
) -> None:
    """Matrix products of one slot's rows, in the weights' own type, the sums bounded."""
    x = x[rows].to(lora_a[0].dtype)
    start = 0
    for a, b in zip(lora_a, lora_b, strict=True):
        out = y[:, start : start + b.shape[2]]
        start += b.shape[2]
        shrunk = x @ a[slot, 0, :rank].t()
        expand = b[slot, 0, :, :rank].t()
        # One more pass over the outputs costs a fifth of the product: only where it may be needed,
        # by the inequality of Cauchy and Schwarz.
        most = _norm(shrunk) * _norm(expand) * abs(scale)
        bound = LARGEST if not most < LARGEST else None
        if isinstance(rows, Tensor):
            out.index_copy_(0, rows, _bounded(out[rows].add_(shrunk @ expand, alpha=scale), bound))
        elif out.dtype == expand.dtype:
            _bounded(out[rows].addmm_(shrunk, expand, alpha=scale), bound)
        else:
            _bounded(out[rows].add_(shrunk @ expand, alpha=scale), bound)


def _norm(matrix: Tensor) -> float:
    return cast("Tensor", torch.linalg.vector_norm(matrix)).item()


def _bounded(sums: Tensor, bound: float | None) -> Tensor:
    return sums if bound is None else sums.clamp_(-bound, bound)
