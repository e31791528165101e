"""Settings of one adapter's weights: their shape, and how they are optimised.

What the serving engine would refuse later (its LoRA loader's rules) is refused here.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator

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
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear`, or names of linear layers such as `[q_proj, v_proj]`."""
    init_from: Path | None = None
    """Directory of an adapter of the same shape to go on from, relative to the recipe. None: fresh
    weights."""

    def relative_to(self, directory: Path) -> "Lora":
        """The same with `init_from` found from `directory`."""
        if self.init_from is None:
            return self
        return self.model_copy(update={"init_from": directory / self.init_from.expanduser()})

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
    """AdamW (https://arxiv.org/abs/1711.05101) and its schedule, for one adapter alone."""

    learning_rate: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate climbs to its peak."""
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean and of the running square."""
    epsilon: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Added to the root of the running square."""
    clip_norm: float | None = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """The adapter's gradient is scaled down to this L2 norm; null: never."""
