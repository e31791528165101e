"""One registry into another, of whatever kind: a directory to Postgres and a bucket, and back.

Blobs first, each verified as it is read and again by the store that takes it; then every row, ids
and hash chain as they are, in one transaction: the copy is the same registry or still empty. One
that was interrupted goes on where it was, as blobs that have arrived are not sent again.
"""

from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.blobs import BlobStore, Progress, copy_verified
from manylora_registry.database import Database
from manylora_registry.errors import CorruptBlobError, DestinationError
from manylora_registry.schema import metadata, version_blobs

TRANSIENT = frozenset({"leases", "lease_blobs", "condemned"})
"""Tables of what processes are doing just now: no part of what a registry holds."""
ROWS_AT_ONCE = 1000


def copy(
    blobs: BlobStore,
    database: Database,
    to_blobs: BlobStore,
    to_database: Database,
    progress: Progress,
) -> None:
    """Makes the second registry, which must be new or a copy begun before, equal to the first.

    Others may publish to the first one and collect its garbage meanwhile: the copy is of one
    moment.

    Raises:
        CorruptBlobError: a blob of the first is damaged.
        BlobStoreError: blobs cannot be read or written.
        DestinationError: the second holds something else.
    """
    while True:
        try:
            return _copy(blobs, database, to_blobs, to_database, progress)
        except CorruptBlobError as error:
            with database.read() as connection:
                needed = _needed(connection)
            # It is gone with the version that needed it: the copy is of a later moment.
            if error.digest in needed:
                raise


def _copy(
    blobs: BlobStore,
    database: Database,
    to_blobs: BlobStore,
    to_database: Database,
    progress: Progress,
) -> None:
    with database.read() as connection:
        needed = _needed(connection)
    with to_database.read() as connection:
        empty = _is_empty(connection)
    if empty:
        # Most of the time goes here, with no transaction open.
        _copy_blobs(blobs, to_blobs, needed, progress)
    with database.read() as old, to_database.write() as new:
        if not _is_empty(new):
            _require_same(database, old, new)
        with database.stated():
            needed = _needed(old)
        _copy_blobs(blobs, to_blobs, needed, progress)
        if _is_empty(new):
            _copy_rows(database, old, new)


def _needed(connection: Connection) -> list[str]:
    digests = sa.select(version_blobs.c.digest).distinct().order_by(version_blobs.c.digest)
    return list(connection.scalars(digests))


def _copy_blobs(
    source: BlobStore, target: BlobStore, needed: list[str], progress: Progress
) -> None:
    there = set(target.digests())
    missing = [digest for digest in needed if digest not in there]
    arrived = len(needed) - len(missing)
    progress("copying", arrived, len(needed))
    for count, digest in enumerate(missing, arrived + 1):
        with target.staging() as staging:
            blob = staging.directory / "blob"
            copy_verified(source, digest, source.size(digest), blob)
            staging.put({digest: blob})
        progress("copying", count, len(needed))


def _tables() -> list[sa.Table]:
    return [table for table in metadata.sorted_tables if table.name not in TRANSIENT]


def _is_empty(connection: Connection) -> bool:
    return all(connection.execute(sa.select(table).limit(1)).first() is None for table in _tables())


def _all_of(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table).order_by(*table.primary_key)


def _rows(database: Database, connection: Connection, table: sa.Table) -> Iterator[sa.Row[Any]]:
    # SQLite reads as rows are fetched, and finds damage only then.
    with database.stated():
        yield from connection.execute(_all_of(table))


def _require_same(database: Database, old: Connection, new: Connection) -> None:
    for table in _tables():
        pairs = zip_longest(_rows(database, old, table), new.execute(_all_of(table)))
        if any(one != two for one, two in pairs):
            raise DestinationError(
                "the registry to copy to holds something else already; give a new one"
            )


def _copy_rows(database: Database, old: Connection, new: Connection) -> None:
    for table in _tables():
        rows = _rows(database, old, table)
        columns = table.columns.keys()
        while some := [dict(zip(columns, row, strict=True)) for row in islice(rows, ROWS_AT_ONCE)]:
            new.execute(sa.insert(table), some)
        counter = table.autoincrement_column
        if new.dialect.name == "postgresql" and counter is not None:
            # Its sequences do not notice ids that were given.
            sequence = sa.func.pg_get_serial_sequence(table.name, counter.name)
            new.execute(sa.select(sa.func.setval(sequence, sa.func.max(counter))))
