"""The shared database: Postgres, for the processes of any number of machines.

The write lock is one transaction-level advisory lock. It is taken before anything is read, in
READ COMMITTED, so that every statement behind it sees what the writer before has committed, and
it is let go only after the own commit is visible. With one lock, taken first, and isolation levels
set by every transaction for itself, writers neither deadlock nor fail to serialise: there is
nothing to retry, whatever the server's defaults are.
"""

import contextlib
import threading
import time
from collections.abc import Generator
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError

LOCK = 0x6D616E796C6F7261
"""Key of the advisory lock: "manylora"."""
CHANNEL = "manylora_registry"
"""Where changes are announced."""
CONNECT_SECONDS = 10
LOCK_SECONDS = 60
"""How long a writer waits for the others."""
ANSWER_SECONDS = 90
"""How long a server may say nothing to a question; longer than a writer waits for the others."""
STOP_SECONDS = 0.2
"""How soon one who waits for changes notices that it shall stop."""
IDLE_SECONDS = 60
"""After this long without a statement the server ends a transaction: a writer whose machine is
gone holds up the others no longer."""


class Postgres:
    """See `Backend`.

    Args:
        url: of the database.
        answer_seconds: after which a server that says nothing to a question is given up.
    """

    def __init__(self, url: URL, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.engine = sa.create_engine(
            url,
            pool_size=8,
            max_overflow=24,
            pool_timeout=LOCK_SECONDS,
            # A connection that the server or a firewall has dropped is replaced, not handed out.
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "manylora",
                # A server whose machine is gone answers nothing: told in a minute, by the first
                # three where it was silent already and by the last where it owes an answer.
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
                "tcp_user_timeout": 60_000,
            },
        )
        self._answer_seconds = answer_seconds
        event.listen(self.engine, "do_connect", self._connect)
        event.listen(self.engine, "connect", _on_connect)

    def _connect(
        self, _dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]
    ) -> "_Connection":
        connection = _Connection.connect(*arguments, **options)
        connection.answer_seconds = self._answer_seconds
        return connection

    def exists(self) -> bool:
        """See `Backend`."""
        return True

    def read(self, connection: Connection) -> Connection:
        """See `Backend`."""
        return connection.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    def write(self, connection: Connection, *, lasting: bool) -> Connection:
        """See `Backend`."""
        return connection.execution_options(
            isolation_level="READ COMMITTED", manylora_lasting=lasting
        )

    def lock(self, connection: Connection) -> None:
        """See `Backend`."""
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        if not connection.get_execution_options()["manylora_lasting"]:
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        """See `Backend`: tables are made within a transaction, under the write lock."""
        return contextlib.nullcontext()

    def clock(self, connection: Connection) -> int:
        """See `Backend`: the server's."""
        now = connection.exec_driver_sql(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
        )
        return now.scalar_one()

    def announce(self, connection: Connection) -> None:
        """See `Backend`."""
        connection.exec_driver_sql(f"NOTIFY {CHANNEL}")

    def changes(self) -> "_Listener":
        """See `Backend`."""
        return _Listener(self.engine)

    def check(self, _connection: Connection) -> list[str]:
        """See `Backend`: the server watches over its own pages."""
        return []

    def tidy(self) -> None:
        """See `Backend`: autovacuum does it."""


class _Connection(psycopg.Connection[Any]):
    """Gives up a server that stands still, whose kernel goes on to say that it is there.

    No time limit of the server's own ends that, and none of TCP.
    """

    answer_seconds: float = ANSWER_SECONDS

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        return super().wait(self._answered(gen), *arguments, **options)

    def _answered(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The steps of a question and its answer, taken when there is news and once in a while."""
        end = time.monotonic() + self.answer_seconds
        try:
            wanted = next(steps)
            while True:
                news = yield wanted
                wanted = steps.send(news)
                if news:
                    end = time.monotonic() + self.answer_seconds
                elif time.monotonic() > end:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(
                        f"the server has not answered for {self.answer_seconds:g} s"
                    )
        except StopIteration as answer:
            return answer.value


class _Listener:
    """See `Changes`: LISTENs on a connection of its own.

    Where notifications do not arrive - behind some poolers, or while the server is away - what is
    left is a look every `seconds`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = self._listen()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        end = time.monotonic() + seconds
        try:
            if self._connection is None:
                # Something may have changed meanwhile: looked at before the first wait.
                self._connection = self._listen()
                return
            driver: Any = self._connection.connection.dbapi_connection
            while (left := end - time.monotonic()) > 0 and not stop.is_set():
                if list(driver.notifies(timeout=min(left, STOP_SECONDS), stop_after=1)):
                    return
        except (DBAPIError, self._error):
            self.close()
            stop.wait(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # One that the server has dropped cannot be told good-bye.
            with contextlib.suppress(DBAPIError, self._error):
                connection.close()

    @property
    def _error(self) -> type[Exception]:
        """What the driver raises; it is an extra, and imported by the engine."""
        return self._engine.dialect.loaded_dbapi.Error

    def _listen(self) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        # Out of the pool: it goes on listening and is closed at the end.
        connection.detach()
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")
        return connection


def _on_connect(connection: Any, _record: Any) -> None:
    # By statement and not as a start-up option, which poolers refuse.
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    connection.commit()
