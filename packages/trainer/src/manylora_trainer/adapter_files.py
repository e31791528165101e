"""One adapter as files in PEFT's format, which serving engines and PEFT itself read."""

# safetensors' torch half is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from manylora_trainer.durable import write_directory, write_tensors
from manylora_trainer.errors import InitialAdapterError
from manylora_trainer.recipe import Task
from manylora_trainer.targets import Shapes, last_names

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"


def save_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    task: Task,
    targets: Shapes,
    base_fingerprint: str,
    card: str,
) -> int:
    """Writes `directory`, whole or not at all; returns the bytes of the weights.

    `card` is the text of the adapter's README.

    Nothing in it depends on time or place: equal training gives equal files.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_fingerprint,
        "r": task.lora.saved_rank,
        "lora_alpha": task.lora.saved_alpha,
        "lora_dropout": 0.0,
        "target_modules": _config_targets(task, targets),
        "bias": "none",
        "use_rslora": task.lora.use_rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }

    def fill(temporary: Path) -> None:
        write_tensors(temporary / WEIGHTS_FILE, tensors)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")

    write_directory(directory, fill)
    return (directory / WEIGHTS_FILE).stat().st_size


@dataclass(frozen=True)
class InitialAdapter:
    """The weights that a task goes on from."""

    tensors: Mapping[str, Tensor]
    """By their PEFT names."""
    digest: str
    """`sha256:…` of the file they stand in."""


def read_initial(task: Task, targets: Shapes, base_fingerprint: str) -> InitialAdapter | None:
    """The adapter a task goes on from; None where it starts fresh.

    Raises:
        InitialAdapterError: they cannot be read, or belong to another base, rank, alpha or targets.
    """
    directory, rank = task.lora.init_from, task.lora.rank
    if directory is None:
        return None
    try:
        config = json.loads((directory / CONFIG_FILE).read_bytes())
        content = (directory / WEIGHTS_FILE).read_bytes()
        tensors = load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise InitialAdapterError(
            f"task {task.name}: init_from {directory} cannot be read as an adapter: {error}"
        ) from error
    wanted = {
        "base_model_name_or_path": base_fingerprint,
        "r": rank,
        "lora_alpha": task.lora.alpha,
        "use_rslora": task.lora.use_rslora,
    }
    problems = [
        f"its {key} is {config.get(key)}, not {value}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (out, into) in targets.items():
        shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, into)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (out, rank)
    if not problems and {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        problems.append("it changes other modules than target_modules names")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        problems.append("it has weights that are not finite")
    if problems:
        raise InitialAdapterError(f"task {task.name}: init_from {directory}: {'; '.join(problems)}")
    return InitialAdapter(tensors, f"sha256:{hashlib.sha256(content).hexdigest()}")


def _config_targets(task: Task, targets: Shapes) -> list[str]:
    wanted = task.lora.target_modules
    # As PEFT saves all-linear: spelled out, because readers differ in what they take it for.
    return last_names(targets) if isinstance(wanted, str) else sorted(wanted)
