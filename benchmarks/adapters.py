"""Random adapters that can be published."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from manylora_registry.base import BaseModelIdentity

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_random_adapter(
    directory: Path,
    base: BaseModelIdentity,
    rank: int,
    seed: int,
    targets: tuple[str, ...] = ALL,
) -> Path:
    """Writes one in PEFT's format; the same seed writes the same."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in sorted(base.tensors.items()):
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module.rpartition(".")[2] in targets:
            rows, columns = shape
            a = rng.standard_normal((rank, columns), dtype=np.float32) / columns**0.5
            b = rng.standard_normal((rows, rank), dtype=np.float32) * 0.02
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": base.fingerprint,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
