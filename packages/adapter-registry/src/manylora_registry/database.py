"""The database: opened, migrated, and used in transactions of two kinds.

A writing transaction takes the registry's one write lock when it begins, so that what it reads
is still true when it commits and all writers run one after the other: gapless numbers,
compare-and-set and the order of events need no retries, on no database. A reading one sees a
snapshot and waits for nobody. What differs between databases is behind `Backend`.
"""

import contextlib
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from manylora_registry.errors import RegistryLocationError, SchemaTooNewError
from manylora_registry.failures import stated
from manylora_registry.location import shown
from manylora_registry.migrations import REVISIONS

WRITES_UNTIDIED = 500
"""Writing transactions after which a process that goes on and on tidies up."""
_LATEST = REVISIONS[-1]


class Changes(Protocol):
    """Tells one watcher that something may have changed; what did, the events say.

    A lost wake-up delays and loses nothing: whoever waits looks at the events again after a while.
    """

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Returns when something may have changed, `seconds` passed, or soon after `stop`."""
        ...

    def close(self) -> None:
        """Gives its connection back."""
        ...


class Backend(Protocol):
    """One kind of database."""

    engine: Engine

    def exists(self) -> bool:
        """Whether there may be tables; nothing is made by asking."""
        ...

    def read(self, connection: Connection, /) -> Connection:
        """The connection, set so that its next transaction sees one state."""
        ...

    def write(self, connection: Connection, /, *, lasting: bool) -> Connection:
        """The connection, set for a writing transaction; `lasting`: it survives a power cut."""
        ...

    def lock(self, connection: Connection, /) -> None:
        """Waits until no other transaction writes; called when a writing one has begun."""
        ...

    def preparing(self) -> AbstractContextManager[None]:
        """What must hold around the creation of the first tables."""
        ...

    def clock(self, connection: Connection, /) -> int:
        """Microseconds since 1970 UTC, by one clock for all processes that share the registry."""
        ...

    def announce(self, connection: Connection, /) -> None:
        """Wakes those who wait for changes, once the transaction commits."""
        ...

    def changes(self) -> Changes:
        """From now on."""
        ...

    def check(self, connection: Connection, /) -> list[str]:
        """What the database finds damaged in itself."""
        ...

    def tidy(self) -> None:
        """Renews what the planner of queries knows of the tables, if it must be told."""
        ...


class Database:
    """A database, migrated to the schema of this library.

    Args:
        url: of a SQLite file or a Postgres database.
        create: False to refuse one that holds no registry yet.

    Raises:
        RegistryLocationError: it holds no registry, and none is to be made.
        SchemaTooNewError: it was migrated further by a newer library; nothing is touched.
        DatabaseUnavailableError: it cannot be reached or opened.
        DatabaseDamagedError: it is damaged, or no database.
    """

    def __init__(self, url: URL, *, create: bool = True) -> None:
        self._name = shown(url)
        self._writes = 0
        self._backend = _backend(url)
        try:
            self._migrate(create)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def read(self) -> Generator[Connection]:
        """A transaction that sees one state of the database.

        Raises:
            DatabaseUnavailableError: the database cannot be reached.
        """
        with self.stated(), self._backend.engine.connect() as connection:
            yield self._backend.read(connection)

    @contextlib.contextmanager
    def write(self, *, trial: bool = False, lasting: bool = True) -> Generator[Connection]:
        """A transaction alone among writers; committed, durably, when the block ends well.

        Args:
            trial: undo everything at the end of the block instead.
            lasting: False where a power cut may undo it, alone: nobody waits for the disk then.

        Raises:
            DatabaseUnavailableError: the database cannot be reached, or another writer kept the
                lock too long. If that happens at the commit itself, it may have been done.
        """
        with self.stated(), self._backend.engine.connect() as connection:
            connection = self._backend.write(connection, lasting=lasting)
            with connection.begin() as transaction:
                self._backend.lock(connection)
                yield connection
                if trial:
                    transaction.rollback()
                else:
                    self._backend.announce(connection)
                    with self.stated(last=True):
                        transaction.commit()
        self._writes += 1
        if self._writes % WRITES_UNTIDIED == 0:
            self._backend.tidy()

    def stated(self, *, last: bool = False) -> AbstractContextManager[None]:
        """Failures of this database as errors of the registry; what uses two needs to tell them.

        Raises: as `manylora_registry.failures.stated` does.
        """
        return stated(self._name, last=last)

    def clock(self, connection: Connection) -> int:
        """Microseconds since 1970 UTC, by one clock for all processes that share the registry."""
        return self._backend.clock(connection)

    @contextlib.contextmanager
    def changes(self) -> Generator[Changes]:
        """Tells of changes from now on.

        Raises:
            DatabaseUnavailableError: the database cannot be reached.
        """
        with self.stated(), contextlib.closing(self._backend.changes()) as changes:
            yield changes

    def check(self, connection: Connection) -> list[str]:
        """What the database finds damaged in itself."""
        return self._backend.check(connection)

    def close(self) -> None:
        """Closes all connections."""
        if self._writes:
            self._backend.tidy()
        self._backend.engine.dispose()

    def _migrate(self, create: bool) -> None:
        revision = self._revision() if self._backend.exists() else None
        if revision == _LATEST:
            return
        if revision is None and not create:
            raise RegistryLocationError(
                f"there is no registry in {self._name}; publishing to it makes one "
                "(`manylora publish`)"
            )
        with self.stated(), self._backend.preparing():
            if self._revision() == _LATEST:
                return
            with self.write() as connection:
                # Somebody may have done it while this process waited for the lock.
                if _revision_of(connection) != _LATEST:
                    _upgrade(connection)

    def _revision(self) -> str | None:
        with self.read() as connection:
            revision = _revision_of(connection)
        if revision is not None and revision not in REVISIONS:
            raise SchemaTooNewError(
                f"the registry {self._name} has schema {revision}; this manylora "
                f"knows schemas up to {_LATEST}. Use the newer manylora that wrote it."
            )
        return revision


def _backend(url: URL) -> Backend:
    if url.get_backend_name() == "sqlite":
        from manylora_registry.sqlite import Sqlite

        try:
            return Sqlite(url)
        except (TypeError, ValueError):
            raise _wrong_option() from None
    try:
        from psycopg import ProgrammingError
        from psycopg.conninfo import make_conninfo

        from manylora_registry.postgres import Postgres
    except ImportError as error:
        raise RegistryLocationError(
            "a registry in Postgres needs psycopg: pip install 'manylora-registry[postgres]'"
        ) from error
    try:
        make_conninfo(**{key: str(value) for key, value in url.query.items()})
    except ProgrammingError:
        raise _wrong_option() from None
    return Postgres(url)


def _wrong_option() -> RegistryLocationError:
    # Neither the URL nor the cause is repeated: there may be a password in them.
    return RegistryLocationError(
        "the URL of the registry's database has an option the driver does not take: look at what "
        "follows its ?"
    )


def _revision_of(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.exec_driver_sql(
        "SELECT version_num FROM alembic_version"
    ).scalar()
    return found


def _upgrade(connection: Connection) -> None:
    """Brings the schema to the latest revision, within the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
