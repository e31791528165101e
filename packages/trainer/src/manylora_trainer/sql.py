"""Rows of a database, through SQLAlchemy."""

import datetime
import decimal
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from sqlalchemy import (
    BindParameter,
    ColumnClause,
    Connection,
    Engine,
    RowMapping,
    Select,
    bindparam,
    column,
    create_engine,
    literal_column,
    select,
    table,
    text,
)
from sqlalchemy.exc import DataError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.expression import FromClause, TextClause
from sqlalchemy.types import NullType

from manylora_trainer.errors import SourceError
from manylora_trainer.source_settings import ENVIRONMENT_VARIABLE, SqlSource
from manylora_trainer.sources import Place, Row, bad_row

BIND_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?!:)")
"""What SQLAlchemy's `text` takes for one; in a user's query it is part of a literal."""
KEY_TYPES: Mapping[str, Any] = {
    "date": datetime.date,
    "datetime": datetime.datetime,
    "time": datetime.time,
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
}
"""Types of keys that JSON has no form for, by the name a place gives them."""

_Fetched = tuple[Any, dict[str, Any] | str]
"""The key of a row and its columns, or why they cannot be read."""


@dataclass(frozen=True)
class SqlRows:
    """A table or query in the order of its unique key.

    Each page asks for the rows whose key is greater than the last one's, so that a place is that
    key: rows inserted or deleted elsewhere shift nothing, and no connection or transaction is held
    while the rows of a page are trained on. Within a page rows come through a server-side cursor.
    """

    settings: SqlSource

    @property
    def name(self) -> str:
        """The table or query, without the URL."""
        return f"table {self.settings.table}" if self.settings.table else "query"

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows."""
        number, last = (0, None) if after is None else (int(after["row"]), _key(after["key"]))
        engine = _connect(self.settings)
        try:
            if after is None:
                self._refuse_null_keys(engine)
            while True:
                page = self._page(engine, last)
                if last is not None:
                    self._refuse_another(engine, last, page)
                if not page:
                    return
                for (key, _), (following, _) in pairwise(page):
                    if following == key:
                        raise SourceError(
                            f"{self.name}: two rows have {self.settings.key} {key!r}; "
                            "the key must be unique"
                        )
                # One row more than a page was fetched, to see that its key is another.
                for last, columns in page[: self.settings.page_rows]:
                    number += 1
                    after = {"row": number, "key": self._place(last)}
                    if isinstance(columns, str):
                        yield bad_row(self.name, number, columns, after)
                    else:
                        yield Row(number, columns, self.name, after)
                if len(page) <= self.settings.page_rows:
                    return
        except SQLAlchemyError as error:
            where = f" behind {self.settings.key} {last!r}" if last is not None else ""
            raise SourceError(f"{self.name} cannot be read{where}: {_why(error)}") from error
        finally:
            engine.dispose()

    def _page(self, engine: Engine, last: Any) -> Sequence[_Fetched]:
        name = self.settings.key
        everything: ColumnClause[Any] = literal_column("*")
        try:
            with engine.connect() as connection:
                rows = _streamed(connection, self._behind(last, everything))
        except SQLAlchemyError as error:
            if not _is_of_a_value(error):
                raise
            return self._row_by_row(engine, last)
        if rows and name not in rows[0]:
            known = ", ".join(map(str, rows[0]))
            raise SourceError(f"{self.name} has no column {name}; it has {known}")
        return [(row[name], dict(row)) for row in rows]

    def _row_by_row(self, engine: Engine, last: Any) -> Sequence[_Fetched]:
        """A page with a value that no Python value can hold: the rows around it can be read."""
        key: ColumnClause[Any] = column(self.settings.key)
        everything: ColumnClause[Any] = literal_column("*")
        page: list[_Fetched] = []
        with engine.connect() as connection:
            for (found,) in connection.execute(self._behind(last, key)).all():
                row = select(everything).select_from(self._from()).where(key == _bound(found))
                try:
                    rows = connection.execute(row).mappings().all()
                except SQLAlchemyError as error:
                    if not _is_of_a_value(error):
                        raise
                    connection.rollback()
                    problem = f"{self.settings.key} {found!r} cannot be read: {_why(error)}"
                    page.append((found, problem))
                    continue
                if not rows:
                    # As of a narrow float: going on would pass over the row in silence.
                    raise SourceError(
                        f"{self.name}: no row is found by {self.settings.key} {found!r}, which one "
                        "has; choose another key"
                    )
                page += [(found, dict(r)) for r in rows]
        return page

    def _behind(self, last: Any, wanted: ColumnClause[Any]) -> Select[Any]:
        """One row more than a page, of those whose key is greater than the last one's."""
        key: ColumnClause[Any] = column(self.settings.key)
        statement: Select[Any] = select(wanted).select_from(self._from())
        if last is not None:
            statement = statement.where(key > _bound(last))
        return statement.order_by(key).limit(self.settings.page_rows + 1)

    def _refuse_another(self, engine: Engine, last: Any, page: Sequence[_Fetched]) -> None:
        """Refuses keys that the database compares otherwise than Python does.

        Of two that are equal for it alone (a collation that is blind to case) the next page passes
        over the second in silence; one that is greater than itself (a `real`, read as a wider
        float) begins the next page again and again.
        """
        name = self.settings.key
        if page and page[0][0] == last:
            raise SourceError(
                f"{self.name}: the database takes {name} {last!r} for greater than itself, as it "
                "does a narrow float; choose another key"
            )
        key: ColumnClause[Any] = column(name)
        equals = select(key).select_from(self._from()).where(key == _bound(last))
        statement: Select[Any] = equals.limit(2)
        with engine.connect() as connection:
            equal = [row[0] for row in connection.execute(statement)]
        if len(equal) > 1:
            raise SourceError(
                f"{self.name}: the database takes {name} {equal[0]!r} and {equal[1]!r} for equal; "
                "the key must be unique"
            )

    def _refuse_null_keys(self, engine: Engine) -> None:
        """Such rows are greater than none, so that pages would pass over them in silence."""
        key: ColumnClause[Any] = column(self.settings.key)
        statement: Select[Any] = select(key).select_from(self._from()).where(key.is_(None)).limit(1)
        with engine.connect() as connection:
            if connection.execute(statement).first() is not None:
                raise SourceError(f"{self.name}: {self.settings.key} is NULL in some rows")

    def _from(self) -> FromClause | TextClause:
        if self.settings.table is not None:
            schema, _, name = self.settings.table.rpartition(".")
            return table(name, schema=schema or None)
        query = (self.settings.query or "").rstrip("; \t\r\n")
        literal = BIND_PARAMETER.sub(r"\\:\1", query)
        # On a line of its own, as the query may end with a comment.
        return text(f"({literal}\n) manylora_rows")

    def _place(self, key: Any) -> Any:
        """A key as JSON."""
        if isinstance(key, int | float | str):
            return key
        for name, kind in KEY_TYPES.items():
            # A datetime is a date too, so the type must be the very one.
            if type(key) is kind:
                return {name: str(key)}
        raise SourceError(
            f"{self.name}: {self.settings.key} is {type(key).__name__}; a key must be a number, "
            "text, a date, a time or a UUID"
        )


def _bound(key: Any) -> BindParameter[Any]:
    """A key to compare with, untyped where Python's type may not be that of the database.

    Text may have been an enum or money, which compare with no text. And what is greater than a
    truth value is nothing that SQLAlchemy would ask.
    """
    return bindparam(None, key, NullType() if isinstance(key, str | bool) else None, unique=True)


def _streamed(connection: Connection, statement: Any) -> Sequence[RowMapping]:
    options = {"stream_results": True, "yield_per": 1000}
    return connection.execute(statement, execution_options=options).mappings().all()


def _key(place: Any) -> Any:
    if not isinstance(place, dict):
        return place
    ((name, value),) = cast("dict[str, str]", place).items()
    kind = KEY_TYPES[name]
    return kind.fromisoformat(value) if hasattr(kind, "fromisoformat") else kind(value)


def _connect(settings: SqlSource) -> Engine:
    """The database, with what the environment adds to its URL."""
    if settings.url_env is not None:
        url = _variable(settings.url_env)
    else:
        url = ENVIRONMENT_VARIABLE.sub(lambda name: _variable(name[1]), settings.url or "")
    try:
        # Each page has a connection of its own: one kept until the next would be lost with a server
        # that starts again, or to a time limit for idle ones.
        engine = create_engine(url, poolclass=NullPool)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        # Never the error's own text: it may hold the URL, and the URL a password.
        driver = getattr(error, "name", None)
        hint = f": the driver {driver} is not installed" if driver else " such as sqlite:///rows.db"
        raise SourceError(f"the database URL is not one SQLAlchemy can open{hint}") from error
    file = engine.url.database
    if engine.dialect.name == "sqlite" and file and file != ":memory:":
        if not file.removeprefix("file:").startswith(("/", ":")):
            raise SourceError(
                f"{file} is relative, and a URL from the environment is relative to no recipe: "
                "give the whole path, as sqlite:////data/rows.db does"
            )
        # SQLite's own URI says by `mode` whether a file is made.
        if not file.startswith("file:") and not Path(file).exists():
            # SQLite would make an empty one.
            raise SourceError(f"{file} does not exist")
    return engine


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise SourceError(f"the environment variable {name}, of a database URL, is not set")
    return value


def _is_of_a_value(error: SQLAlchemyError) -> bool:
    """Whether a single value is at fault, and not the database or the way to it."""
    # SQLite's driver has no class of its own for text that is not UTF-8.
    return isinstance(error, DataError) or _why(error).startswith("Could not decode")


def _why(error: SQLAlchemyError) -> str:
    """What the driver says, without the statement and its parameters."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
