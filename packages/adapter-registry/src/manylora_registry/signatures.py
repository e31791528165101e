"""The signatures a registry keeps: blobs that refer to versions."""

from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from manylora_registry.aliases import this_user
from manylora_registry.blobs import BlobStore, read_verified
from manylora_registry.database import Database
from manylora_registry.errors import UnsignedError
from manylora_registry.leases import end_upload, uploading
from manylora_registry.manifest import MANIFEST_BYTES, digest_of
from manylora_registry.schema import adapters, signatures, version_blobs, versions
from manylora_registry.signing import (
    SIGNATURE_BYTES,
    find_signer,
    public_key_id,
    sign_manifest,
)
from manylora_registry.version import Version


class Signatures:
    """Signs versions and finds out who signed them."""

    def __init__(self, blobs: BlobStore, database: Database) -> None:
        self._blobs = blobs
        self._database = database
        self._good: set[tuple[str, tuple[str, ...]]] = set()
        """Digests found signed, each with the keys that were allowed: neither ever changes."""

    def sign(self, version: Version, private_key: Path) -> str:
        """Adds a signature to a version; its digest.

        Raises:
            SigningKeyError: the key cannot be used.
            CorruptBlobError: the manifest is damaged.
        """
        manifest = read_verified(self._blobs, version.digest, MANIFEST_BYTES)
        return self.add(version, sign_manifest(manifest, private_key))

    def add(self, version: Version, content: bytes) -> str:
        """Keeps a signature that was made of the version's manifest; its digest."""
        digest = digest_of(content)
        with (
            self._blobs.staging() as staging,
            uploading(self._database, [digest], this_user()) as lease,
        ):
            (staging / "signature").write_bytes(content)
            self._blobs.put(staging / "signature", digest)
            self._record(version, digest, lease)
        return digest

    def _record(self, version: Version, digest: str, lease: str) -> None:
        with self._database.write() as connection:
            now = self._database.clock(connection)
            row = (
                sa.select(versions.c.id)
                .join_from(versions, adapters)
                .where(adapters.c.name == version.name, versions.c.number == version.number)
            )
            identity = connection.execute(row).scalar_one()
            # As one of the version's blobs it lives as long, and is copied with it.
            connection.execute(sa.insert(version_blobs).values(version_id=identity, digest=digest))
            connection.execute(
                sa.insert(signatures).values(version_id=identity, digest=digest, at=now)
            )
            end_upload(connection, lease)

    def require(self, version: Version, public_keys: Sequence[Path]) -> Path:
        """The key of those allowed that signed the version.

        Raises:
            UnsignedError: none did.
            SigningKeyError: a key cannot be read.
            CorruptBlobError: the manifest or a signature is damaged.
        """
        manifest = read_verified(self._blobs, version.digest, MANIFEST_BYTES)
        found = (
            sa.select(signatures.c.digest)
            .select_from(signatures.join(versions))
            .where(versions.c.digest == version.digest)
            .distinct()
        )
        with self._database.read() as connection:
            digests = list(connection.scalars(found))
        bundles = [read_verified(self._blobs, digest, SIGNATURE_BYTES) for digest in digests]
        signer = find_signer(manifest, bundles, public_keys)
        if signer is None:
            raise UnsignedError(
                f"{version.name}@{version.number} is not signed by a key that is trusted here "
                f"({len(bundles)} signatures); sign it with `manylora registry sign`"
            )
        return signer

    def require_once(self, version: Version, public_keys: Sequence[Path]) -> None:
        """Like `require`, remembering what was found good."""
        asked = (version.digest, tuple(public_key_id(key) for key in public_keys))
        if asked not in self._good:
            self.require(version, public_keys)
            self._good.add(asked)
