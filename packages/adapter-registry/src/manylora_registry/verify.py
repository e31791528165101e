"""A check of everything the registry holds: every byte hashed, every link followed."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.blobs import BlobStore, Progress, untold
from manylora_registry.database import Database
from manylora_registry.deployments import check_deployments
from manylora_registry.errors import CorruptBlobError, Problem
from manylora_registry.history import check_history
from manylora_registry.manifest import load_manifest
from manylora_registry.schema import adapters, lease_blobs, signatures, version_blobs, versions
from manylora_registry.version import VerifyReport


def verify(
    blobs: BlobStore, database: Database, *, repair: bool = False, progress: Progress = untold
) -> VerifyReport:
    """Hashes every blob, reads every manifest and follows the chain of alias moves.

    What is published or collected meanwhile is not looked at; nothing is locked. With `repair`,
    damaged blobs are taken out of the store, and publishing the same files again replaces them. As
    nothing makes the same signature again, a damaged or missing one is forgotten then.
    """
    # Listed first: a blob that appears later may be one whose version is not committed yet.
    present = set(blobs.digests())
    with database.read() as connection:
        needed = _needed(connection)
        known = connection.execute(
            sa.select(
                adapters.c.name,
                versions.c.number,
                versions.c.digest,
                versions.c.base_fingerprint,
                versions.c.rank,
                versions.c.size,
                versions.c.collected_at,
            ).join_from(versions, adapters)
        ).all()
        signed = set(connection.scalars(sa.select(signatures.c.digest)))
        moves, problems = check_history(connection)
        problems += check_deployments(connection)
        problems += _check_numbers((row.name, row.number) for row in known)
        problems += [Problem("database", found) for found in database.check(connection)]
    recorded: dict[str, set[str]] = defaultdict(set)
    for digest, users in needed.items():
        for user in users:
            recorded[user].add(digest)
    size, damaged = _hash_all(blobs, needed, progress)
    for row in known:
        if row.collected_at is not None or row.digest in damaged:
            continue
        name = f"{row.name}@{row.number}"
        if row.digest not in recorded[name]:
            problems.append(Problem(name, "the database differs from the manifest"))
            continue
        try:
            manifest = load_manifest(blobs, row.digest)
        except CorruptBlobError as error:
            damaged[row.digest] = str(error)
            continue
        listed = {row.digest, *(file.digest for file in manifest.files)}
        kept = (recorded[name] - signed, row.base_fingerprint, row.rank, row.size)
        if kept != (listed, manifest.base_fingerprint, manifest.rank, manifest.size):
            problems.append(Problem(name, "the database differs from the manifest"))
    if damaged:
        # A version that was collected meanwhile has taken its blobs with it.
        with database.read() as connection:
            still = _needed(connection)
        damaged = {digest: what for digest, what in damaged.items() if digest in still}
    for digest in damaged.keys() & signed:
        damaged[digest] = (
            f"its signature {digest} is damaged or missing: `manylora registry verify --repair` "
            "forgets it, then sign it again"
        )
    problems += [
        Problem(", ".join(needed[digest]), what) for digest, what in sorted(damaged.items())
    ]
    affected = {user for digest in damaged for user in needed[digest]}
    out = sorted(damaged.keys() & (present | signed)) if repair else []
    taken = [digest for digest in out if _take_out(blobs, database, digest)]
    return VerifyReport(
        versions=len(known),
        blobs=len(needed),
        size=size,
        moves=moves,
        problems=tuple(problems),
        unreferenced=tuple(sorted(present - needed.keys())),
        affected=tuple(sorted(affected)),
        set_aside=tuple(digest for digest in taken if digest in present),
    )


def _hash_all(
    blobs: BlobStore, digests: Collection[str], progress: Progress
) -> tuple[int, dict[str, str]]:
    """Bytes that were hashed, and what is wrong with which blob."""
    size = 0
    damaged: dict[str, str] = {}
    for done, digest in enumerate(sorted(digests), 1):
        try:
            size += _hash(blobs, digest)
        except CorruptBlobError as error:
            damaged[digest] = str(error)
        progress("hashing", done, len(digests))
    return size, damaged


def _take_out(blobs: BlobStore, database: Database, digest: str) -> bool:
    """Takes a blob out of the store unless it has been healed, or is just being.

    A signature goes from the records, too. Publishers store a blob only under a lease, which they
    take under this lock.
    """
    with database.write() as connection:
        leased = sa.select(lease_blobs.c.digest).where(lease_blobs.c.digest == digest)
        if connection.scalar(leased) is not None:
            return False
        try:
            _hash(blobs, digest)
        except CorruptBlobError:
            blobs.set_aside(digest)
            made = signatures.c.digest == digest
            of = sa.select(signatures.c.version_id).where(made)
            connection.execute(
                sa.delete(version_blobs).where(
                    version_blobs.c.digest == digest, version_blobs.c.version_id.in_(of)
                )
            )
            connection.execute(sa.delete(signatures).where(made))
            return True
    return False


def _needed(connection: Connection) -> dict[str, list[str]]:
    """The versions that need each blob, as NAME@NUMBER."""
    rows = connection.execute(
        sa.select(version_blobs.c.digest, adapters.c.name, versions.c.number)
        .select_from(version_blobs.join(versions).join(adapters))
        .order_by(adapters.c.name, versions.c.number)
    )
    needed: dict[str, list[str]] = {}
    for digest, name, number in rows:
        needed.setdefault(digest, []).append(f"{name}@{number}")
    return needed


def _check_numbers(versions: Iterable[tuple[str, int]]) -> list[Problem]:
    numbers: dict[str, list[int]] = {}
    for name, number in versions:
        numbers.setdefault(name, []).append(number)
    return [
        Problem(name, "its version numbers have a gap")
        for name, found in numbers.items()
        if sorted(found) != list(range(1, len(found) + 1))
    ]


def _hash(blobs: BlobStore, digest: str) -> int:
    """Reads a blob to its end; its size in bytes."""
    with blobs.open(digest) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    if f"sha256:{found}" != digest:
        raise CorruptBlobError(digest, "does not match its digest")
    return size
