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
    SigningKey,
    find_signer,
    public_key_id,
    required_keys,
)
from manylora_registry.version import Version


class Signatures:
    """Signs versions, finds out who signed them, and refuses those nobody trusted did.

    Whose signature is required stands in `$MANYLORA_REQUIRE_SIGNATURE` at first.
    """

    def __init__(self, blobs: BlobStore, database: Database) -> None:
        self._blobs = blobs
        self._database = database
        self._publishing: SigningKey | None = None
        self._required = required_keys()
        self._good: set[tuple[str, tuple[str, ...]]] = set()
        """Digests found signed, each with the keys that were allowed: neither ever changes."""

    def sign_published_with(self, private_key: Path) -> None:
        """Signs every version published from now on; an elliptic-curve key in PEM.

        Raises:
            SigningKeyError: the key cannot be used.
        """
        self._publishing = SigningKey(private_key)

    def require(self, public_keys: Sequence[Path]) -> None:
        """From now on only what one of these keys signed is resolved and materialized.

        None lifts it.
        """
        self._required = tuple(public_keys)

    def of_published(self, manifest: bytes) -> bytes | None:
        """The signature of a version about to be published, if it is to be signed."""
        return None if self._publishing is None else self._publishing.sign(manifest)

    def check(self, version: Version) -> None:
        """Whether a version may be used; what was found good once is remembered.

        Raises:
            UnsignedError: a signature is required, and it has none of a trusted key.
            SigningKeyError: a key cannot be read.
            CorruptBlobError: the manifest or a signature is damaged.
        """
        if not self._required:
            return
        asked = (version.digest, tuple(public_key_id(key) for key in self._required))
        if asked not in self._good:
            self.verify(version, self._required)
            self._good.add(asked)

    def sign(self, version: Version, private_key: Path) -> str:
        """Adds a signature to a version; its digest.

        Raises:
            SigningKeyError: the key cannot be used.
            CorruptBlobError: the manifest is damaged.
        """
        manifest = read_verified(self._blobs, version.digest, MANIFEST_BYTES)
        return self.add(version, SigningKey(private_key).sign(manifest))

    def add(self, version: Version, content: bytes) -> str:
        """Keeps a signature that was made of the version's manifest; its digest."""
        digest = digest_of(content)
        with (
            self._blobs.staging() as staging,
            uploading(self._database, [digest], this_user()) as lease,
        ):
            file = staging.directory / "signature"
            file.write_bytes(content)
            staging.put({digest: file})
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
            end_upload(connection, lease)
            there = sa.select(signatures).where(
                signatures.c.version_id == identity, signatures.c.digest == digest
            )
            if connection.execute(there).first() is not None:
                return
            # As one of the version's blobs it lives as long, and is copied with it.
            connection.execute(sa.insert(version_blobs).values(version_id=identity, digest=digest))
            connection.execute(
                sa.insert(signatures).values(version_id=identity, digest=digest, at=now)
            )

    def verify(self, version: Version, public_keys: Sequence[Path]) -> Path:
        """The key of those allowed that signed the version.

        Raises:
            UnsignedError: none did.
            SigningKeyError: a key cannot be read.
            CorruptBlobError: the manifest or a signature is damaged.
        """
        manifest = read_verified(self._blobs, version.digest, MANIFEST_BYTES)
        return _signer(f"{version.name}@{version.number}", manifest, self.of(version), public_keys)

    def of(self, version: Version) -> list[bytes]:
        """Every signature of a version, by whomever.

        Raises:
            CorruptBlobError: one is damaged.
        """
        found = (
            sa.select(signatures.c.digest)
            .select_from(signatures.join(versions))
            .where(versions.c.digest == version.digest)
            .distinct()
            .order_by(signatures.c.digest)
        )
        with self._database.read() as connection:
            digests = list(connection.scalars(found))
        return [read_verified(self._blobs, digest, SIGNATURE_BYTES) for digest in digests]

    def check_arrival(self, what: str, manifest: bytes, bundles: Sequence[bytes]) -> None:
        """Whether what comes from elsewhere may be published, by the signatures it brings.

        Raises:
            UnsignedError: a signature is required, and it has none of a trusted key.
            SigningKeyError: a key cannot be read.
        """
        if self._required:
            _signer(what, manifest, bundles, self._required)


def _signer(
    what: str, manifest: bytes, bundles: Sequence[bytes], public_keys: Sequence[Path]
) -> Path:
    signer = find_signer(manifest, bundles, public_keys)
    if signer is None:
        raise UnsignedError(
            f"{what} is not signed by a key that is trusted here ({len(bundles)} signatures); "
            "sign it with `manylora registry sign`"
        )
    return signer
