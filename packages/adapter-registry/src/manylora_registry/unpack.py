"""An exported version as an adapter directory again, whatever form it has, whoever made it.

Nothing here is trusted: only digests are followed, no name from inside becomes a path, links are
not followed, and no more is written than the sizes in the manifest, which are limited.
"""

import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from manylora_registry.blobs import copy_verified, open_regular, read_verified
from manylora_registry.errors import CorruptBlobError, SourceError
from manylora_registry.export import (
    DESCRIPTION,
    DESCRIPTION_FILE,
    HF_DIRECTORY,
    MANIFEST_FILE,
    OCI_BLOBS,
    OCI_INDEX,
    OCI_MARK,
    SIGNATURES_DIRECTORY,
)
from manylora_registry.manifest import (
    CARD_FILE,
    MALFORMED,
    MANIFEST_BYTES,
    Manifest,
    digest_of,
    parse_manifest,
)
from manylora_registry.signing import SIGNATURE_BYTES, SIGNATURE_TYPE, SIGNATURES, signed_digest

INDEX_BYTES = 4 << 20
TAR_ENTRIES = 1000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_KINDS = ("metrics", "tags", "lineage")


@dataclass(frozen=True)
class Unpacked:
    """What was found."""

    directory: Path
    """An adapter directory."""
    base_fingerprint: str | None = None
    """Of the base it was published for; None for a plain PEFT directory."""
    digest: str | None = None
    """Of the version it was exported from; None for a plain PEFT directory."""
    manifest: bytes | None = None
    """Of that version; None for a plain PEFT directory."""
    signatures: tuple[bytes, ...] = ()
    """That say they are of that version."""
    metrics: Mapping[str, Any] | None = None
    tags: Mapping[str, Any] | None = None
    lineage: Mapping[str, Any] | None = None


def unpack(source: Path, into: Path, largest: int) -> Unpacked:
    """Finds out what `source` is: a PEFT or Hugging Face directory, an OCI layout or a tar of one.

    Args:
        source: the file or directory.
        into: an empty directory for the files of the adapter; a PEFT directory stays where it is.
        largest: bytes the adapter may have.

    Raises:
        SourceError: it is none of them, or damaged.
    """
    try:
        if source.is_file():
            with _Careful(source) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                return _from_layout(_entries(archive), into, largest)
        if (source / OCI_MARK).exists():
            return _from_layout(lambda name: open_regular(source / name), into, largest)
        if (source / HF_DIRECTORY / MANIFEST_FILE).exists():
            return _from_hugging_face(source, into, largest)
        if source.is_dir():
            return Unpacked(source)
        raise SourceError(f"{source} is not there")
    except CorruptBlobError as error:
        raise SourceError(f"{source} is damaged: {error.digest} {error.what}") from error
    except (OSError, tarfile.TarError, *MALFORMED) as error:
        raise SourceError(
            f"{source} is no exported version (a PEFT or Hugging Face directory, an OCI layout, "
            f"or an uncompressed tar of one): {error}"
        ) from error


Open = Callable[[str], BufferedIOBase]
"""Opens a file of the source by its path below it."""


@dataclass(frozen=True)
class _Blobs:
    """The blobs of a source; see `BlobSource`."""

    find: Callable[[str], BufferedIOBase]

    def open(self, digest: str) -> BufferedIOBase:
        if not _DIGEST.fullmatch(digest):
            raise CorruptBlobError(digest[:80], "is no digest")
        try:
            return self.find(digest)
        except (OSError, KeyError) as error:
            raise CorruptBlobError(digest, "is missing") from error


def _from_layout(open_file: Open, into: Path, largest: int) -> Unpacked:
    index = json.loads(_small(open_file(OCI_INDEX), INDEX_BYTES))
    if len(index["manifests"]) > 1 + SIGNATURES:
        raise ValueError(f"it holds more than {SIGNATURES} signatures")
    blobs = _Blobs(lambda wanted: open_file(f"{OCI_BLOBS}/{wanted.removeprefix('sha256:')}"))
    read = [
        (entry, json.loads(read_verified(blobs, str(entry["digest"]), MANIFEST_BYTES)))
        for entry in index["manifests"]
    ]
    found = [entry for entry, manifest in read if "subject" not in manifest]
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} manifests instead of one")
    signatures = [
        read_verified(blobs, str(manifest["layers"][0]["digest"]), SIGNATURE_BYTES)
        for _, manifest in read
        # Anybody may refer to a version with anything; only signatures are ours.
        if "subject" in manifest and manifest.get("artifactType") == SIGNATURE_TYPE
    ]
    content = read_verified(blobs, str(found[0]["digest"]), MANIFEST_BYTES)
    description = found[0].get("annotations", {}).get(DESCRIPTION, "{}")
    return _write(blobs, content, signatures, description, into, largest)


def _from_hugging_face(source: Path, into: Path, largest: int) -> Unpacked:
    ours = source / HF_DIRECTORY
    content = _small(open_regular(ours / MANIFEST_FILE), MANIFEST_BYTES)
    manifest = parse_manifest(content)
    # The card beside the weights is the hub's; the one that was published is ours.
    paths = {
        file.digest: (ours if file.title == CARD_FILE else source) / file.title
        for file in manifest.files
    }
    description = _small(open_regular(ours / DESCRIPTION_FILE), INDEX_BYTES)
    blobs = _Blobs(lambda digest: open_regular(paths[digest]))
    signed = sorted(itertools.islice((ours / SIGNATURES_DIRECTORY).glob("*.json"), SIGNATURES))
    signatures = [_small(open_regular(file), SIGNATURE_BYTES) for file in signed]
    return _write(blobs, content, signatures, description, into, largest)


def _write(
    blobs: _Blobs,
    content: bytes,
    signatures: Sequence[bytes],
    description: str | bytes,
    into: Path,
    largest: int,
) -> Unpacked:
    digest, manifest = digest_of(content), _manifest(content)
    if any(signed_digest(signature) != digest for signature in signatures):
        raise ValueError("a signature in it is not of this version")
    if manifest.size > largest:
        raise ValueError(f"it says it holds {manifest.size} bytes; {largest} are the limit")
    told = json.loads(description)
    if not all(isinstance(told.get(kind, {}), dict) for kind in _KINDS):
        raise ValueError("its description is no map")
    for file in manifest.files:
        copy_verified(blobs, file.digest, file.size, into / file.title)
    return Unpacked(
        into,
        manifest.base_fingerprint,
        digest,
        content,
        tuple(signatures),
        **{kind: told.get(kind) for kind in _KINDS},
    )


def _manifest(content: bytes) -> Manifest:
    try:
        return parse_manifest(content)
    except MALFORMED as error:
        raise CorruptBlobError(digest_of(content), "is not the manifest of an adapter") from error


def _entries(archive: tarfile.TarFile) -> Open:
    """Opens a file of the archive; nothing of it is ever extracted by its own name."""
    found: dict[str, tarfile.TarInfo] = {}
    for count, entry in enumerate(archive):
        name = entry.name.removeprefix("./")
        if count >= TAR_ENTRIES:
            raise ValueError(f"it holds more than {TAR_ENTRIES} entries")
        if entry.isdir():
            continue
        if not entry.isreg() or entry.issparse() or name in found:
            raise ValueError(f"its entry {name[:80]!r} is no plain file, or there twice")
        found[name] = entry

    def open_entry(name: str) -> BufferedIOBase:
        return cast("BufferedIOBase", archive.extractfile(found[name]))

    return open_entry


class _Careful(io.FileIO):
    """A file that is not read in one piece, however long an archive says a header is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= INDEX_BYTES:
            raise tarfile.ReadError("a header in it is too long")
        return super().read(size) or b""


def _small(file: BufferedIOBase, limit: int) -> bytes:
    with file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"a file in it is longer than {limit} bytes")
    return content
