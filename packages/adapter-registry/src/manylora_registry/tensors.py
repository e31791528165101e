"""Safetensors, read with hard limits: https://github.com/huggingface/safetensors#format.

A header is untrusted JSON that tells where to read, so everything in it is checked against the
file before anything is read: sizes, shapes, offsets without gap or overlap.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from manylora_registry.errors import Problem
from manylora_registry.json_objects import distinct

HEADER_BYTES = 16 << 20
TENSORS = 65_536
PARSED_VALUES = 16 * TENSORS
"""Of all JSON values in a header: two bytes of text can become an object of a hundred."""
DIMENSIONS = 8
SCAN_BYTES = 256 << 10
"""Read at once to be looked through: what fits into the cache of a core."""
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""Dtypes an adapter may have, and their bytes."""
LARGEST = {
    "F32": (np.uint32(0x7FFFFFFF), np.uint32(0x477FE000)),
    "F16": (np.uint16(0x7FFF), np.uint16(0x7BFF)),
    "BF16": (np.uint16(0x7FFF), np.uint16(0x477F)),
}
"""All bits but the sign's, and those of 65504, float16's largest, or of what is next below.

Bits without the sign are in the order of their values in IEEE 754, infinity and NaN last.
"""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int


def read_header(path: Path) -> tuple[list[Tensor], list[Problem]]:
    """The tensors of the safetensors file at `path`, and everything wrong with its structure."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            return [], [Problem(path.name, "is not a safetensors file: its header length is wrong")]
        text = file.read(length)
    if sum(text.count(mark) for mark in (b"[", b"{", b",")) > PARSED_VALUES:
        return [], [Problem(path.name, "is not a safetensors file: its header holds too much")]
    try:
        header: Any = json.loads(text.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        return [], [Problem(path.name, f"is not a safetensors file: its header is wrong: {error}")]
    if not isinstance(header, dict):
        return [], [Problem(path.name, "is not a safetensors file: its header is no object")]
    entries = cast("dict[str, Any]", header)
    if not _is_metadata(entries.pop("__metadata__", {})):
        return [], [Problem(path.name, "has __metadata__ that is no map of texts to texts")]
    if len(entries) > TENSORS:
        return [], [Problem(path.name, f"has {len(entries)} tensors; {TENSORS} are the limit")]
    tensors: list[Tensor] = []
    problems: list[Problem] = []
    for name, entry in entries.items():
        found = _tensor(name, entry, 8 + length, size)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            tensors.append(found)
    if not problems:
        problems = _layout(path.name, tensors, 8 + length, size)
    return tensors, problems


def read_tensor(path: Path, tensor: Tensor) -> NDArray[np.floating[Any]]:
    """The values of one tensor, in its shape; BF16 as float32."""
    with path.open("rb") as file:
        file.seek(tensor.start)
        content = file.read(tensor.end - tensor.start)
    if tensor.dtype == "BF16":
        # Its bits are the upper half of a float32's.
        wide = np.frombuffer(content, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tensor.shape)
    return np.frombuffer(content, "<f4" if tensor.dtype == "F32" else "<f2").reshape(tensor.shape)


def find_too_large(path: Path, tensors: Sequence[Tensor]) -> list[Problem]:
    """Names the tensors with a NaN, an infinity or a value beyond float16's largest.

    Reads every weight, in constant memory. Products with such values overflow within the model,
    and a NaN that has come into an engine's attention cache reaches requests of others.
    """
    # One buffer for all: fresh memory for each piece costs as much as reading it.
    buffer = memoryview(bytearray(SCAN_BYTES))
    with path.open("rb", buffering=0) as file:
        return [
            Problem(tensor.name, "holds a NaN, an infinity or a value beyond 65504")
            for tensor in tensors
            if _has_too_large(file, tensor, buffer)
        ]


def _has_too_large(file: FileIO, tensor: Tensor, buffer: memoryview) -> bool:
    magnitude, largest = LARGEST[tensor.dtype]
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        count = file.readinto(buffer[: min(left, SCAN_BYTES)])
        left -= count
        # numpy goes through halves one by one, but compares bits many at once.
        bits = np.frombuffer(buffer[:count], magnitude.dtype.newbyteorder("<"))
        if ((bits & magnitude) > largest).any():
            return True
    return False


def _tensor(name: str, entry: Any, data: int, size: int) -> Tensor | Problem:
    """One header entry, checked; `data` is where the weights begin in a file of `size` bytes."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return Problem(name, "has no dtype, shape and data_offsets in the header")
    if not _is_unicode(name):
        return Problem(name, "is no name")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return Problem(name, f"is {str(dtype)[:20]}; allowed are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not 1 <= len(cast("list[Any]", shape)) <= DIMENSIONS:
        return Problem(name, "has a shape that is no list of sizes")
    sizes = cast("list[Any]", shape)
    if not all(type(value) is int and 0 < value < 1 << 40 for value in [*sizes]):
        return Problem(name, "has a shape with a size that is no positive number")
    if not all(type(value) is int for value in (start, end)) or not 0 <= start <= end:
        return Problem(name, "has data_offsets that are no range")
    if data + end > size:
        return Problem(name, "ends behind the end of the file")
    if math.prod(sizes) * DTYPES[dtype] != end - start:
        return Problem(name, f"has {end - start} bytes, which does not fit its shape {sizes}")
    return Tensor(name, dtype, tuple(sizes), data + start, data + end)


def _layout(file: str, tensors: Sequence[Tensor], data: int, size: int) -> list[Problem]:
    """No byte belongs to two tensors or to none: nothing can hide in the file."""
    at = data
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != at:
            return [Problem(tensor.name, "overlaps another tensor or leaves a gap before it")]
        at = tensor.end
    return [] if at == size else [Problem(file, f"has {size - at} bytes behind its last tensor")]


def _is_metadata(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    pairs = cast("dict[Any, Any]", value)
    return all(
        isinstance(text, str) and _is_unicode(text) for pair in pairs.items() for text in pair
    )


def _is_unicode(text: str) -> bool:
    """Whether it is more than Python's idea of a text: JSON can write halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
