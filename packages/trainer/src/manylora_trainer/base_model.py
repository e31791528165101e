"""The frozen base: loading it, its hidden states of a pack, and the loss on top of them."""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedBaseClass=false

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from manylora_trainer.attention import ATTENTION_NAME, AttentionPlan, attending
from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.packing import Batch, Pack, pack_batches
from manylora_trainer.tokenization import Example

LOGITS_CHUNK = 256
"""Predictions whose logits exist at one time."""
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Losses:
    """What one pack adds to the losses."""

    total: Tensor
    """Sum over predictions of weight times cross-entropy; its gradient trains."""
    sums: Tensor
    """Summed cross-entropy of each adapter, unweighted, [adapters]."""


class BaseModel:
    """A frozen causal language model that reads packs."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Loads the base and checks that packs give the logits that transformers gives.

        Raises:
            UnsupportedBaseError: it cannot be loaded, or has features packs do not reproduce.
        """
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UnsupportedBaseError(f"{directory} cannot be loaded: {error}") from error
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.decoder: Any = model.get_decoder()
        self._embedding: nn.Embedding = model.get_input_embeddings()
        self._head: nn.Linear = model.get_output_embeddings()
        self._check_packing(directory)

    def hidden_states(self, pack: Pack) -> Tensor:
        """Final hidden states at the pack's predicting tokens, [targets, hidden]."""
        tokens = torch.from_numpy(pack.tokens).to(self.device)[None]
        positions = torch.from_numpy(pack.positions).to(self.device)[None]
        with attending(AttentionPlan(pack, self.device)):
            states = self.decoder(
                inputs_embeds=self._embedding(tokens), position_ids=positions, use_cache=False
            ).last_hidden_state
        return states[0].index_select(0, torch.from_numpy(pack.predicting).to(self.device))

    def losses(self, pack: Pack, weights: Tensor) -> Losses:
        """Cross-entropy of a pack; `weights` is the factor of each adapter, [adapters]."""
        targets = torch.from_numpy(pack.targets).to(self.device)
        adapters = torch.from_numpy(pack.target_adapters).to(self.device)
        total, sums = _HeadLoss.apply(
            self.hidden_states(pack), self._head.weight, self._head.bias, targets, adapters, weights
        )
        return Losses(total, sums)

    def logits(self, pack: Pack) -> Tensor:
        """Logits at the pack's predicting tokens, [targets, vocabulary]; for checks only."""
        return self._head(self.hidden_states(pack))

    @torch.no_grad()
    def _check_packing(self, directory: Path) -> None:
        """Compares a small pack with transformers' own forward, one example at a time.

        Catches whatever a model does besides plain causal attention and a linear head: scaled or
        capped logits, positions that do not restart, another kind of attention.
        """
        vocabulary = self._embedding.weight.shape[0]
        tokens = np.random.default_rng(0).integers(vocabulary, size=(2, 24)).astype(np.int32)
        tokens[1, :12] = tokens[0, :12]
        trained = np.arange(24) >= 16
        examples = [Example(row, trained) for row in tokens]
        (pack,) = pack_batches([Batch(0, examples)], 64)
        packed = self.logits(pack).float()
        self.model.set_attn_implementation("sdpa")
        try:
            stock = self.model(input_ids=torch.from_numpy(tokens).long().to(self.device)).logits
        finally:
            self.model.set_attn_implementation(ATTENTION_NAME)
        expected = stock[:, 15:-1].flatten(0, 1).float()
        # bfloat16 keeps 8 bits, and the two ways add up in another order.
        tolerance = PROBE_TOLERANCE if self._head.weight.dtype == torch.float32 else 0.1
        if (packed - expected).abs().max() > tolerance * expected.abs().max():
            raise UnsupportedBaseError(
                f"{directory}: packed examples do not give this model's own logits, so it cannot "
                "be trained here (it does more than causal attention and a linear head)"
            )


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in chunks; the gradient is made on the way, full logits never are.

    The head is frozen, so the gradient with respect to the hidden states is all there is to keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        adapters: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(targets), device=states.device)
        needs_gradient: bool = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if needs_gradient else None
        factors = weights[adapters]
        for start in range(0, len(targets), LOGITS_CHUNK):
            chunk = slice(start, start + LOGITS_CHUNK)
            wanted = targets[chunk, None]
            logits = F.linear(states[chunk], head, bias).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[chunk] = (normaliser - logits.gather(1, wanted))[:, 0]
            if gradient is not None:
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
                slope.mul_(factors[chunk, None])
                gradient[chunk] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        sums = torch.zeros_like(weights).index_add_(0, adapters, losses)
        ctx.mark_non_differentiable(sums)
        return (losses * factors).sum(), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None
