"""A check of everything the registry holds: every byte hashed, every link followed."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.blobs import BlobStore
from manylora_registry.database import Database
from manylora_registry.errors import CorruptBlobError, Problem
from manylora_registry.history import check_history
from manylora_registry.manifest import load_manifest
from manylora_registry.schema import adapters, signatures, version_blobs, versions
from manylora_registry.version import VerifyReport


def verify(blobs: BlobStore, database: Database) -> VerifyReport:
    """Hashes every blob, reads every manifest and follows the chain of alias moves.

    What is published meanwhile is not looked at; nothing is changed or locked.
    """
    # Listed first: a blob that appears later may be one whose version is not committed yet.
    present = set(blobs.digests())
    with database.read() as connection:
        needed = _needed(connection)
        known = connection.execute(
            sa.select(
                adapters.c.name, versions.c.number, versions.c.digest, versions.c.base_fingerprint
            ).join_from(versions, adapters)
        ).all()
        signed = set(connection.scalars(sa.select(signatures.c.digest)))
        moves, problems = check_history(connection)
        problems += _check_numbers((row.name, row.number) for row in known)
        problems += [
            Problem("database", str(row[0]))
            for row in connection.exec_driver_sql("PRAGMA integrity_check")
            if row[0] != "ok"
        ]
    recorded: dict[str, set[str]] = defaultdict(set)
    for digest, users in needed.items():
        for user in users:
            recorded[user].add(digest)
    size = 0
    damaged: set[str] = set()
    for digest, users in sorted(needed.items()):
        try:
            size += _hash(blobs, digest)
        except CorruptBlobError as error:
            damaged.add(digest)
            problems.append(Problem(", ".join(users), str(error)))
    for row in known:
        if row.digest in damaged:
            continue
        try:
            manifest = load_manifest(blobs, row.digest)
        except CorruptBlobError as error:
            problems.append(Problem(f"{row.name}@{row.number}", str(error)))
            continue
        listed = {row.digest, *(file.digest for file in manifest.files)}
        if (
            listed != recorded[f"{row.name}@{row.number}"] - signed
            or manifest.base_fingerprint != row.base_fingerprint
        ):
            problems.append(
                Problem(f"{row.name}@{row.number}", "the database differs from the manifest")
            )
    return VerifyReport(
        versions=len(known),
        blobs=len(needed),
        size=size,
        moves=moves,
        problems=tuple(problems),
        unreferenced=tuple(sorted(present - needed.keys())),
    )


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
