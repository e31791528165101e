"""Versions and whole registries on their way from one place to another."""

from pathlib import Path

from manylora_registry.base import BaseModelIdentity
from manylora_registry.blobs import Progress, untold
from manylora_registry.copy import copy
from manylora_registry.errors import WrongBaseError
from manylora_registry.export import Format, export
from manylora_registry.reference import check_adapter_name
from manylora_registry.registry import Registry
from manylora_registry.staging import largest_adapter
from manylora_registry.unpack import unpack
from manylora_registry.version import VerifyReport, Version


def export_version(
    registry: Registry,
    version: Version,
    destination: Path,
    format: Format = "peft",  # noqa: A002
) -> None:
    """Writes a version in a form that imports to the same digest.

    Args:
        registry: where it is.
        version: one of this registry.
        destination: a path where nothing is yet, or an empty directory.
        format: `peft` or `hf`, directories for PEFT and the Hugging Face hub; `oci`, an OCI image
            layout; `tar`, that as one file.

    Raises:
        UnsignedError: a signature is required, and it has none of a trusted key.
        CorruptBlobError: a stored blob is damaged; nothing is left behind.
        BlobStoreError: one cannot be read.
        DestinationError: `destination` is there already, or cannot be written.
    """
    registry.signatures.check(version)
    signatures = registry.signatures.of(version)
    export(registry.blobs, version, destination, format, signatures)


def import_version(
    registry: Registry, name: str, source: Path, *, base: BaseModelIdentity
) -> Version:
    """Publishes what `export_version` wrote, or any PEFT adapter directory, as a version of `name`.

    What the exported version was described with is kept, and so are its signatures.

    Raises:
        UnsignedError: a signature is required, and it brings none of a trusted key.
        SourceError: `source` is in none of these forms, or damaged.
        InvalidNameError: an adapter may not be called `name`.
        InvalidAdapterError: it may not be served; carries every problem.
        WrongBaseError: it was made for another base.
    """
    check_adapter_name(name)
    with registry.blobs.staging() as staging:
        found = unpack(source, staging.directory, largest_adapter(base))
        if found.base_fingerprint not in (None, base.fingerprint):
            raise WrongBaseError(name, found.base_fingerprint, base.fingerprint)
        # A plain adapter has no manifest that anybody could have signed.
        registry.signatures.check_arrival(str(source), found.manifest or b"", found.signatures)
        version = registry.publish(
            name,
            found.directory,
            base=base,
            metrics=found.metrics,
            tags=found.tags,
            lineage=found.lineage,
        )
        if version.digest == found.digest:
            for signature in found.signatures:
                registry.signatures.add(version, signature)
        return version


def copy_registry(source: Registry, target: Registry, progress: Progress = untold) -> VerifyReport:
    """Makes `target`, a new registry or a copy begun before, equal to `source`; verifies it.

    Numbers, digests, aliases, history and events stay what they are. Interrupted, it can be
    started again and goes on.

    Raises:
        CorruptBlobError: a blob is damaged in `source`.
        BlobStoreError: blobs cannot be read or written.
        DestinationError: `target` holds something else.
    """
    copy(source.blobs, source.database, target.blobs, target.database, progress)
    return target.verify(progress=progress)
