"""Garbage collection in two phases: what nobody needs is condemned, waits, and is then deleted.

Rules that keep it safe beside publishers, readers, other collectors and crashes:

1. A publisher names its blobs in an upload lease before it stores the first; that pardons those
   that are condemned. The transaction that adds the version ends the lease, and fails if a
   collection has found the lease run out.
2. The blobs in the store are listed before the database is asked what is needed.
3. A blob is deleted in a writing transaction, after it was seen in the same transaction that no
   version and no lease needs it. As 1 and 3 take the one write lock, a blob is either leased
   before the check or stored after the deletion.
4. A version gives up its blobs only when it was marked a grace ago, nobody holds a lease on it, no
   alias points at it and no version that is still there was trained on from it. Its row, number
   and history stay.
5. Every step can be the last: a blob that is gone while its condemnation is not is forgotten by
   the next collection, and a blob that lost its version is condemned by it.
"""

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.blobs import BlobStore
from manylora_registry.database import Database
from manylora_registry.errors import Problem
from manylora_registry.leases import drop_expired
from manylora_registry.rows import ROWS_AT_ONCE, change_version, record
from manylora_registry.schema import (
    adapters,
    aliases,
    condemned,
    lease_blobs,
    leases,
    version_blobs,
    version_parents,
    versions,
)
from manylora_registry.version import GarbageReport

BLOBS_AT_ONCE = 50
"""Blobs deleted in one transaction: other writers wait no longer than that takes."""


def collect_garbage(
    blobs: BlobStore, database: Database, grace: timedelta, *, dry_run: bool
) -> GarbageReport:
    """Removes what was deleted or left over and is not needed; see the rules above.

    Args:
        blobs: where blobs lie.
        database: what is needed.
        grace: how long a version must have been marked, a blob condemned and a left-over file
            unused; readers without a lease have that long to finish.
        dry_run: only say what would be done.
    """
    unneeded = _unneeded(blobs, database)
    with database.write(trial=dry_run) as connection:
        now = database.clock(connection)
        due = now - grace // timedelta(microseconds=1)
        drop_expired(connection, now)
        collected, kept, freed = _collect_versions(connection, due, now)
        _condemn(connection, unneeded | freed, now)
        waiting = connection.execute(sa.select(condemned)).all()
        doomed = sorted(row.digest for row in waiting if row.at <= due)
    sizes: dict[str, int] = {}
    if dry_run:
        sizes = {digest: blobs.size(digest) for digest in doomed}
    else:
        for start in range(0, len(doomed), BLOBS_AT_ONCE):
            sizes.update(_delete(blobs, database, doomed[start : start + BLOBS_AT_ONCE]))
        blobs.sweep(grace)
    return GarbageReport(
        collected=tuple(collected),
        kept=tuple(kept),
        waiting=len(waiting) - len(doomed),
        deleted=tuple(sizes),
        freed=sum(sizes.values()),
    )


def _unneeded(blobs: BlobStore, database: Database) -> set[str]:
    """Blobs that no version needs; some may be on their way into one."""
    present = set(blobs.digests())
    with database.read() as connection:
        return present.difference(connection.scalars(sa.select(version_blobs.c.digest).distinct()))


def _collect_versions(
    connection: Connection, due: int, now: int
) -> tuple[list[str], list[Problem], set[str]]:
    """Takes their blobs from versions that were deleted; which, which not yet, and the blobs."""
    marked = connection.execute(
        sa.select(versions, adapters.c.name)
        .join_from(versions, adapters)
        .where(versions.c.deleted_at.is_not(None), versions.c.collected_at.is_(None))
        # Children have higher ids than their parents, and must go first.
        .order_by(versions.c.id.desc())
    ).all()
    collected: list[str] = []
    kept: list[Problem] = []
    freed: set[str] = set()
    for row in marked:
        name = f"{row.name}@{row.number}"
        reason = _why_kept(connection, row.id) or ("its grace" if row.deleted_at > due else None)
        if reason:
            kept.append(Problem(name, f"waits for {reason}"))
            continue
        needed = version_blobs.c.version_id == row.id
        freed.update(connection.scalars(sa.select(version_blobs.c.digest).where(needed)))
        connection.execute(sa.delete(version_blobs).where(needed))
        change_version(connection, row.id, collected_at=now)
        record(connection, "collected", row.adapter_id, row.number, now)
        collected.append(name)
    return collected[::-1], kept[::-1], freed


def _why_kept(connection: Connection, version: int) -> str | None:
    """What needs a version that is marked, if anything; expired leases are gone already."""
    alias = connection.scalar(
        sa.select(aliases.c.alias).where(aliases.c.version_id == version).limit(1)
    )
    if alias:
        return f"the alias {alias}"
    holder = connection.scalar(
        sa.select(leases.c.holder).where(leases.c.version_id == version).limit(1)
    )
    if holder:
        return f"the lease of {holder}"
    child = connection.execute(
        sa.select(adapters.c.name, versions.c.number)
        .select_from(
            version_parents.join(versions, versions.c.id == version_parents.c.version_id).join(
                adapters
            )
        )
        .where(version_parents.c.parent_id == version, versions.c.collected_at.is_(None))
        .limit(1)
    ).first()
    return f"{child.name}@{child.number}, which was trained on from it" if child else None


def _condemn(connection: Connection, unneeded: set[str], now: int) -> None:
    """Makes the condemned blobs those that are there and not needed; old ones keep their time."""
    known = set(connection.scalars(sa.select(condemned.c.digest)))
    found = sorted(unneeded | known)
    wanted: set[str] = set()
    for start in range(0, len(found), ROWS_AT_ONCE):
        wanted |= _needed(connection, found[start : start + ROWS_AT_ONCE])
    pardoned = sorted(known & (wanted | (known - unneeded)))
    for start in range(0, len(pardoned), ROWS_AT_ONCE):
        some = pardoned[start : start + ROWS_AT_ONCE]
        connection.execute(sa.delete(condemned).where(condemned.c.digest.in_(some)))
    if new := sorted(unneeded - known - wanted):
        rows = [{"digest": digest, "at": now} for digest in new]
        connection.execute(sa.insert(condemned), rows)


def _needed(connection: Connection, digests: Sequence[str]) -> set[str]:
    """Which of the blobs a version or an upload needs."""
    return {
        digest
        for table in (version_blobs, lease_blobs)
        for digest in connection.scalars(
            sa.select(table.c.digest).where(table.c.digest.in_(digests))
        )
    }


def _delete(blobs: BlobStore, database: Database, digests: Sequence[str]) -> dict[str, int]:
    """Deletes those that are still condemned and not needed; their sizes."""
    deleted: dict[str, int] = {}
    with database.write() as connection:
        for digest in digests:
            # One question each: if the connection and with it the lock is lost, it fails here.
            here = condemned.c.digest == digest
            sentenced = connection.scalar(sa.select(condemned.c.at).where(here)) is not None
            if sentenced and not _needed(connection, [digest]):
                deleted[digest] = blobs.size(digest)
                blobs.delete(digest)
                connection.execute(sa.delete(condemned).where(here))
    return deleted
