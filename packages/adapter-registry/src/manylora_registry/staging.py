"""Takes an adapter directory into staging and finds everything wrong with it.

The files are copied first and the copies are checked, so that what was checked is what is
published, whoever writes to the directory meanwhile.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from manylora_registry.adapter_config import MAX_RANK, AdapterConfig, read_config
from manylora_registry.base import BaseModelIdentity
from manylora_registry.blobs import Copied, Staging, copy_hashed, open_regular
from manylora_registry.errors import InvalidAdapterError, Problem, WrongBaseError
from manylora_registry.manifest import (
    CARD_FILE,
    CONFIG_FILE,
    MEDIA_TYPES,
    WEIGHTS_FILE,
    AdapterFile,
    Manifest,
)
from manylora_registry.tensors import HEADER_BYTES, Tensor, find_too_large, read_header

SMALL_FILE_BYTES = 1 << 20
"""Limit of the config and of the card."""
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def stage_adapter(
    name: str,
    directory: Path,
    staging: Staging,
    base: BaseModelIdentity,
    noticed: Iterable[Problem],
) -> Manifest:
    """Copies the adapter in `directory` to `staging` and checks the copy.

    Args:
        name: what to call it in an error.
        directory: holds `adapter_config.json`, `adapter_model.safetensors` and perhaps
            `README.md`, and nothing else.
        staging: empty.
        base: the base model its modules must fit.
        noticed: problems found elsewhere, to be reported together with these.

    Raises:
        InvalidAdapterError: with every problem.
        WrongBaseError: it says itself that it was made for another base.
    """
    problems = [*noticed]
    copies = staging.directory
    files = _copy(directory, staging, largest_adapter(base), problems)
    config = None
    if CONFIG_FILE in files:
        config, found = read_config((copies / CONFIG_FILE).read_bytes())
        problems += found
    made_for = config.base_model_name_or_path if config else None
    if made_for and made_for.startswith("sha256:") and made_for != base.fingerprint:
        raise WrongBaseError(name, made_for, base.fingerprint)
    if WEIGHTS_FILE in files:
        tensors, found = read_header(copies / WEIGHTS_FILE)
        problems += found or _check_tensors(tensors, config, base)
        if not found:
            problems += find_too_large(copies / WEIGHTS_FILE, tensors)
    if problems or config is None:
        raise InvalidAdapterError(name, problems)
    described = {title: AdapterFile(title, file.digest, file.size) for title, file in files.items()}
    return Manifest(
        config=described.pop(CONFIG_FILE),
        layers=tuple(described[title] for title in (WEIGHTS_FILE, CARD_FILE) if title in described),
        base_fingerprint=base.fingerprint,
        rank=config.max_rank,
    )


def largest_adapter(base: BaseModelIdentity) -> int:
    """Bytes of the weights of an adapter of the highest rank on every linear layer of the base."""
    widths = sum(sum(shape) for shape in base.tensors.values() if len(shape) == 2)
    return HEADER_BYTES + widths * MAX_RANK * 4


def _copy(
    directory: Path, staging: Staging, largest: int, problems: list[Problem]
) -> dict[str, Copied]:
    """Copies the files an adapter may have; whatever else lies there is a problem."""
    try:
        found = sorted(entry.name for entry in os.scandir(directory))
    except OSError as error:
        problems.append(Problem(str(directory), f"cannot be read: {error.strerror}"))
        return {}
    problems += [
        Problem(title, "does not belong there; only " + ", ".join(MEDIA_TYPES) + " do")
        for title in found
        if title not in MEDIA_TYPES
    ]
    problems += [
        Problem(title, "is missing") for title in (CONFIG_FILE, WEIGHTS_FILE) if title not in found
    ]
    copies: dict[str, Copied] = {}
    for title in MEDIA_TYPES:
        if title not in found:
            continue
        limit = largest if title == WEIGHTS_FILE else SMALL_FILE_BYTES
        copied = _copy_file(directory / title, staging.directory / title, limit)
        if isinstance(copied, Problem):
            problems.append(copied)
        else:
            staging.settle(staging.directory / title)
            copies[title] = copied
    return copies


def _copy_file(source: Path, target: Path, limit: int) -> Copied | Problem:
    try:
        file = open_regular(source)
    except OSError as error:
        return Problem(source.name, str(error.strerror))
    with file:
        # Asked first: a file may say it is large, and hold nothing, for the price of nothing.
        if os.fstat(file.fileno()).st_size <= limit:
            copied = copy_hashed(file, target, limit)
            if copied.size <= limit:
                return copied
    return Problem(source.name, f"is larger than {limit} bytes")


def _check_tensors(
    tensors: list[Tensor], config: AdapterConfig | None, base: BaseModelIdentity
) -> list[Problem]:
    """Holds names and shapes against the base and, where that is readable, against the config."""
    if not tensors:
        return [Problem(WEIGHTS_FILE, "holds no tensor")]
    by_name = {tensor.name: tensor for tensor in tensors}
    problems: list[Problem] = []
    for tensor in tensors:
        module = module_of(tensor.name)
        weight = base.tensors.get(f"{module}.weight") if module else None
        if tensor.name.endswith(".base_layer.weight"):
            # PEFT adds it where an embedding or the head is adapted.
            what = "is the base's own: save_embedding_layers=False has PEFT leave it out"
        elif module is None:
            what = f"is not named {_PREFIX}MODULE{_A} or {_B}"
        elif weight is None:
            what = "adapts what the base does not have, or what shares the weight of another layer"
        elif len(weight) != 2 or module.endswith("embed_tokens"):
            what = "adapts what is no linear layer of the base"
        else:
            what = _misfit(tensor, module, weight, by_name, config)
        if what:
            problems.append(Problem(tensor.name, what))
    return problems


def module_of(tensor: str) -> str | None:
    """`base_model.model.MODULE.lora_A.weight` -> `MODULE`; None for a tensor named otherwise."""
    if not tensor.startswith(_PREFIX) or not tensor.endswith((_A, _B)):
        return None
    return tensor[len(_PREFIX) : -len(_A)] or None


def _misfit(
    tensor: Tensor,
    module: str,
    weight: tuple[int, ...],
    by_name: dict[str, Tensor],
    config: AdapterConfig | None,
) -> str | None:
    """What is wrong between one A or B and the [out, in] `weight` it adapts, if anything."""
    out, into = weight
    is_a = tensor.name.endswith(_A)
    other = tensor.name[: -len(_A)] + (_B if is_a else _A)
    if other not in by_name:
        return f"has no partner {other}"
    if config is None:
        side = -1 if is_a else 0
        if len(tensor.shape) != 2 or tensor.shape[side] != (into if is_a else out):
            return f"is {[*tensor.shape]}, which does not fit the base's {[out, into]}"
        return None
    if key := config.left_out_by(module):
        return f"adapts what the config's {key} leaves out"
    rank = config.rank_of(module)
    expected = (rank, into) if is_a else (out, rank)
    if tensor.shape != expected:
        return f"is {[*tensor.shape]}; rank {rank} on the base's {[out, into]} is {[*expected]}"
    return None
