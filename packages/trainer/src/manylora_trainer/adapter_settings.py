"""Settings of one adapter's weights: their shape, and how they are optimised.

What the serving engine would refuse later (its LoRA loader's rules) is refused here.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from manylora_registry.config import ConfigModel

MAX_RANK = 512
"""The largest LoRA rank the serving engine can be configured for."""
UNSERVABLE_MODULES = frozenset({"lm_head", "embed_tokens", "wte", "embed_out"})
"""Adapters on these need extra weights saved beside them, which the engine refuses."""

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Lora(ConfigModel):
    """Shape of one adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Inner dimension r."""
    alpha: int = Field(default=16, ge=1)
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    dropout: Decay = 0.0
    """Share of each layer's inputs that the adapter, not the base, does without in training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear`, or names of linear layers such as `[q_proj, v_proj]`."""
    init_weights: Literal["kaiming", "pissa", "eva"] = "kaiming"
    """How fresh weights begin. kaiming: A by chance, B zero. pissa: as the principal part of the
    base's weights; saved as a plain adapter of twice the rank and alpha, which holds the difference
    to where it began. eva: A along the inputs' main directions over the task's first batches."""
    init_from: Path | None = None
    """Directory of an adapter of the same shape to go on from, relative to the recipe. None: fresh
    weights."""

    @property
    def saved_rank(self) -> int:
        """Of the adapter as it is saved."""
        return 2 * self.rank if self.init_weights == "pissa" else self.rank

    @property
    def saved_alpha(self) -> int:
        """Of the adapter as it is saved."""
        return 2 * self.alpha if self.init_weights == "pissa" else self.alpha

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def relative_to(self, directory: Path) -> "Lora":
        """The same with `init_from` found from `directory`."""
        if self.init_from is None:
            return self
        return self.model_copy(update={"init_from": directory / self.init_from.expanduser()})

    @model_validator(mode="after")
    def _starts_in_one_way(self) -> "Lora":
        if self.init_weights != "kaiming" and self.init_from is not None:
            raise ValueError("init_weights is for fresh weights: remove it or init_from")
        if self.saved_rank > MAX_RANK:
            raise ValueError(
                f"pissa is saved at twice the rank, and {self.saved_rank} is more than the "
                f"{MAX_RANK} that the serving engine takes"
            )
        if self.init_weights == "pissa" and self.use_rslora:
            raise ValueError("pissa doubles the rank when saved, which use_rslora would rescale")
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_of_linears(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError(
                "must be all-linear or a list of module names such as [q_proj, v_proj]"
            )
        names: list[str] = []
        for name in cast("Sequence[Any]", value):
            if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
                raise ValueError(f"{name!r} is not a module name such as q_proj")
            if name.rsplit(".", 1)[-1] in UNSERVABLE_MODULES:
                raise ValueError(
                    f"{name!r} cannot be adapted: the serving engine takes adapters of the "
                    "linear layers between the embedding and the head only"
                )
            names.append(name)
        return tuple(sorted(set(names)))


class Optimizer(ConfigModel):
    """How one adapter is optimised, alone: nothing here is shared with other tasks."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """AdamW or SGD with momentum, both with decoupled weight decay
    (https://arxiv.org/abs/1711.05101)."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    lora_plus_ratio: float = Field(default=1.0, gt=0.0)
    """LoRA B learns this many times as fast as A (LoRA+, https://arxiv.org/abs/2402.12354)."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Course after the warm-up. linear and cosine fall to 0 all the way; wsd stays at its peak and
    falls to 0 over the last steps (https://arxiv.org/abs/2404.06395)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate climbs to its peak."""
    warmup_share: Decay = 0.0
    """Instead of `warmup_steps`: the same as a share of all steps."""
    decay_share: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of all steps over which wsd falls."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay of the running mean and of the running square."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """AdamW adds it to the root of the running square."""
    momentum: Decay = 0.9
    """SGD's share of the last update that is taken again."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """The adapter's gradient is scaled down to this L2 norm; null: never."""
    normalizer: Literal["tokens", "examples"] = "tokens"
    """What a step's loss is the mean of: tokens, every trained token weighs the same; examples,
    every example does, however long its answer."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a training of `steps`."""
        return self.warmup_steps or int(self.warmup_share * steps)

    @model_validator(mode="after")
    def _one_warmup(self) -> "Optimizer":
        if self.warmup_steps and self.warmup_share:
            raise ValueError("give either warmup_steps or warmup_share")
        return self


class EarlyStopping(ConfigModel):
    """An adapter ends when its validation loss gets no better; the best weights are kept."""

    patience: int = Field(default=3, ge=1)
    """Validations in a row without a gain after which the adapter ends."""
    min_delta: float = Field(default=0.0, ge=0.0)
    """A validation loss is a gain if it is lower than the best one by more than this."""
