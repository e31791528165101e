"""The database: opened, migrated, and used in transactions of two kinds.

A writing transaction takes the write lock when it begins (`BEGIN IMMEDIATE`), so that what it
reads is still true when it commits; all writers run one after the other. A reading one sees a
snapshot and waits for nobody (WAL).
"""

import contextlib
import fcntl
from collections.abc import Generator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection

from manylora_registry.errors import SchemaTooNewError
from manylora_registry.migrations import REVISIONS

BUSY_SECONDS = 60
_LATEST = REVISIONS[-1]


class Database:
    """A SQLite file, migrated to the schema of this library.

    Raises:
        SchemaTooNewError: it was migrated further by a newer library; nothing is touched.
    """

    def __init__(self, file: Path) -> None:
        self._engine = sa.create_engine(
            URL.create("sqlite", database=str(file)),
            connect_args={"timeout": BUSY_SECONDS},
            # Threads of a server read at the same time; none should wait for a connection.
            max_overflow=-1,
        )
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        try:
            self._migrate(file)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def read(self) -> Generator[Connection]:
        """A transaction that sees one state of the database."""
        with self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Generator[Connection]:
        """A transaction alone among writers; committed, durably, when the block ends well."""
        with self._engine.connect() as connection:
            connection = connection.execution_options(manylora_write=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def _migrate(self, file: Path) -> None:
        if file.exists() and self._revision() == _LATEST:
            return
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._engine.connect() as connection:
                # Stays with the file, and cannot be set while another process does the same.
                connection.connection.cursor().execute("PRAGMA journal_mode=WAL")
            if self._revision() != _LATEST:
                with self.write() as connection:
                    _upgrade(connection)

    def _revision(self) -> str | None:
        with self.read() as connection:
            revision = _revision_of(connection)
        if revision is not None and revision not in REVISIONS:
            raise SchemaTooNewError(
                f"the registry {self._engine.url.database} has schema {revision}; this manylora "
                f"knows schemas up to {_LATEST}. Use the newer manylora that wrote it."
            )
        return revision


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


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver would begin transactions by itself, and later than asked; _on_begin does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    # In WAL mode NORMAL could lose the last commits in a power cut: a version said to be
    # published would be gone.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("manylora_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
