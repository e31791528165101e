"""The embedded database: one SQLite file in WAL mode, for the processes of one machine.

The write lock is SQLite's own, taken by `BEGIN IMMEDIATE`; readers have a snapshot each. Where
nothing can be written beside the file, as on a read-only file system, it can be read all the same.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool

from manylora_registry.errors import RegistryLocationError

BUSY_SECONDS = 60
FEW_ROWS = 500
POLL_SECONDS = 0.02
"""Between two looks at the counter of changes; one takes some microseconds."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Sqlite:
    """See `Backend`."""

    def __init__(self, url: URL) -> None:
        # Whole, as each look opens it anew: where it is does not change with where this process is.
        self._file = Path(url.database or "").absolute()
        if self._only_readable():
            # Each transaction looks anew at which of the two ways of reading is right.
            self.engine = sa.create_engine(
                "sqlite://", creator=self._connect_reading, poolclass=NullPool
            )
        else:
            self.engine = sa.create_engine(
                url,
                connect_args={"timeout": BUSY_SECONDS},
                # Threads of a server read at the same time; none should wait for a connection.
                max_overflow=-1,
            )
            event.listen(self.engine, "connect", self._on_open)
            event.listen(self.engine, "checkout", self._on_checkout)
        event.listen(self.engine, "connect", _on_connect)
        event.listen(self.engine, "begin", _on_begin)

    def _only_readable(self) -> bool:
        """Whether SQLite cannot write beside the file, which it does even to read in WAL mode."""
        paths = [self._file, self._beside("-wal"), self._beside("-shm")]
        return self._file.exists() and not (
            os.access(self._file.parent, os.W_OK, effective_ids=True)
            or all(os.access(path, os.W_OK, effective_ids=True) for path in paths)
        )

    def _beside(self, suffix: str) -> Path:
        return self._file.with_name(self._file.name + suffix)

    def _connect_reading(self) -> sqlite3.Connection:
        # While somebody writes, the log is there and so is what readers need to share it. Without
        # a log all is in the file, and SQLite reads that alone if told that nothing changes it.
        immutable = "" if self._beside("-wal").exists() else "&immutable=1"
        uri = f"{self._file.as_uri()}?mode=ro{immutable}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)

    def _on_open(self, _connection: Any, record: Any) -> None:
        record.info["file"] = self._identity()

    def _on_checkout(self, _connection: Any, record: Any, _proxy: Any) -> None:
        """Has the pool open the file anew where another has taken its place, as at a restore.

        A connection goes on with the file it opened, wherever that is now.

        Raises:
            sqlite3.OperationalError: there is no file any more.
        """
        now = self._identity()
        if now is None:
            raise sqlite3.OperationalError("its file is gone")
        if now != record.info["file"]:
            raise DisconnectionError("the database's file was replaced")

    def _identity(self) -> tuple[int, int] | None:
        """Of the file; None while there is none."""
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def exists(self) -> bool:
        """See `Backend`."""
        return self._file.exists()

    def read(self, connection: Connection) -> Connection:
        """See `Backend`: every transaction in WAL mode has its snapshot."""
        return connection

    def write(self, connection: Connection, *, lasting: bool) -> Connection:
        """See `Backend`."""
        return connection.execution_options(
            manylora_write=True, manylora_synchronous="FULL" if lasting else "NORMAL"
        )

    def lock(self, _connection: Connection) -> None:
        """See `Backend`: `BEGIN IMMEDIATE` has it already."""

    @contextlib.contextmanager
    def preparing(self) -> Generator[None]:
        """See `Backend`: the journal mode cannot be set while another process does the same."""
        try:
            lock = self._file.with_suffix(".lock").open("w")
        except OSError as error:
            raise RegistryLocationError(
                f"no registry can be made in {self._file}: {error.strerror}"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self.engine.connect() as connection:
                # Stays with the file.
                connection.connection.cursor().execute("PRAGMA journal_mode=WAL")
            yield

    def clock(self, _connection: Connection) -> int:
        """See `Backend`: of the one machine."""
        return (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)

    def announce(self, _connection: Connection) -> None:
        """See `Backend`: a commit moves the counter that waiting processes look at."""

    def changes(self) -> "_DataVersion":
        """See `Backend`."""
        return _DataVersion(self.engine)

    def check(self, connection: Connection) -> list[str]:
        """See `Backend`."""
        found = connection.exec_driver_sql("PRAGMA integrity_check")
        return [str(row[0]) for row in found if row[0] != "ok"]

    def tidy(self) -> None:
        """See `Backend`: counts rows again when there are twice as many as at the last time."""
        with (
            # Of a file that is gone there is nothing to count.
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(self.engine.raw_connection()) as connection,
        ):
            cursor = connection.cursor()
            # Seldom needed and never urgent: not worth waiting for a lock.
            cursor.execute("PRAGMA busy_timeout=0")
            with contextlib.suppress(sqlite3.OperationalError):
                if _rows(cursor) > 2 * _rows_known(cursor):
                    cursor.execute("PRAGMA analysis_limit=400")
                    cursor.execute("ANALYZE")
            cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")


def _rows(cursor: Any) -> int:
    return cursor.execute("SELECT max(id) FROM versions").fetchone()[0] or 0


def _rows_known(cursor: Any) -> int:
    """Versions that the planner knows of; it plans well without knowing of so few."""
    if not cursor.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'").fetchone():
        return FEW_ROWS
    found = cursor.execute("SELECT stat FROM sqlite_stat1 WHERE tbl = 'versions'").fetchone()
    return max(int(found[0].split()[0]), FEW_ROWS) if found else FEW_ROWS


class _DataVersion:
    """See `Changes`: polls SQLite's counter of commits by other connections, without a query."""

    def __init__(self, engine: Engine) -> None:
        # Not in a transaction: within one it would see the same state for ever.
        self._connection = engine.raw_connection()
        self._seen = self._read()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not stop.wait(min(left, POLL_SECONDS)):
            if (now := self._read()) != self._seen:
                self._seen = now
                return

    def close(self) -> None:
        self._connection.close()

    def _read(self) -> int:
        return self._connection.cursor().execute("PRAGMA data_version").fetchone()[0]


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver would begin transactions by itself, and later than asked; _on_begin does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("manylora_write"):
        connection.exec_driver_sql("BEGIN")
        return
    # In WAL mode NORMAL could lose the last commits in a power cut: a version said to be
    # published would be gone.
    connection.exec_driver_sql(f"PRAGMA synchronous={options['manylora_synchronous']}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
