"""What differs between two versions: config, description, and how far each module moved.

A module's effective update is W = scaling · B · A. Norms come from the r by r Gram matrices, as
‖B·A‖² = Σ (BᵀB) ∘ (A·Aᵀ): the [out, in] product is never made.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from manylora_registry.adapter_config import AdapterConfig, read_config
from manylora_registry.blobs import BlobStore, copy_verified, temporary_directory
from manylora_registry.errors import CorruptBlobError
from manylora_registry.manifest import CONFIG_FILE, WEIGHTS_FILE, load_manifest
from manylora_registry.staging import module_of
from manylora_registry.tensors import Tensor, read_header, read_tensor
from manylora_registry.version import Version

Matrix = NDArray[np.float64]
Values = tuple[Any, Any]


@dataclass(frozen=True)
class ModuleChange:
    """How far one module's update moved, in Frobenius norms."""

    module: str
    before: float
    """Norm of the update in the first version; 0 where it does not adapt the module."""
    after: float
    change: float | None
    """Norm of the difference of the two; None where their shapes differ."""

    @property
    def relative(self) -> float | None:
        """The change in units of `before`; None where that is 0, or there is no change to tell."""
        return self.change / self.before if self.change is not None and self.before else None


@dataclass(frozen=True)
class VersionDiff:
    """What differs; mappings hold the value before and after, None where it is missing."""

    before: Version
    after: Version
    identity: Mapping[str, Values]
    """Of base and rank."""
    config: Mapping[str, Values]
    metrics: Mapping[str, Values]
    tags: Mapping[str, Values]
    lineage: Mapping[str, Values]
    modules: tuple[ModuleChange, ...]
    """Every module either version adapts, by name."""


def diff(blobs: BlobStore, before: Version, after: Version) -> VersionDiff:
    """Compares two versions, of one adapter or of two.

    Memory is that of one module; both versions are copied into the directory for temporary files.

    Raises:
        CorruptBlobError: a stored blob is damaged.
        BlobStoreError: one cannot be read.
    """
    # Not in the store's own staging: nothing is changed, and the store may be one to read only.
    with temporary_directory() as directory:
        first = _Weights.load(blobs, before.digest, directory / "before")
        second = _Weights.load(blobs, after.digest, directory / "after")
        modules = sorted({*first.modules, *second.modules})
        changes = tuple(_compare(module, first, second) for module in modules)
    return VersionDiff(
        before=before,
        after=after,
        identity=_changed(
            {"base": before.base_fingerprint, "rank": before.rank},
            {"base": after.base_fingerprint, "rank": after.rank},
        ),
        config=_changed(first.keys, second.keys),
        metrics=_changed(before.metrics, after.metrics),
        tags=_changed(before.tags, after.tags),
        lineage=_changed(before.lineage, after.lineage),
        modules=changes,
    )


@dataclass(frozen=True)
class _Weights:
    """The files of one version, read module by module."""

    file: Path
    keys: Mapping[str, Any]
    config: AdapterConfig
    modules: Mapping[str, Mapping[str, Tensor]]
    """The tensors of each module by their side, A and B."""

    @classmethod
    def load(cls, blobs: BlobStore, digest: str, directory: Path) -> "_Weights":
        directory.mkdir()
        manifest = load_manifest(blobs, digest)
        for file in manifest.files:
            copy_verified(blobs, file.digest, file.size, directory / file.title)
        content = (directory / CONFIG_FILE).read_bytes()
        config, _ = read_config(content)
        tensors, problems = read_header(directory / WEIGHTS_FILE)
        if config is None or problems:
            raise CorruptBlobError(digest, "is an adapter this library does not read")
        modules: dict[str, dict[str, Tensor]] = {}
        for tensor in tensors:
            if module := module_of(tensor.name):
                modules.setdefault(module, {})[tensor.name[-len("A.weight")]] = tensor
        return cls(directory / WEIGHTS_FILE, json.loads(content), config, modules)

    def factors(self, module: str) -> tuple[Matrix, Matrix] | None:
        """Scaling · B [out, r] and A [r, in]; None for a module it does not adapt."""
        if module not in self.modules:
            return None
        a, b = (
            read_tensor(self.file, self.modules[module][side]).astype(np.float64) for side in "AB"
        )
        return b * self.config.scaling_of(module), a


def _compare(module: str, first: _Weights, second: _Weights) -> ModuleChange:
    one, two = first.factors(module), second.factors(module)
    before = _dot(one, one) if one else 0.0
    after = _dot(two, two) if two else 0.0
    if not one or not two:
        squared = before + after
    elif (one[0].shape[0], one[1].shape[1]) != (two[0].shape[0], two[1].shape[1]):
        return ModuleChange(module, math.sqrt(before), math.sqrt(after), None)
    elif all(np.array_equal(left, right) for left, right in zip(one, two, strict=True)):
        squared = 0.0
    else:
        # Rounding may leave a little less than nothing.
        squared = max(0.0, before + after - 2 * _dot(one, two))
    return ModuleChange(module, math.sqrt(before), math.sqrt(after), math.sqrt(squared))


def _dot(one: tuple[Matrix, Matrix], two: tuple[Matrix, Matrix]) -> float:
    """The inner product of B₁·A₁ and B₂·A₂."""
    return float(((one[0].T @ two[0]) * (one[1] @ two[1].T)).sum())


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Values]:
    return {
        key: cast("Values", (before.get(key), after.get(key)))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    }
