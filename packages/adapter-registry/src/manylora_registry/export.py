"""A version in the forms other tools read; importing each gives the same digest again.

peft   adapter_config.json, adapter_model.safetensors and the card, as published
hf     the same with a model card the Hugging Face hub understands; what that changed, the
       manifest, the description and the signatures are kept in `manylora/`
oci    an OCI image layout, which ORAS, skopeo and crane copy to any container registry:
       https://github.com/opencontainers/image-spec/blob/main/image-layout.md
       Signatures refer to the version: `oras cp -r` takes them along.
tar    that layout as one file; the same version with the same signatures is the same bytes
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tarfile
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from manylora_registry.adapter_config import read_config
from manylora_registry.blobs import BlobStore, copy_verified
from manylora_registry.errors import DestinationError
from manylora_registry.manifest import (
    ARTIFACT_TYPE,
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_TYPE,
    Manifest,
    canonical_json,
    digest_of,
    load_manifest,
)
from manylora_registry.signing import SIGNATURE_TYPE
from manylora_registry.syncs import Syncs, sync
from manylora_registry.version import Version

Format = Literal["peft", "hf", "oci", "tar"]
OCI_MARK = "oci-layout"
OCI_INDEX = "index.json"
OCI_BLOBS = "blobs/sha256"
HF_DIRECTORY = "manylora"
MANIFEST_FILE = "manifest.json"
DESCRIPTION_FILE = "description.json"
SIGNATURES_DIRECTORY = "signatures"
DESCRIPTION = "io.manylora.description"
"""Annotation of the index: metrics, tags and lineage, which are no part of the identity."""


def export(
    blobs: BlobStore,
    version: Version,
    destination: Path,
    format_: Format,
    signatures: Sequence[bytes],
) -> None:
    """Writes the version to a new `destination`, verified, at once or not at all.

    Raises:
        CorruptBlobError: a stored blob is damaged; nothing is left behind.
        BlobStoreError: one cannot be read.
        DestinationError: something is there already, or it cannot be written.
    """
    manifest = load_manifest(blobs, version.digest)
    with _destination(destination) as partial:
        content = partial / "content"
        content.mkdir()
        match format_:
            case "peft":
                _write_files(blobs, manifest, content)
            case "hf":
                _write_hugging_face(blobs, manifest, version, content)
                _write_signatures(content / HF_DIRECTORY / SIGNATURES_DIRECTORY, signatures)
            case "oci" | "tar":
                _write_layout(blobs, manifest, version, signatures, content)
        with Syncs() as syncs:
            for path in [*content.rglob("*"), content]:
                syncs.begin(path)
            syncs.wait()
        if format_ == "tar":
            _pack(content, partial / "tar")
            # Unlike a rename, a link does not replace what is there.
            destination.hardlink_to(partial / "tar")
        else:
            content.rename(destination)
        sync(destination.parent)


@contextlib.contextmanager
def _destination(destination: Path) -> Generator[Path]:
    """A hidden directory beside `destination`, removed at the end.

    One that was killed leaves it to the next export to the same place, which knows by its lock
    that nobody works in it any more.
    """
    ours = f".{hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:16]}"
    partial = destination.parent / f"{ours}-{uuid.uuid4().hex}.partial"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            # Alone here, no other export is between making its directory and locking it.
            with _locked(destination.parent, wait=True):
                for left in destination.parent.glob(f"{ours}-*.partial"):
                    with contextlib.suppress(OSError), _locked(left):
                        shutil.rmtree(left, ignore_errors=True)
                partial.mkdir()
                held.enter_context(_locked(partial))
            yield partial
    except OSError as error:
        raise DestinationError(
            f"{destination} cannot be written ({error.strerror}); give a new path"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path, *, wait: bool = False) -> Generator[None]:
    """Holds the lock of a directory; the kernel drops it when the process dies.

    Raises:
        OSError: somebody else has it, without `wait`; or the file system knows no locks.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _write_files(blobs: BlobStore, manifest: Manifest, directory: Path) -> None:
    for file in manifest.files:
        copy_verified(blobs, file.digest, file.size, directory / file.title)


def _write_hugging_face(
    blobs: BlobStore, manifest: Manifest, version: Version, directory: Path
) -> None:
    _write_files(blobs, manifest, directory)
    ours = directory / HF_DIRECTORY
    ours.mkdir()
    (ours / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    (ours / DESCRIPTION_FILE).write_bytes(_description(version))
    card = directory / CARD_FILE
    body = ""
    if card.exists():
        # As bytes that may be no text: what is shown may lose some, what is kept may not.
        body = _without_front_matter(card.read_bytes().decode(errors="replace"))
        card.rename(ours / CARD_FILE)
    front = yaml.safe_dump(_front_matter(directory, version), sort_keys=False, allow_unicode=True)
    card.write_text(f"---\n{front}---\n{body or _body(version)}", encoding="utf-8")


def _write_signatures(directory: Path, signatures: Sequence[bytes]) -> None:
    for number, signature in enumerate(signatures, 1):
        directory.mkdir(exist_ok=True)
        (directory / f"{number}.json").write_bytes(signature)


def _front_matter(directory: Path, version: Version) -> dict[str, object]:
    """What the hub reads of a card: https://huggingface.co/docs/hub/model-cards."""
    config, _ = read_config((directory / CONFIG_FILE).read_bytes())
    base = config.base_model_name_or_path if config else None
    front: dict[str, object] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "manylora", *(f"{k}:{v}" for k, v in sorted(version.tags.items()))],
    }
    if base and not base.startswith("sha256:"):
        front |= {"base_model": base, "base_model_relation": "adapter"}
    if version.metrics:
        results = [{"type": key, "value": value} for key, value in sorted(version.metrics.items())]
        front["model-index"] = [
            {
                "name": version.name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "held-out rows", "type": "held-out"},
                        "metrics": results,
                    }
                ],
            }
        ]
    front["manylora"] = {
        "adapter": version.name,
        "version": version.number,
        "digest": version.digest,
        "base_fingerprint": version.base_fingerprint,
        "lineage": dict(sorted(version.lineage.items())),
    }
    return front


def _without_front_matter(card: str) -> str:
    if card.startswith("---\n") and (end := card.find("\n---\n", 3)) >= 0:
        return card[end + len("\n---\n") :]
    return card


def _body(version: Version) -> str:
    return (
        f"# {version.name}\n\nA LoRA adapter of rank {version.rank}, right only on the base with "
        f"the fingerprint `{version.base_fingerprint}`.\n"
    )


def _write_layout(
    blobs: BlobStore,
    manifest: Manifest,
    version: Version,
    signatures: Sequence[bytes],
    directory: Path,
) -> None:
    stored = directory / OCI_BLOBS
    stored.mkdir(parents=True)
    for file in {file.digest: file for file in manifest.files}.values():
        copy_verified(blobs, file.digest, file.size, stored / file.digest.removeprefix("sha256:"))

    def store(content: bytes, kind: str) -> dict[str, Any]:
        digest = digest_of(content)
        (stored / digest.removeprefix("sha256:")).write_bytes(content)
        return {"mediaType": kind, "digest": digest, "size": len(content)}

    described = store(manifest.to_bytes(), MANIFEST_TYPE)
    (directory / OCI_MARK).write_bytes(canonical_json({"imageLayoutVersion": "1.0.0"}))
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                **described,
                "artifactType": ARTIFACT_TYPE,
                "annotations": {
                    "org.opencontainers.image.ref.name": str(version.number),
                    "org.opencontainers.image.title": version.name,
                    DESCRIPTION: _description(version).decode(),
                },
            },
            *(_referrer(described, signature, store) for signature in signatures),
        ],
    }
    (directory / OCI_INDEX).write_bytes(canonical_json(index))


def _referrer(
    subject: dict[str, Any], signature: bytes, store: Callable[[bytes, str], dict[str, Any]]
) -> dict[str, Any]:
    """Stores a manifest that refers to the version's and holds a signature of it.

    https://github.com/opencontainers/image-spec/blob/main/manifest.md#guidelines-for-artifact-usage
    """
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": SIGNATURE_TYPE,
        "config": store(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [store(signature, SIGNATURE_TYPE)],
        "subject": subject,
    }
    return {**store(canonical_json(manifest), MANIFEST_TYPE), "artifactType": SIGNATURE_TYPE}


def _description(version: Version) -> bytes:
    return canonical_json(
        {
            "metrics": dict(version.metrics),
            "tags": dict(version.tags),
            "lineage": dict(version.lineage),
        }
    )


def _pack(layout: Path, file: Path) -> None:
    """One tar of the files of a layout: in order, owned by nobody, made at no time."""
    blobs = sorted((layout / OCI_BLOBS).iterdir())
    with tarfile.open(file, "x:", format=tarfile.PAX_FORMAT) as archive:
        for path in (layout / OCI_MARK, layout / OCI_INDEX, *blobs):
            entry = tarfile.TarInfo(path.relative_to(layout).as_posix())
            entry.size = path.stat().st_size
            entry.mode = 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)
    sync(file)
