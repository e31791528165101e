"""How much memory a step takes, from a base's shapes alone, and how much there is."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.base_config import text_config_of
from manylora_trainer.errors import DeviceMemoryError, UnsupportedBaseError
from manylora_trainer.recipe import Recipe
from manylora_trainer.targets import linears_of, targets_of, trainable_parameters

ACTIVATION_SHARE = 0.4
"""Of a machine's memory, which is for other things too."""
ACTIVATION_SHARE_ON_GPU = 0.8
"""Of what a GPU has beside base, adapters and optimisers; logits and the allocator need some."""
PACK_TOKENS = (2048, 1024, 512)
"""The first that fits is taken. Smaller ones are slower: docs/benchmarks.md."""
PACK_SHARE = 0.5
"""Of the room for activations on a CPU, which packs may take; longer examples may take all."""
PACK_TOKENS_ON_GPU = (16384, 8192, 4096, 2048)
"""Likewise. Few are over before the processor has handed over the next."""
FLOAT32 = torch.float32.itemsize
LOGITS_CHUNK = 256
"""Predictions whose logits exist at one time, where the head is trained too."""
HEAD_ROWS, HEAD_BLOCK = 512, 2048
"""Predictions and tokens of the vocabulary whose logits exist at one time under a frozen head."""
LOGITS_CHUNK_ON_GPU = 1024
"""There fewer would not fill it; 0.6 GB at a time for a vocabulary of 150,000."""
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of a weight: its bits, its share of a block's scale, and of the scale of 256 of those (section 3
of https://arxiv.org/abs/2305.14314)."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@contextmanager
def stating_memory_faults(pack_tokens: int, how_to_resume: str) -> Generator[None]:
    """States it as one line with what to do, when a GPU has no memory left.

    Raises:
        DeviceMemoryError: instead of torch's error from inside the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the GPU is out of memory with training.pack_tokens {pack_tokens}: lower that, set "
            "training.gradient_checkpointing to on or training.quantization to nf4, or shorten "
            "max_length. The last checkpoint is whole; allow the change and go on with: "
            f"{how_to_resume}"
        ) from error


@dataclass(frozen=True)
class Architecture:
    """What counts of a base's shapes; widths are features of a token."""

    layers: int
    hidden: int
    queries: int
    """Of all heads together, as what attention gives."""
    keys: int
    """Of all key heads together; values have as many."""
    inner: int
    """Of the MLP."""
    vocabulary: int
    linear_weights: int
    """Of the linear layers that adapters may target."""
    weights: int
    """Of everything."""


def architecture_of(base: Path, identity: BaseModelIdentity) -> Architecture:
    """Reads the shapes from a base's configuration and its weight index.

    Raises:
        UnsupportedBaseError: its configuration cannot be used.
    """
    text = text_config_of(base)
    try:
        hidden: int = text.hidden_size
        heads: int = text.num_attention_heads
        width: int = getattr(text, "head_dim", None) or hidden // heads
        return Architecture(
            layers=text.num_hidden_layers,
            hidden=hidden,
            queries=heads * width,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
            inner=getattr(text, "intermediate_size", None) or 4 * hidden,
            vocabulary=text.vocab_size,
            linear_weights=sum(out * into for out, into in linears_of(identity).values()),
            weights=sum(math.prod(shape) for shape in identity.tensors.values()),
        )
    except AttributeError as error:
        raise UnsupportedBaseError(f"{base}: its config.json cannot be used: {error}") from error


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of the base on a device; see docs/decisions/0006-precision-and-compilation.md."""
    if recipe.kind == "full":
        return torch.float32
    match recipe.training.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32


def activation_dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of what lies between the base's products; see `keep_activations_in_float32`."""
    return torch.float32 if device.type == "cpu" else dtype_of(recipe, device)


def logits_chunk(device: torch.device) -> int:
    """Predictions whose logits exist at one time on a device."""
    return LOGITS_CHUNK_ON_GPU if device.type == "cuda" else LOGITS_CHUNK


def logits_at_once(recipe: Recipe, device: torch.device, tokens: int, vocabulary: int) -> int:
    """How many logits of a pack of that many tokens exist at one time."""
    if device.type == "cuda" or recipe.kind == "full":
        return min(tokens, logits_chunk(device)) * vocabulary
    return min(tokens, HEAD_ROWS) * min(vocabulary, HEAD_BLOCK)


def trained_parameters(recipe: Recipe, identity: BaseModelIdentity) -> dict[str, int]:
    """Weights of every task's adapter, by its name."""
    linears = linears_of(identity)
    return {
        task.name: trainable_parameters(targets_of(task, linears), task.lora.rank)
        for task in recipe.tasks
    }


@dataclass(frozen=True)
class Footprint:
    """What a run takes on a device, and how much of a step it computes at once there."""

    recipe: Recipe
    shapes: Architecture
    parameters: Mapping[str, int]
    """`trained_parameters`; of no meaning where the base itself is trained."""
    device: torch.device
    began_with: int | None = None
    """The `pack_tokens` of a run that is resumed: other packs would round differently."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        identity: BaseModelIdentity,
        device: torch.device,
        began_with: int | None = None,
    ) -> "Footprint":
        """Of a recipe whose base has this identity.

        Raises:
            UnsupportedBaseError: the base's configuration cannot be used.
        """
        shapes = architecture_of(recipe.base, identity)
        return cls(recipe, shapes, trained_parameters(recipe, identity), device, began_with)

    @property
    def base_bytes(self) -> int:
        """The base's weights."""
        wide = dtype_of(self.recipe, self.device).itemsize
        if self.recipe.training.quantization == "none":
            return self.shapes.weights * wide
        others = self.shapes.weights - self.shapes.linear_weights
        return round(self.shapes.linear_weights * NF4_BYTES) + others * wide

    @property
    def adapter_bytes(self) -> int:
        """What is trained beside the base, its gradients, and the last weights that were sound."""
        return (2 if self.recipe.kind == "full" else 3) * self._trained * FLOAT32

    @property
    def optimizer_bytes(self) -> int:
        """Two running means of everything that is trained."""
        return 2 * self._trained * FLOAT32

    @property
    def _trained(self) -> int:
        """Weights that learn."""
        full = self.recipe.kind == "full"
        return self.shapes.weights if full else sum(self.parameters.values())

    @cached_property
    def pack_tokens(self) -> int:
        """Tokens in one forward: as the recipe says, or as many as suit the device."""
        given = self.recipe.training.pack_tokens or self.began_with
        if given is not None:
            return given
        recomputing = self.recipe.training.gradient_checkpointing
        if self.device.type == "cpu":
            choices, room, recomputed = PACK_TOKENS, PACK_SHARE * self._room, recomputing == "on"
        else:
            choices, room, recomputed = PACK_TOKENS_ON_GPU, self._room, recomputing != "off"
        for tokens in choices:
            if self.activation_bytes(tokens, recomputed=recomputed) <= room:
                return tokens
        return choices[-1]

    @property
    def largest_pack(self) -> int:
        """Tokens of the largest forward that the recipe's limits allow."""
        return max(self.pack_tokens, *(task.max_length for task in self.recipe.tasks))

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward instead of being kept."""
        if self.recipe.training.gradient_checkpointing != "auto":
            return self.recipe.training.gradient_checkpointing == "on"
        return self.activation_bytes(self.largest_pack, recomputed=False) > self._room

    def activation_bytes(self, tokens: int, *, recomputed: bool) -> int:
        """What the backward of a pack of `tokens` keeps."""
        dtype = activation_dtype_of(self.recipe, self.device)
        return kept_bytes(self.shapes, tokens, dtype, recomputed=recomputed)

    @property
    def _room(self) -> float:
        """Bytes that activations may take; what needs more is computed again instead of kept."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            taken = self.base_bytes + self.adapter_bytes + self.optimizer_bytes
            return ACTIVATION_SHARE_ON_GPU * (total - taken)
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        try:
            return ACTIVATION_SHARE * min(physical, int(CGROUP_LIMIT.read_text()))
        except (OSError, ValueError):
            # No control group, or one without a limit ("max").
            return ACTIVATION_SHARE * physical


def kept_bytes(
    shapes: Architecture, tokens: int, dtype: torch.dtype, *, recomputed: bool = False
) -> int:
    """About what the backward of a pack of `tokens` keeps.

    Of every layer and token: what enters and leaves its two norms, queries, keys, values and what
    attention gives, and three vectors within the MLP (a gate that is not SiLU's keeps a fourth,
    which is not reckoned). Norms compute in float32, so a narrower type is kept once more in that
    one. Recomputed, that is of one layer at a time, and of all others what enters them.
    """
    vectors = 4 * shapes.hidden + 2 * shapes.queries + 2 * shapes.keys + 3 * shapes.inner
    layer = tokens * vectors * dtype.itemsize
    if dtype.itemsize < torch.float32.itemsize:
        layer += tokens * 2 * shapes.hidden * torch.float32.itemsize
    if not recomputed:
        return shapes.layers * layer
    return shapes.layers * tokens * shapes.hidden * dtype.itemsize + layer
