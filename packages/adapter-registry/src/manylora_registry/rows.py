"""Reading and writing rows, within a transaction of the caller's."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from manylora_registry.errors import (
    AdapterNotFoundError,
    AliasNotFoundError,
    DeletedError,
    VersionNotFoundError,
    YankedError,
)
from manylora_registry.reference import AdapterReference
from manylora_registry.schema import (
    adapters,
    aliases,
    events,
    version_labels,
    version_metrics,
    version_parents,
    versions,
)
from manylora_registry.version import EventKind, Version

ROWS_AT_ONCE = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_of_adapter = (
    sa.select(versions).join_from(adapters, versions).where(adapters.c.name == sa.bindparam("name"))
)
# A reference may hold any number: wider than the column, so that none is out of range.
_BY_NUMBER = _of_adapter.where(versions.c.number == sa.bindparam("number", type_=sa.BigInteger))
_BY_DIGEST = _of_adapter.where(
    # A range of the index instead of LIKE: 'g' follows every hexadecimal digit.
    versions.c.digest >= sa.bindparam("digest", type_=sa.String),
    versions.c.digest < sa.bindparam("digest", type_=sa.String) + "g",
).limit(2)
_BY_ALIAS = (
    sa.select(versions)
    .select_from(
        adapters.join(aliases, aliases.c.adapter_id == adapters.c.id).join(
            versions, versions.c.id == aliases.c.version_id
        )
    )
    .where(adapters.c.name == sa.bindparam("name"), aliases.c.alias == sa.bindparam("alias"))
)
_ADAPTER_ID = sa.select(adapters.c.id).where(adapters.c.name == sa.bindparam("name"))


def now() -> int:
    """Microseconds since 1970 UTC, of this process."""
    return microseconds(datetime.now(UTC))


def microseconds(at: datetime) -> int:
    """A moment as rows hold it."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def time(microseconds: int) -> datetime:
    """The moment that a row holds as microseconds."""
    return _EPOCH + timedelta(microseconds=microseconds)


def find_row(connection: Connection, reference: AdapterReference) -> Row[Any]:
    """The row of the version meant, whether it is served or not.

    Raises:
        NotFoundError: one of its three kinds, for what is missing.
    """
    name = reference.name
    if number := reference.number:
        found = connection.execute(_BY_NUMBER, {"name": name, "number": number}).all()
    elif digest := reference.digest:
        found = connection.execute(_BY_DIGEST, {"name": name, "digest": digest}).all()
    else:
        found = connection.execute(_BY_ALIAS, {"name": name, "alias": reference.alias}).all()
    if len(found) != 1:
        adapter_id(connection, name)
        raise _missing(reference, ambiguous=bool(found))
    return found[0]


def adapter_id(connection: Connection, name: str) -> int:
    """The adapter of that name.

    Raises:
        AdapterNotFoundError: there is none.
    """
    found: int | None = connection.execute(_ADAPTER_ID, {"name": name}).scalar()
    if found is None:
        raise AdapterNotFoundError(f"there is no adapter {name[:80]!r} in the registry")
    return found


def gone_versions(connection: Connection, adapter: int) -> set[int]:
    """The numbers of an adapter's versions that were withdrawn or deleted."""
    gone = versions.c.yanked_at.is_not(None) | versions.c.deleted_at.is_not(None)
    numbers = sa.select(versions.c.number).where(versions.c.adapter_id == adapter, gone)
    return set(connection.scalars(numbers))


def require_served(what: str, *, yanked: bool, deleted: bool) -> None:
    """Raises YankedError or DeletedError if the version `what` was withdrawn or deleted."""
    if deleted:
        raise DeletedError(
            f"{what} was deleted; choose another version, or publish the same files again"
        )
    if yanked:
        raise YankedError(
            f"{what} was withdrawn; choose another version (`manylora registry show {what}`)"
        )


def read_versions(connection: Connection, ids: Sequence[int]) -> list[Version]:
    """The versions with these ids, in this order."""
    found: dict[int, Version] = {}
    for start in range(0, len(ids), ROWS_AT_ONCE):
        found.update(_read(connection, ids[start : start + ROWS_AT_ONCE]))
    return [found[each] for each in ids]


def _read(connection: Connection, ids: Sequence[int]) -> dict[int, Version]:
    metrics: dict[int, dict[str, float]] = {}
    for row in connection.execute(
        sa.select(version_metrics).where(version_metrics.c.version_id.in_(ids))
    ):
        metrics.setdefault(row.version_id, {})[row.key] = row.value
    labels: dict[tuple[int, str], dict[str, str]] = {}
    for row in connection.execute(
        sa.select(version_labels).where(version_labels.c.version_id.in_(ids))
    ):
        labels.setdefault((row.version_id, row.kind), {})[row.key] = row.value
    parents = {
        row.version_id: f"{row.name}@{row.number}"
        for row in connection.execute(
            sa.select(version_parents.c.version_id, adapters.c.name, versions.c.number)
            .select_from(
                version_parents.join(versions, versions.c.id == version_parents.c.parent_id).join(
                    adapters
                )
            )
            .where(version_parents.c.version_id.in_(ids))
        )
    }
    rows = connection.execute(
        sa.select(versions, adapters.c.name)
        .join_from(versions, adapters)
        .where(versions.c.id.in_(ids))
    )
    return {
        row.id: Version(
            name=row.name,
            number=row.number,
            digest=row.digest,
            base_fingerprint=row.base_fingerprint,
            rank=row.rank,
            size=row.size,
            created_at=time(row.created_at),
            metrics=metrics.get(row.id, {}),
            tags=labels.get((row.id, "tag"), {}),
            lineage=labels.get((row.id, "lineage"), {}),
            yanked=row.yanked_at is not None,
            parent=parents.get(row.id),
            deleted=row.deleted_at is not None,
            collected=row.collected_at is not None,
        )
        for row in rows
    }


def change_version(connection: Connection, version: int, **values: object) -> None:
    """Changes columns of a version; whoever remembers it notices by the revision."""
    connection.execute(
        sa.update(versions)
        .where(versions.c.id == version)
        .values(revision=versions.c.revision + 1, **values)
    )


def insert(connection: Connection, table: sa.Table, **values: object) -> int:
    """Adds a row and returns its id."""
    (identity,) = table.primary_key
    return connection.execute(sa.insert(table).values(values).returning(identity)).scalar_one()


def insert_all(
    connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, object]]
) -> None:
    """Adds rows, perhaps none."""
    if rows:
        connection.execute(sa.insert(table), rows)


def record(
    connection: Connection,
    kind: EventKind,
    adapter: int,
    version: int,
    at: int,
    alias: str | None = None,
) -> None:
    """Adds an event."""
    insert(connection, events, kind=kind, adapter_id=adapter, alias=alias, version=version, at=at)


def _missing(
    reference: AdapterReference, *, ambiguous: bool
) -> AliasNotFoundError | VersionNotFoundError:
    if reference.alias:
        return AliasNotFoundError(
            f"{reference.name} has no alias {reference.alias!r}: name a version, say "
            f"{reference.name}@1, or point the alias at one by `manylora registry alias "
            f"{reference.name} {reference.alias} 1`"
        )
    if ambiguous:
        return VersionNotFoundError(f"{reference} begins more than one digest: give more digits")
    return VersionNotFoundError(f"{reference.name} has no version {reference.selector}")
