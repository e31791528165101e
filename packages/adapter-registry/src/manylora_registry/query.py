"""Pages of versions: filtered, sorted by an index, continued behind the last one seen.

A page begins where the one before ended (keyset paging): the thousandth costs what the first does,
and what is published meanwhile neither repeats nor hides a version.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa

from manylora_registry.database import Database
from manylora_registry.errors import QueryError
from manylora_registry.rows import read_versions
from manylora_registry.schema import adapters, version_labels, version_metrics, versions
from manylora_registry.version import VersionPage
from manylora_registry.where import parse_where

MOST = 1000
"""Versions in a page."""
ORDERS = "name, created, metric.KEY or tag.KEY, with a '-' before it for descending"


@dataclass(frozen=True)
class _Order:
    """Two columns, of which the second decides between equals, and where they are."""

    text: str
    source: sa.FromClause
    columns: Sequence[sa.ColumnElement[Any]]
    types: tuple[type, type]
    where: sa.ColumnElement[bool]
    descending: bool


def find_versions(
    database: Database, where: str, sort: str, limit: int, after: str | None
) -> VersionPage:
    """One page of the versions that are not deleted; see `Registry.find_versions`.

    Raises:
        QueryError: the filter, the order, the limit or the key cannot be read.
    """
    if not 1 <= limit <= MOST:
        raise QueryError(f"a page has 1 to {MOST} versions, not {limit}")
    for what, text in (("filter", where), ("order", sort)):
        if not _is_comparable(text):
            raise QueryError(f"the {what} holds what is no character")
    order = _order(sort)
    with database.read() as connection:
        condition = parse_where(where, connection.dialect.name)
        first, second = order.columns
        query = (
            sa.select(versions.c.id, first.label("first"), second.label("second"))
            .select_from(order.source)
            .where(order.where, versions.c.deleted_at.is_(None), condition)
            .order_by(*(each.desc() if order.descending else each for each in order.columns))
            .limit(limit + 1)
        )
        if after is not None:
            key = sa.tuple_(*order.columns)
            last = sa.tuple_(*_read_key(after, order))
            query = query.where(key < last if order.descending else key > last)
        found = connection.execute(query).all()
        page = read_versions(connection, [row.id for row in found[:limit]])
    more = found[limit - 1] if len(found) > limit else None
    return VersionPage(tuple(page), None if more is None else _key(order, more.first, more.second))


def _order(sort: str) -> _Order:
    text, descending = sort.removeprefix("-"), sort.startswith("-")
    kind, _, key = text.partition(".")
    of_adapter = versions.join(adapters)
    if text == "name":
        columns = (adapters.c.name, versions.c.number)
        return _Order(sort, of_adapter, columns, (str, int), sa.true(), descending)
    if text == "created":
        columns = (versions.c.created_at, versions.c.id)
        return _Order(sort, of_adapter, columns, (int, int), sa.true(), descending)
    if kind == "metric" and key:
        table, held, which = version_metrics, float, version_metrics.c.key == key
    elif kind == "tag" and key:
        table, held = version_labels, str
        which = (version_labels.c.kind == "tag") & (version_labels.c.key == key)
    else:
        raise QueryError(f"{sort[:80]!r} is no order: give {ORDERS}")
    source = table.join(versions, versions.c.id == table.c.version_id).join(adapters)
    columns = (table.c.value, table.c.version_id)
    return _Order(sort, source, columns, (held, int), which, descending)


def _is_comparable(value: str | float) -> bool:
    """Whether every database can be asked for it: no halves of characters, no NUL, 64 bits."""
    if not isinstance(value, str):
        return abs(value) < 1 << 63
    return "\0" not in value and value.encode(errors="ignore").decode() == value


def _key(order: _Order, *values: Any) -> str:
    content = json.dumps([order.text, *values], separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def _read_key(text: str, order: _Order) -> list[Any]:
    try:
        content: Any = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        content = None
    if isinstance(content, list):
        sort, *values = cast("list[Any]", content) or [None]
        right = sort == order.text and tuple(map(type, values)) == order.types
        if right and all(map(_is_comparable, values)):
            return values
    raise QueryError("the key to go on from is none that was given for this order")
