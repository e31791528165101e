"""What a base model is: a fingerprint of everything that decides what its adapters mean.

An adapter is only right on the base it was trained on, asked through the same tokenizer, chat
template and stop tokens. The fingerprint covers all of these, so that a mismatch is refused.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from manylora_registry.errors import BaseError

CONTENT_SAMPLE_BYTES = 4096
VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_model_name_or_path", "transformers_version"})
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class BaseModelIdentity:
    """A base model, known by what it is and not by what it is called."""

    fingerprint: str
    """`sha256:` and 64 hexadecimal digits."""
    tensors: dict[str, tuple[int, ...]]
    """Shape of every weight by its name, to check an adapter's modules against."""


def identify_base(directory: Path) -> BaseModelIdentity:
    """Fingerprints the Hugging Face model in `directory`.

    Covered: model and generation config, tokenizer files, chat template, and of every weight its
    name, dtype, shape and first 4 KiB. Sampling the content keeps this under a second for any
    size of model and still tells a fine-tuned base from the original, as tuning moves every
    weight it touches.

    Raises:
        BaseError: the directory is not a safetensors model with a config and a tokenizer.
    """
    for required in ("config.json", "tokenizer_config.json"):
        if not (directory / required).is_file():
            raise BaseError(
                f"{directory} is not a base model: it has no {required}. Give a Hugging Face model "
                "directory, or make one with `manylora base fetch smollm2-135m DIR`."
            )
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BaseError(
            f"{directory} has no *.safetensors weights; other weight formats are not read."
        )
    digest = hashlib.sha256()
    for name in JSON_FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0" + _canonical_json(directory / name) + b"\0")
    for name in TEXT_FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0")
            digest.update(hashlib.sha256((directory / name).read_bytes()).digest())
    tensors: dict[str, tuple[int, ...]] = {}
    entries = sorted(entry for file in files for entry in _weights(file))
    for name, dtype, shape, sample in entries:
        tensors[name] = shape
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode() + sample)
    return BaseModelIdentity(f"sha256:{digest.hexdigest()}", tensors)


def _canonical_json(path: Path) -> bytes:
    try:
        data: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise BaseError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict):
        entries = cast("dict[str, Any]", data)
        data = {key: value for key, value in entries.items() if key not in VOLATILE_CONFIG_KEYS}
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _weights(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and first bytes of each tensor of one safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise BaseError(f"{path} is not a whole safetensors file.")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                sample = file.read(min(end - start, CONTENT_SAMPLE_BYTES))
                yield name, entry["dtype"], tuple(entry["shape"]), sample
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseError(f"{path} is not a readable safetensors file: {error}") from error
