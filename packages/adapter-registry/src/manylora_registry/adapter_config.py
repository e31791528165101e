"""`adapter_config.json` as PEFT writes it, held against what the engine computes.

The engine reads a few keys and ignores the others, so an adapter that needs an ignored one would
load and answer wrongly. Whatever changes the mathematics beyond plain LoRA is refused here.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
)

from manylora_registry.errors import Problem
from manylora_registry.json_objects import RepeatedKeyError, distinct
from manylora_registry.manifest import CONFIG_FILE

MAX_RANK = 512
"""The engine's largest."""
MAX_ALPHA = 65_536.0
"""A hundred times what anybody trains with; far above it weights times scaling overflow."""
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Named initial weights that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ do not."""
Number = TypeVar("Number", int, float)
Item = TypeVar("Item", int, str)
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")


def _unset(what: str) -> AfterValidator:
    """Accepts only values that mean "off"."""

    def check(value: Any) -> None:
        if value:
            raise ValueError(f"{what} cannot be served")

    return AfterValidator(check)


def _plain_init(value: Any) -> Any:
    if isinstance(value, str) and value.lower() not in PLAIN_INITS:
        raise ValueError(
            f"{value!r} changes the base's weights; convert it to plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return value


def _plain_pattern(value: str) -> str:
    # The engine runs each key as a regular expression over every module: a name cannot hang it.
    if not _PATTERN.fullmatch(value):
        raise ValueError(f"{value[:80]!r} must be the name, or the end of the name, of a module")
    return value


def _targets(value: list[str] | str) -> list[str] | str:
    if not value:
        raise ValueError("names no module")
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value[:80]!r} is no regular expression: {error}") from error
    return value


Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[FiniteFloat, Field(gt=0, le=MAX_ALPHA)]
Pattern = Annotated[str, AfterValidator(_plain_pattern)]
NullIsEmpty = BeforeValidator(lambda value: {} if value is None else value)


class AdapterConfig(BaseModel):
    """The keys that decide how an adapter is computed."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    """The fingerprint of the base where our trainer wrote it; a name or path elsewhere."""
    r: Rank
    lora_alpha: Alpha
    target_modules: Annotated[list[str] | str, AfterValidator(_targets)]
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: (
        Annotated[list[Pattern], Field(max_length=16)] | Pattern | Literal[""] | None
    ) = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=1024), NullIsEmpty] = {}
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=1024), NullIsEmpty] = {}
    bias: Literal["none"] = "none"
    use_rslora: bool | None = None
    init_lora_weights: Annotated[bool | str | None, AfterValidator(_plain_init)] = None
    use_dora: Annotated[Any, _unset("DoRA")] = None
    lora_bias: Annotated[Any, _unset("a bias in LoRA layers")] = None
    fan_in_fan_out: Annotated[Any, _unset("a base with transposed linear layers")] = None
    modules_to_save: Annotated[Any, _unset("fully trained modules")] = None
    trainable_token_indices: Annotated[Any, _unset("trained token embeddings")] = None
    target_parameters: Annotated[Any, _unset("LoRA on bare parameters")] = None
    layer_replication: Annotated[Any, _unset("layer replication")] = None
    alora_invocation_tokens: Annotated[Any, _unset("activated LoRA")] = None
    use_qalora: Annotated[Any, _unset("QALoRA")] = None
    use_bdlora: Annotated[Any, _unset("block-diagonal LoRA")] = None
    arrow_config: Annotated[Any, _unset("Arrow routing")] = None
    kasa_config: Annotated[Any, _unset("KaSA")] = None
    monteclora_config: Annotated[Any, _unset("MonteCLoRA")] = None
    vllm_max_position_embeddings: Annotated[Any, _unset("a context length of its own")] = None

    @property
    def max_rank(self) -> int:
        """What the engine must allow."""
        return max([self.r, *self.rank_pattern.values()])

    def rank_of(self, module: str) -> int:
        """The rank of one module; PEFT's rule: the first pattern that is its end at a dot."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """What multiplies B·A of one module: alpha over rank, or over its square root (rsLoRA)."""
        rank = self.rank_of(module)
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def left_out_by(self, module: str) -> str | None:
        """The key by which PEFT would not adapt `module`, if any does.

        A single string may be any pattern and is believed.
        """
        if isinstance(self.target_modules, list) and not _names(self.target_modules, module):
            return "target_modules"
        if isinstance(self.exclude_modules, list) and _names(self.exclude_modules, module):
            return "exclude_modules"
        chosen = self.layers_to_transform
        # PEFT adapts what is named in full whatever its layer.
        if chosen is None or chosen == [] or module in self.target_modules:
            return None
        if self._layer_of(module) in _listed(chosen):
            return None
        return "layers_to_transform"

    def _layer_of(self, module: str) -> int | None:
        """PEFT's rule: the first number behind a pattern, or behind any name if there is none."""
        patterns = _listed(self.layers_pattern) if self.layers_pattern else []
        for where in [rf"(?:^|.*?\.){name}" for name in patterns] or [r".*?\.[^.]*"]:
            if found := re.match(rf"{where}\.(\d+)\.", module):
                return int(found[1])
        return None


def _listed(value: Item | list[Item]) -> list[Item]:
    return value if isinstance(value, list) else [value]


def _names(names: list[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matching(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(content: bytes) -> tuple[AdapterConfig | None, list[Problem]]:
    """The config, if one can be made of it, and everything that is wrong with it."""
    twins = _twins(content)
    try:
        return AdapterConfig.model_validate_json(content), twins
    except ValidationError as error:
        problems = [
            Problem(_where(entry["loc"]), entry["msg"].removeprefix("Value error, "))
            for entry in error.errors(include_url=False)
        ]
        return None, twins + problems


def _twins(content: bytes) -> list[Problem]:
    """A key that an object has twice, of which every reader takes the last one in silence."""
    try:
        json.loads(content, object_pairs_hook=distinct)
    except RepeatedKeyError as error:
        return [Problem(CONFIG_FILE, str(error))]
    except (ValueError, RecursionError):
        # What is no JSON at all is told by who makes a config of it.
        pass
    return []


def _where(location: tuple[int | str, ...]) -> str:
    return " ".join([CONFIG_FILE, ".".join(str(part) for part in location)]).strip()
