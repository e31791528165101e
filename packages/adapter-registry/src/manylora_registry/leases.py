"""Leases: claims on blobs and versions that garbage collection honours until they run out.

An upload lease is taken before the first blob is stored and names every blob of the version to
come; the transaction that makes the version visible ends it. A serving lease names a version.
Whoever dies leaves leases that run out by themselves; nobody has to clean up after them.
"""

import contextlib
import uuid
from collections.abc import Generator, Iterable
from types import TracebackType

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.database import Database
from manylora_registry.errors import (
    DatabaseUnavailableError,
    DeletedError,
    LeaseError,
    LeaseExpiredError,
)
from manylora_registry.reference import AdapterReference
from manylora_registry.rows import find_row, time
from manylora_registry.schema import condemned, lease_blobs, leases

UPLOAD_SECONDS = 24 * 3600
"""Longer than any upload of an adapter takes, as it is not renewed."""
SERVING_SECONDS = 3600
LONGEST_SECONDS = 366 * 24 * 3600


class Lease:
    """A claim on a version: while it holds, the version's bytes are not collected.

    A context manager that releases it at the end. Renew it well before `expires_at`.
    """

    def __init__(self, database: Database, identity: str, seconds: float, expires_at: int) -> None:
        self._database = database
        self._seconds = seconds
        self.id = identity
        self.expires_at = time(expires_at)
        """By the clock of the database."""

    def renew(self, seconds: float | None = None) -> None:
        """Makes it last `seconds` from now, or as many as it was taken for.

        Raises:
            LeaseError: it cannot last that long.
            LeaseExpiredError: it has run out; resolve again and take a new one.
        """
        with self._database.write() as connection:
            now = self._database.clock(connection)
            expires_at = _after(now, self._seconds if seconds is None else seconds)
            renewed = connection.execute(
                sa.update(leases)
                .where(leases.c.id == self.id, leases.c.expires_at > now)
                .values(expires_at=expires_at)
            )
            if renewed.rowcount != 1:
                raise LeaseExpiredError(
                    "the lease has run out, and the version may have been collected: resolve it "
                    "again and take a new lease"
                )
        self.expires_at = time(expires_at)

    def release(self) -> None:
        """Ends it; one that has run out stays ended."""
        with self._database.write() as connection:
            _end(connection, [self.id])

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lease_version(
    database: Database, reference: AdapterReference, seconds: float, holder: str
) -> Lease:
    """Takes a serving lease on a version.

    Raises:
        LeaseError: it cannot last that long.
        NotFoundError: there is no such version.
        DeletedError: its bytes are gone, or a collection may be about to remove them.
    """
    with database.write() as connection:
        row = find_row(connection, reference)
        if row.collected_at is not None:
            raise DeletedError(f"{reference.name}@{row.number} was deleted and its bytes are gone")
        expires_at = _after(database.clock(connection), seconds)
        identity = _insert(connection, "serving", holder, expires_at, row.id)
    return Lease(database, identity, seconds, expires_at)


@contextlib.contextmanager
def uploading(database: Database, digests: Iterable[str], holder: str) -> Generator[str]:
    """An upload lease on blobs that are about to be stored, by its id.

    A blob that garbage collection has condemned is pardoned: it checks again under the same lock
    before it deletes. `end_upload` ends the lease; so does leaving the block with an error.
    """
    named = sorted(digests)
    # A power cut ends the upload too, or, of a database elsewhere, loses the lease, which the
    # upload's end finds out.
    with database.write(lasting=False) as connection:
        expires_at = _after(database.clock(connection), UPLOAD_SECONDS)
        identity = _insert(connection, "upload", holder, expires_at)
        connection.execute(
            sa.insert(lease_blobs),
            [{"lease_id": identity, "digest": digest} for digest in named],
        )
        connection.execute(sa.delete(condemned).where(condemned.c.digest.in_(named)))
    try:
        yield identity
    except BaseException:
        # Without a database it runs out by itself; the first error is the one to tell.
        with contextlib.suppress(DatabaseUnavailableError), database.write() as connection:
            _end(connection, [identity])
        raise


def end_upload(connection: Connection, identity: str) -> None:
    """Ends an upload lease in the transaction that makes its blobs needed.

    Raises:
        LeaseExpiredError: a collection found it run out, so blobs may be gone.
    """
    if _end(connection, [identity]) != 1:
        raise LeaseExpiredError("storing the files took longer than a day; publish again")


def drop_expired(connection: Connection, now: int) -> None:
    """Ends every lease that has run out: from then on its holder cannot commit."""
    expired = connection.scalars(sa.select(leases.c.id).where(leases.c.expires_at <= now)).all()
    _end(connection, expired)


def _insert(
    connection: Connection, kind: str, holder: str, expires_at: int, version: int | None = None
) -> str:
    identity = uuid.uuid4().hex
    connection.execute(
        sa.insert(leases).values(
            id=identity, kind=kind, holder=holder, version_id=version, expires_at=expires_at
        )
    )
    return identity


def _end(connection: Connection, identities: Iterable[str]) -> int:
    """How many of the leases there were to end."""
    ended = list(identities)
    connection.execute(sa.delete(lease_blobs).where(lease_blobs.c.lease_id.in_(ended)))
    return connection.execute(sa.delete(leases).where(leases.c.id.in_(ended))).rowcount


def _after(now: int, seconds: float) -> int:
    if not 0 <= seconds <= LONGEST_SECONDS:
        raise LeaseError(f"a lease lasts from 0 to {LONGEST_SECONDS} seconds, not {seconds}")
    return now + int(seconds * 1_000_000)
