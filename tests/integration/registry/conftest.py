"""A tiny base and adapters for it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from manylora_registry import BaseModelIdentity

BASE = BaseModelIdentity(
    fingerprint="sha256:" + "b" * 64,
    tensors={
        "model.embed_tokens.weight": (32, 8),
        "model.norm.weight": (8,),
        "model.layers.0.q_proj.weight": (8, 8),
        "model.layers.0.up_proj.weight": (16, 8),
    },
)
AdapterMaker = Callable[[int], Path]


@pytest.fixture
def base() -> BaseModelIdentity:
    return BASE


@pytest.fixture
def make_adapter(tmp_path: Path) -> AdapterMaker:
    """Writes an adapter directory of rank 2 for the tiny base; `seed` decides its weights."""

    def make(seed: int) -> Path:
        directory = tmp_path / f"adapter-{seed}"
        directory.mkdir()
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": BASE.fingerprint,
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "up_proj"],
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(plain_tensors(seed), directory / "adapter_model.safetensors")
        return directory

    return make


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    """The tiny base as other processes read it."""
    file = tmp_path / "base.json"
    file.write_text(json.dumps(dataclasses.asdict(BASE)))
    return file


def plain_tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0"
    return {
        f"{prefix}.{module}.{side}.weight": rng.normal(size=shape).astype(np.float32)
        for module, out in (("q_proj", 8), ("up_proj", 16))
        for side, shape in (("lora_A", (2, 8)), ("lora_B", (out, 2)))
    }
