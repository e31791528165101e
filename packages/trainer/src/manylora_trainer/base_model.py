"""The frozen base: loading it, and its hidden states of a pack."""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedBaseClass=false

import functools
import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from manylora_trainer.attention import (
    ATTENTION_NAME,
    WINDOWS_NAME,
    AttentionPlan,
    attending,
    plan_attention,
)
from manylora_trainer.device import on_device
from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.frozen import computing_in_float32, keep_activations_in_float32
from manylora_trainer.fused import fuse_small_operations
from manylora_trainer.head import head_loss, trainable_head_loss
from manylora_trainer.packing import Batch, Pack, pack_batches
from manylora_trainer.positions import steady_positions
from manylora_trainer.tokenization import Example

PROBE_TOLERANCE = 1e-3


class BaseModel:
    """A frozen causal language model that reads packs."""

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        four_bit: bool = False,
    ) -> None:
        """Loads the base and checks that packs give the logits that transformers gives.

        With `four_bit` its linear layers are kept as NF4 (QLoRA, https://arxiv.org/abs/2305.14314).

        Raises:
            UnsupportedBaseError: it cannot be loaded, or has features packs do not reproduce.
        """
        placed = _four_bit(dtype, device) if four_bit else {}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                use_safetensors=True,
                **placed,
            )
        except (OSError, ValueError, KeyError) as error:
            # Models with attention classes of their own look for one by this name.
            why = "its attention takes no packs" if ATTENTION_NAME in str(error) else error
            raise UnsupportedBaseError(f"{directory} cannot be loaded: {why}") from error
        self.model: Any = (model if four_bit else model.to(device)).eval().requires_grad_(False)
        self.device = device
        with _stating_faults_of_the_model(directory, model.config.model_type):
            self.decoder: Any = model.get_decoder()
            self._embedding: nn.Embedding = model.get_input_embeddings()
            self._head: nn.Linear = model.get_output_embeddings()
            tokens = np.random.default_rng(0).integers(len(self._embedding.weight), size=(2, 24))
            tokens[1, :12] = tokens[0, :12]
            with computing_in_float32(self.model):
                expected = self._stock_logits(tokens)
            self._logit_factor = self._factor_of_logits(tokens, directory)
            if device.type == "cpu" and dtype != torch.float32:
                keep_activations_in_float32(self.model)
            fuse_small_operations(self.model, device)
            self._check_packing(tokens.astype(np.int32), expected, directory)

    def recompute_layers(self) -> None:
        """From now on keeps only what enters each layer (https://arxiv.org/abs/1604.06174).

        Raises:
            UnsupportedBaseError: the base does not show its layers.
        """
        layers: Any = getattr(self.decoder, "layers", None)
        if layers is None:
            raise UnsupportedBaseError(
                "this base does not show its layers; set training.gradient_checkpointing to off"
            )
        for layer in layers:
            # Nothing random is drawn in a layer: dropout follows from places.
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    @property
    def _head_dim(self) -> int:
        config = self.model.config.get_text_config()
        own: int | None = getattr(config, "head_dim", None)
        return own or config.hidden_size // config.num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of its activations."""
        return torch.float32 if self.device.type == "cpu" else self._head.weight.dtype

    @contextmanager
    def reading(self, pack: Pack) -> Generator[None]:
        """Attention follows this pack inside the block; forward and backward both belong there.

        Raises:
            UnsupportedBaseError: one of its examples would move the others' positions.
        """
        steady = steady_positions(self.model.config.get_text_config())
        if steady is not None and pack.positions.max() >= steady:
            raise UnsupportedBaseError(
                f"beyond {steady} tokens the base's positions depend on the longest example of a "
                "pack, so examples would change their neighbours; lower max_length to that"
            )
        with attending(plan_attention(pack, self.device, self.dtype, self._head_dim)):
            yield

    def hidden_states(self, pack: Pack) -> Tensor:
        """Final hidden states at the predicting tokens of the pack being read.

        [targets, hidden], times what the base multiplies its logits by.
        """
        tokens = on_device(pack.tokens, self.device)[None]
        positions = on_device(pack.positions, self.device)[None]
        states = self.decoder(
            inputs_embeds=self._embedding(tokens), position_ids=positions, use_cache=False
        ).last_hidden_state
        states = states.squeeze(0).index_select(0, on_device(pack.predicting, self.device))
        return states if self._logit_factor == 1.0 else states * self._logit_factor

    def cross_entropy(self, pack: Pack) -> Tensor:
        """Cross-entropy of each of the pack's targets, in nats, float32 [targets]."""
        targets = on_device(pack.targets, self.device)
        states = self.hidden_states(pack)
        if self._head.weight.requires_grad:
            return trainable_head_loss(states, self._head, targets)
        return head_loss(states, self._head.weight, self._head.bias, targets)

    @torch.no_grad()
    def logits(self, pack: Pack) -> Tensor:
        """Logits at the pack's predicting tokens, [targets, vocabulary]; for checks only."""
        with self.reading(pack):
            return self._head(self.hidden_states(pack))

    @torch.no_grad()
    def _stock_logits(self, tokens: NDArray[np.int64]) -> Tensor:
        """As transformers computes them, [examples, tokens, vocabulary]."""
        self.model.set_attn_implementation("eager")
        try:
            return self.model(input_ids=torch.from_numpy(tokens).to(self.device)).logits
        finally:
            self.model.set_attn_implementation(ATTENTION_NAME)

    def _factor_of_logits(self, tokens: NDArray[np.int64], directory: Path) -> float:
        """What the model multiplies its head's output by, seen by giving it another output.

        Raises:
            UnsupportedBaseError: it does something else to it, such as soft-capping.
        """
        given: list[Tensor] = []

        def ramp(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            values = torch.linspace(-32, 32, output.numel(), device=output.device)
            given.append(values.view_as(output))
            return given[-1]

        hook = self._head.register_forward_hook(ramp)
        try:
            logits = self._stock_logits(tokens)
        finally:
            hook.remove()
        (ramped,) = given
        # The last value is a power of two: nothing is rounded.
        factor = float(logits.flatten()[-1] / ramped.flatten()[-1])
        if not torch.allclose(logits.float(), ramped * factor, rtol=1e-5, atol=1e-5):
            raise UnsupportedBaseError(
                f"{directory} does more to its logits than a factor, such as a soft cap, so it "
                "cannot be trained here"
            )
        return factor

    @torch.no_grad()
    def _check_packing(self, tokens: NDArray[np.int32], expected: Tensor, directory: Path) -> None:
        """Compares a small pack with transformers' own forward, one example at a time.

        Catches whatever a model does besides plain causal attention and a linear head: positions
        that do not restart, another kind of attention, something carried from token to token.
        Both are computed in float32: in bfloat16 what leaks can be smaller than what is rounded,
        and rounding sends a token to another expert.
        """
        trained = np.arange(24) >= 16
        examples = [Example(row, trained) for row in tokens]
        (pack,) = pack_batches([Batch(0, examples)], 64)
        expected = expected[:, 15:-1].flatten(0, 1)
        plan = AttentionPlan(pack, self.device, torch.float32)
        self.model.set_attn_implementation(WINDOWS_NAME)
        with (
            computing_in_float32(self.model),
            torch.compiler.set_stance("force_eager"),
            attending(plan),
        ):
            packed: Tensor = self._head(self.hidden_states(pack))
        self.model.set_attn_implementation(ATTENTION_NAME)
        if (packed - expected).abs().max() > PROBE_TOLERANCE * expected.abs().max():
            raise UnsupportedBaseError(
                f"{directory}: packed examples do not give this model's own logits, so it cannot "
                "be trained here (it does more than causal attention and a linear head)"
            )
        if self.device.type == "cuda":
            # Functions are compiled here for a first length, so that a run that is resumed and
            # one that never was have all of theirs from the same kernels.
            self.logits(pack)


@contextmanager
def _stating_faults_of_the_model(directory: Path, kind: str) -> Generator[None]:
    """States it as one line, when a model's code is not what this trainer takes it for.

    Raises:
        UnsupportedBaseError: instead of whatever is raised inside the block.
    """
    try:
        yield
    except (UnsupportedBaseError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise UnsupportedBaseError(
            f"{directory}: a base of the kind {kind} cannot be trained here: computing a short "
            f"text with it fails ({type(error).__name__}: {why})"
        ) from error


def _four_bit(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers is told to load linear layers in four bits."""
    if device.type != "cuda":
        raise UnsupportedBaseError(
            "training.quantization: nf4 needs a GPU, and this machine has none; set it to none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedBaseError(
            "training.quantization: nf4 needs bitsandbytes: install manylora-trainer[qlora]"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}
