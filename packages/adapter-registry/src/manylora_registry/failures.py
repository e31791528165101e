"""What databases say when they fail, as errors of the registry that say what to do about it."""

import contextlib
import sqlite3
from collections.abc import Generator

from sqlalchemy.exc import (
    DatabaseError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from manylora_registry.errors import DatabaseDamagedError, DatabaseUnavailableError

_WRITABLE = (
    "to change it, or to read it where a writer died, its directory and all registry.sqlite* in "
    "it must be writable for you; else work on a copy of the directory"
)
_LOCKED = "another program keeps its lock: end that, or repeat later"
_READ_ONLY = "this server only reads: name the primary one"
_ADVICE = {
    "unable to open database file": _WRITABLE,
    "attempt to write a readonly database": _WRITABLE,
    "database is locked": _LOCKED,
    "database or disk is full": "make room, then repeat",
}
"""What to do about what SQLite says."""
_STATES = {
    "42501": "the role needs SELECT, INSERT, UPDATE, DELETE on the tables and USAGE on the "
    "sequences, and CREATE on the schema where tables are to be made or migrated",
    "42P01": "its tables are gone, or the role has lost USAGE on their schema",
    "25006": _READ_ONLY,
    "0A000": _READ_ONLY,
    "25P03": "this process stood still for too long in the middle; repeat",
    "55P03": _LOCKED,
    "SQLITE_IOERR_SHMSIZE": "make room, then repeat: even to read, SQLite writes beside its file",
}
"""What to do about what Postgres says, by SQLSTATE, and SQLite, where its words say too little;
these, of whatever kind, are no damage."""
_LOST = "the connection broke; repeat when the database is back"
_IN_DOUBT = (
    "the connection broke at the last step, so it may have been done all the same: look, and "
    "repeat it if it was not"
)


@contextlib.contextmanager
def stated(database: str, *, last: bool = False) -> Generator[None]:
    """Failures of a database as errors of the registry; they name no password.

    Args:
        database: what to call it.
        last: the block commits, so that nobody knows what became of it if the connection breaks.

    Raises:
        DatabaseUnavailableError: it cannot be reached, is locked, or refuses.
        DatabaseDamagedError: it is damaged, or no database.
    """
    try:
        yield
    # SQLite's own comes from what may not be in a transaction, such as the journal mode.
    except (DatabaseError, InterfaceError, PoolTimeoutError, sqlite3.OperationalError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        name = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
        state = _STATES.get(name or "")
        # Of the general kind is what SQLite says of a file that is malformed, and of the internal
        # kind what Postgres says of a page; others but these are mistakes of ours.
        if state is None and type(error) in (DatabaseError, InternalError):
            raise DatabaseDamagedError(database, said) from error
        if state is None and isinstance(error, DatabaseError):
            if not isinstance(error, OperationalError):
                raise
            if error.connection_invalidated:
                state = _IN_DOUBT if last else _LOST
        advice = state or _ADVICE.get(said)
        raise DatabaseUnavailableError(database, f"{said}; {advice}" if advice else said) from error
