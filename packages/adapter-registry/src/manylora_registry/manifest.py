"""The manifest of a version: canonical JSON in the shape of an OCI image manifest.

https://github.com/opencontainers/image-spec/blob/main/manifest.md

It says only what the adapter is - its files, the base it belongs to, its rank - and nothing of
its name, its number or the time, so that the same adapter has the same digest in every registry.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manylora_registry.blobs import BlobSource, read_verified
from manylora_registry.errors import CorruptBlobError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
MEDIA_TYPES = {
    CONFIG_FILE: "application/vnd.manylora.adapter.config.v1+json",
    WEIGHTS_FILE: "application/vnd.manylora.adapter.weights.v1.safetensors",
    CARD_FILE: "text/markdown",
}
"""Media type of every file an adapter may have."""
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.manylora.adapter.v1"
MANIFEST_BYTES = 1 << 20
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What reading JSON of another shape than expected raises."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TITLE = "org.opencontainers.image.title"
_BASE = "io.manylora.base.fingerprint"
_RANK = "io.manylora.rank"


@dataclass(frozen=True)
class AdapterFile:
    """One file of an adapter."""

    title: str
    """Its name in an adapter directory."""
    digest: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Manifest:
    """What a version consists of."""

    config: AdapterFile
    layers: tuple[AdapterFile, ...]
    """The weights, then the card if there is one."""
    base_fingerprint: str
    rank: int

    @property
    def files(self) -> tuple[AdapterFile, ...]:
        """All files of the adapter directory."""
        return (self.config, *self.layers)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The canonical form, whose sha256 is the version's digest."""
        return canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "config": _descriptor(self.config),
                "layers": [_descriptor(layer) for layer in self.layers],
                "annotations": {_BASE: self.base_fingerprint, _RANK: str(self.rank)},
            }
        )


def load_manifest(blobs: BlobSource, digest: str) -> Manifest:
    """Reads and verifies the manifest of a version.

    Raises:
        CorruptBlobError: it is missing, damaged, or not a manifest of ours.
    """
    content = read_verified(blobs, digest, MANIFEST_BYTES)
    try:
        return parse_manifest(content)
    except MALFORMED as error:
        raise CorruptBlobError(digest, "is not the manifest of an adapter") from error


def parse_manifest(content: bytes) -> Manifest:
    """Reads a manifest from its bytes; one of `MALFORMED` where it is none."""
    data: Mapping[str, Any] = json.loads(content)
    return Manifest(
        config=_file(data["config"]),
        layers=tuple(_file(layer) for layer in data["layers"]),
        base_fingerprint=str(data["annotations"][_BASE]),
        rank=int(data["annotations"][_RANK]),
    )


def canonical_json(value: object) -> bytes:
    """One form for one value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(content: bytes) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _descriptor(file: AdapterFile) -> dict[str, object]:
    return {
        "mediaType": MEDIA_TYPES[file.title],
        "digest": file.digest,
        "size": file.size,
        "annotations": {_TITLE: file.title},
    }


def _file(descriptor: Mapping[str, Any]) -> AdapterFile:
    # The title becomes a file name when the version is materialized: only ours are followed.
    title = descriptor["annotations"][_TITLE]
    if title not in MEDIA_TYPES:
        raise ValueError(title)
    digest, size = descriptor["digest"], descriptor["size"]
    if not _DIGEST.fullmatch(digest) or not isinstance(size, int) or size < 0:
        raise ValueError(title)
    return AdapterFile(title, digest, size)
