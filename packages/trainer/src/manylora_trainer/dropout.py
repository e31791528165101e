"""Dropout that is a function of who, when and where, not of what was drawn before.

Whether an input is dropped depends on the run's seed, the task, the step, the layer, the token's
place in the task's own batch and the feature, hashed together. So an adapter sees the same dropout
alone and together with others, in whatever packs, when activations are computed a second time, and
after a resume; and there is no generator to save.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import hashlib
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.uint32]

GOLDEN = 0x9E3779B1
FIRST = 0x85EBCA6B
SECOND = 0xC2B2AE35


def step_key(seed: int, task: str, step: int) -> int:
    """32 bits that stand for one step of one task."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/dropout/{step}".encode()).digest()[:4])


def layer_key(module: str) -> int:
    """32 bits that stand for a layer, signed."""
    return _signed(zlib.crc32(module.encode()))


def token_keys(key: int, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> Keys:
    """32 bits for each token of a step: of its sequence in the batch and its place in that."""
    keys = _mix(sequences.astype(np.uint32) * np.uint32(GOLDEN) + np.uint32(key))
    return _mix(keys + positions.astype(np.uint32) * np.uint32(GOLDEN))


def keep_mask(keys: Tensor, layer: int, width: int, dropout: float) -> Tensor:
    """True where an input is kept, [tokens, width].

    Args:
        keys: `token_keys` as int32, [tokens].
        layer: `layer_key` of the layer.
        width: features of the layer's input.
        dropout: share that is dropped.
    """
    # Not compiled on a GPU: for a fixed width the compiler was seen to choose otherwise.
    columns = torch.arange(width, dtype=torch.int32, device=keys.device) * _signed(GOLDEN)
    bits = _mix_tensor(keys ^ layer)[:, None] + columns
    # One more round is enough: a product's high bits, which decide, depend on all bits below.
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(FIRST))
    return bits >= int(dropout * 2**32) - 2**31


def _mix(values: Keys) -> Keys:
    """The finaliser of MurmurHash3, which spreads each bit over all of 32."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(FIRST)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(SECOND)
    return values ^ (values >> np.uint32(16))


def _mix_tensor(values: Tensor) -> Tensor:
    """The same on int32; torch shifts the sign in, so it is masked off."""
    values = (values ^ ((values >> 16) & 0xFFFF)) * _signed(FIRST)
    values = (values ^ ((values >> 13) & 0x7FFFF)) * _signed(SECOND)
    return values ^ ((values >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
