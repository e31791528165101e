"""A tiny base and adapters for it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from manylora_registry import BaseModelIdentity, Registry

BASE = BaseModelIdentity(
    fingerprint="sha256:" + "b" * 64,
    tensors={
        "model.embed_tokens.weight": (32, 8),
        "model.norm.weight": (8,),
        "model.layers.0.q_proj.weight": (8, 8),
        "model.layers.0.up_proj.weight": (16, 8),
    },
)
Arrays = Mapping[str, np.ndarray]
AdapterMaker = Callable[..., Path]


@pytest.fixture
def base() -> BaseModelIdentity:
    return BASE


@pytest.fixture
def base_directory(tmp_path: Path) -> Path:
    """A Hugging Face directory with the tiny base's weights."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "_name_or_path": "x"}')
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    weights = {name: np.ones(shape, np.float32) for name, shape in BASE.tensors.items()}
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture
def make_adapter(tmp_path: Path) -> AdapterMaker:
    """Writes an adapter directory of rank 2 for the tiny base; `seed` decides its weights."""

    def make(
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        tensors: Arrays | None = None,
        card: str | None = None,
    ) -> Path:
        directory = tmp_path / f"adapter-{len(list(tmp_path.glob('adapter-*')))}"
        directory.mkdir()
        written = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": BASE.fingerprint,
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "up_proj"],
            "bias": "none",
            **(config or {}),
        }
        (directory / "adapter_config.json").write_text(json.dumps(written))
        save_file(
            {**plain_tensors(seed), **(tensors or {})}, directory / "adapter_model.safetensors"
        )
        if card is not None:
            (directory / "README.md").write_text(card)
        return directory

    return make


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return plain_tensors(0)


@pytest.fixture
def registry(tmp_path: Path):
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


def plain_tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0"
    return {
        f"{prefix}.{module}.{side}.weight": rng.normal(size=shape).astype(np.float32)
        for module, out in (("q_proj", 8), ("up_proj", 16))
        for side, shape in (("lora_A", (2, 8)), ("lora_B", (out, 2)))
    }
