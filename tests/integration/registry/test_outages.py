"""A Postgres that goes away in the middle, or refuses: one line that says what to do."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import psutil
import pytest
import sqlalchemy as sa

from manylora_registry import Registry
from manylora_registry.errors import DatabaseUnavailableError
from manylora_registry.failures import stated
from manylora_registry.postgres import Postgres
from manylora_registry.transfer import copy_registry
from tests.integration.registry.conftest import BASE


class Severed:
    """Passes on what clients and Postgres say, until a client says `last`: that is done, and
    instead of the answer comes the end of the connection."""

    def __init__(self, url: str) -> None:
        through = sa.make_url(url)
        self._upstream = f"{through.query['host']}/.s.PGSQL.{through.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.last: bytes | None = None
        port = self._listener.getsockname()[1]
        self.url = through.set(host="127.0.0.1", port=port, query={}).render_as_string(
            hide_password=False
        )
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._upstream)
                over = threading.Event()
                for side in (self._ask, self._answer):
                    threading.Thread(target=side, args=(client, server, over), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, over: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while said := client.recv(1 << 16):
                if self.last is not None and self.last in said:
                    over.set()
                server.sendall(said)
            server.shutdown(socket.SHUT_RDWR)

    def _answer(self, client: socket.socket, server: socket.socket, over: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while (said := server.recv(1 << 16)) and not over.is_set():
                client.sendall(said)
            client.shutdown(socket.SHUT_RDWR)
            server.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def severed(new_postgres) -> Iterator[Severed]:
    with contextlib.closing(Severed(new_postgres())) as proxy:
        yield proxy


@pytest.fixture
def blobs(tmp_path) -> str:
    return (tmp_path / "blobs").as_uri()


def test_a_connection_that_breaks_at_the_commit_leaves_it_in_doubt_and_says_so(
    severed, blobs, make_adapter
):
    with Registry.open(database=severed.url, blobs=blobs) as registry:
        version = registry.publish("spelling", make_adapter(1), base=BASE)
        severed.last = b"COMMIT\0"
        with pytest.raises(DatabaseUnavailableError, match="it may have been done"):
            registry.set_alias("spelling", "production", version.number, expect=0)
        severed.last = None

        assert registry.resolve("spelling") == version


def test_a_connection_that_breaks_before_the_commit_leaves_no_doubt(severed, blobs, make_adapter):
    with Registry.open(database=severed.url, blobs=blobs) as registry:
        version = registry.publish("spelling", make_adapter(1), base=BASE)
        severed.last = b"INSERT INTO alias_moves"
        with pytest.raises(DatabaseUnavailableError, match="repeat when the database is back"):
            registry.set_alias("spelling", "production", version.number, expect=0)
        severed.last = None

        assert registry.set_alias("spelling", "production", version.number, expect=0)


def test_a_copy_names_the_database_that_went_away(severed, blobs, make_adapter, tmp_path):
    with (
        Registry.open(database=severed.url, blobs=blobs) as registry,
        Registry.open(tmp_path / "copy") as copy,
    ):
        registry.publish("spelling", make_adapter(1), base=BASE)
        severed.last = b"FROM versions ORDER BY"
        with pytest.raises(DatabaseUnavailableError, match="database postgresql"):
            copy_registry(registry, copy)
        severed.last = None

        assert copy_registry(registry, copy).ok


def test_a_machine_that_vanished_with_a_question_is_given_a_minute(severed, blobs):
    """What the kernel is told; without it, it asks for a quarter of an hour."""
    port = sa.make_url(severed.url).port
    with Registry.open(database=severed.url, blobs=blobs):
        connections = psutil.Process().net_connections("tcp4")
        handles = [one.fd for one in connections if one.raddr and one.raddr.port == port]
        for handle in handles:
            with socket.socket(fileno=os.dup(handle)) as ours:
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
    assert handles


def test_what_a_role_may_not_do_is_said(new_postgres, blobs, make_adapter):
    url = sa.make_url(new_postgres())
    with Registry.open(database=url.render_as_string(hide_password=False), blobs=blobs) as registry:
        version = registry.publish("spelling", make_adapter(1), base=BASE)
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("CREATE ROLE reader LOGIN")
        connection.exec_driver_sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    reader = _as(url, "reader")
    try:
        with Registry.open(database=reader, blobs=blobs) as registry:
            assert registry.find("spelling@1") == version
            with pytest.raises(DatabaseUnavailableError, match="the role needs"):
                registry.set_alias("spelling", "production", version.number)
            with admin.connect() as connection:
                connection.exec_driver_sql("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
            with pytest.raises(DatabaseUnavailableError, match="has lost USAGE"):
                registry.find("spelling@1")
        with pytest.raises(DatabaseUnavailableError, match="CREATE on the schema"):
            Registry.open(database=_as(sa.make_url(new_postgres()), "reader"), blobs=blobs)
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql("DROP OWNED BY reader")
            connection.exec_driver_sql("DROP ROLE reader")
        admin.dispose()


def _as(url: sa.URL, user: str) -> str:
    return url.set(username=user).render_as_string(hide_password=False)


def test_a_server_that_stands_still_is_given_up_and_its_connection_replaced(new_postgres):
    postgres = Postgres(sa.make_url(new_postgres()), answer_seconds=1)
    asked = sa.text("SELECT pg_backend_pid()")
    with postgres.engine.connect() as connection:
        still = connection.scalar(asked)
        os.kill(still, signal.SIGSTOP)
        try:
            with (
                pytest.raises(
                    DatabaseUnavailableError, match=r"not answered for 1 s; the conn.* broke"
                ),
                stated("of a test"),
            ):
                connection.scalar(asked)
        finally:
            os.kill(still, signal.SIGCONT)
    with postgres.engine.connect() as connection:
        assert connection.scalar(asked) != still
    postgres.engine.dispose()
