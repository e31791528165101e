"""What the database knows: versions by name, aliases, events. All SQL but the history's is here."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.database import Database
from manylora_registry.errors import (
    AdapterNotFoundError,
    AliasConflictError,
    AliasNotFoundError,
    VersionNotFoundError,
    YankedError,
)
from manylora_registry.history import MOVES, last_link, link
from manylora_registry.manifest import Manifest
from manylora_registry.reference import AdapterReference
from manylora_registry.schema import (
    adapters,
    alias_moves,
    aliases,
    events,
    version_blobs,
    version_labels,
    version_metrics,
    versions,
)
from manylora_registry.version import Adapter, Alias, AliasMove, Event, EventKind, Version

CACHED_VERSIONS = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_of_adapter = (
    sa.select(versions.c.id, versions.c.yanked_at)
    .join_from(adapters, versions)
    .where(adapters.c.name == sa.bindparam("name"))
)
# A reference may hold any number: wider than the column, so that none is out of range.
_BY_NUMBER = _of_adapter.where(versions.c.number == sa.bindparam("number", type_=sa.BigInteger))
_BY_DIGEST = _of_adapter.where(
    # A range of the index instead of LIKE: 'g' follows every hexadecimal digit.
    versions.c.digest >= sa.bindparam("digest", type_=sa.String),
    versions.c.digest < sa.bindparam("digest", type_=sa.String) + "g",
).limit(2)
_BY_ALIAS = (
    sa.select(versions.c.id, versions.c.yanked_at)
    .select_from(
        adapters.join(aliases, aliases.c.adapter_id == adapters.c.id).join(
            versions, versions.c.id == aliases.c.version_id
        )
    )
    .where(adapters.c.name == sa.bindparam("name"), aliases.c.alias == sa.bindparam("alias"))
)
_ADAPTER_ID = sa.select(adapters.c.id).where(adapters.c.name == sa.bindparam("name"))


@dataclass(frozen=True)
class Description:
    """What a publisher says about a version beyond its content."""

    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    lineage: Mapping[str, str]


class Catalog:
    """Versions, aliases and events of one registry; thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[int, Version] = {}
        """Versions read before, as not yanked: all else of a version never changes."""

    def add(self, name: str, digest: str, manifest: Manifest, description: Description) -> Version:
        """Makes a version visible; the commit point of publishing.

        The blobs must be durable. An adapter that has this digest already keeps its version.
        """
        now = _now()
        with self._database.write() as connection:
            adapter = connection.execute(_ADAPTER_ID, {"name": name}).scalar()
            if adapter is None:
                adapter = _insert(connection, adapters, name=name, created_at=now)
            same = sa.select(versions.c.id).where(
                versions.c.adapter_id == adapter, versions.c.digest == digest
            )
            version = connection.execute(same).scalar()
            if version is None:
                last = sa.select(sa.func.max(versions.c.number)).where(
                    versions.c.adapter_id == adapter
                )
                number = (connection.execute(last).scalar() or 0) + 1
                version = _insert(
                    connection,
                    versions,
                    adapter_id=adapter,
                    number=number,
                    digest=digest,
                    base_fingerprint=manifest.base_fingerprint,
                    rank=manifest.rank,
                    size=manifest.size,
                    created_at=now,
                )
                blobs = {digest, *(file.digest for file in manifest.files)}
                _insert_details(connection, version, blobs, description)
                _record(connection, "published", adapter, number, now)
            (added,) = _read_versions(connection, versions.c.id == version)
        return added

    def find(self, reference: AdapterReference) -> Version:
        """The version meant, yanked or not.

        Raises:
            NotFoundError: one of its three kinds, for what is missing.
        """
        with self._database.read() as connection:
            return self._find(connection, reference)

    def adapters(self) -> list[Adapter]:
        """Every adapter, by name."""
        newest = versions.alias()
        is_latest = versions.c.number == (
            sa.select(sa.func.max(newest.c.number))
            .where(newest.c.adapter_id == versions.c.adapter_id)
            .scalar_subquery()
        )
        pointing = (
            sa.select(adapters.c.name, aliases.c.alias, versions.c.number, aliases.c.generation)
            .select_from(
                aliases.join(adapters, adapters.c.id == aliases.c.adapter_id).join(
                    versions, versions.c.id == aliases.c.version_id
                )
            )
            .order_by(aliases.c.alias)
        )
        with self._database.read() as connection:
            latest = _read_versions(connection, is_latest)
            by_name: dict[str, dict[str, Alias]] = {}
            for name, alias, number, generation in connection.execute(pointing):
                by_name.setdefault(name, {})[alias] = Alias(number, generation)
        return [Adapter(each.name, each, by_name.get(each.name, {})) for each in latest]

    def versions(self, name: str) -> list[Version]:
        """Every version of one adapter, from 1 upwards.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        with self._database.read() as connection:
            return _read_versions(connection, versions.c.adapter_id == _adapter(connection, name))

    def move(
        self, name: str, alias: str, selector: str, *, expect: int | None, actor: str, why: str
    ) -> AliasMove:
        """Points `alias` at what `selector` selects, if it is still at generation `expect`.

        Raises:
            AliasConflictError: it is at another generation.
            NotFoundError: there is no such version.
            YankedError: the version was withdrawn.
        """
        now = _now()
        with self._database.write() as connection:
            adapter = _adapter(connection, name)
            version = self._find(connection, AdapterReference(name, selector))
            if version.yanked:
                raise _yanked(version)
            here = (aliases.c.adapter_id == adapter) & (aliases.c.alias == alias)
            current = connection.execute(
                sa.select(aliases.c.generation, versions.c.number)
                .join_from(aliases, versions)
                .where(here)
            ).first()
            generation = current.generation if current else 0
            if expect is not None and expect != generation:
                raise AliasConflictError(f"{name}@{alias}", expect, generation)
            target = (
                sa.select(versions.c.id)
                .where(versions.c.adapter_id == adapter, versions.c.number == version.number)
                .scalar_subquery()
            )
            moved = {"version_id": target, "generation": generation + 1}
            if current:
                connection.execute(sa.update(aliases).where(here).values(moved))
            else:
                connection.execute(
                    sa.insert(aliases).values(adapter_id=adapter, alias=alias, **moved)
                )
            move = {
                "alias": alias,
                "generation": generation + 1,
                "version": version.number,
                "digest": version.digest,
                "previous": current.number if current else None,
                "actor": actor,
                "why": why,
                "at": now,
            }
            chain = link(last_link(connection), {"name": name, **move})
            _insert(connection, alias_moves, adapter_id=adapter, chain=chain, **move)
            _record(connection, "alias_moved", adapter, version.number, now, alias)
        previous = current.number if current else None
        return AliasMove(
            name, alias, generation + 1, version.number, previous, actor, why, _time(now)
        )

    def history(self, name: str) -> list[AliasMove]:
        """Every move of every alias of one adapter, oldest first.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        with self._database.read() as connection:
            moves = MOVES.where(alias_moves.c.adapter_id == _adapter(connection, name))
            return [
                AliasMove(
                    row.name,
                    row.alias,
                    row.generation,
                    row.version,
                    row.previous,
                    row.actor,
                    row.why,
                    _time(row.at),
                )
                for row in connection.execute(moves)
            ]

    def yank(self, reference: AdapterReference) -> Version:
        """Withdraws a version; one that was withdrawn before stays so.

        Raises:
            NotFoundError: there is no such version.
        """
        now = _now()
        with self._database.write() as connection:
            version = self._find(connection, reference)
            if not version.yanked:
                adapter = _adapter(connection, version.name)
                connection.execute(
                    sa.update(versions)
                    .where(versions.c.adapter_id == adapter, versions.c.number == version.number)
                    .values(yanked_at=now)
                )
                _record(connection, "yanked", adapter, version.number, now)
        return dataclasses.replace(version, yanked=True)

    def events(self, since: int, limit: int) -> list[Event]:
        """At most `limit` events after the one numbered `since`, in order."""
        later = (
            sa.select(events, adapters.c.name)
            .join_from(events, adapters)
            .where(events.c.sequence > since)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                Event(row.sequence, row.kind, row.name, row.alias, row.version, _time(row.at))
                for row in connection.execute(later)
            ]

    def _find(self, connection: Connection, reference: AdapterReference) -> Version:
        name = reference.name
        if number := reference.number:
            found = connection.execute(_BY_NUMBER, {"name": name, "number": number}).all()
        elif digest := reference.digest:
            found = connection.execute(_BY_DIGEST, {"name": name, "digest": digest}).all()
        else:
            found = connection.execute(_BY_ALIAS, {"name": name, "alias": reference.alias}).all()
        if len(found) != 1:
            _adapter(connection, name)
            raise _missing(reference, ambiguous=bool(found))
        version_id, yanked_at = found[0]
        version = self._seen.get(version_id)
        if version is None:
            (version,) = _read_versions(connection, versions.c.id == version_id)
            if len(self._seen) >= CACHED_VERSIONS:
                self._seen.clear()
            self._seen[version_id] = dataclasses.replace(version, yanked=False)
        return version if yanked_at is None else dataclasses.replace(version, yanked=True)


def require_served(version: Version) -> None:
    """Raises YankedError if the version was withdrawn."""
    if version.yanked:
        raise _yanked(version)


def _yanked(version: Version) -> YankedError:
    return YankedError(
        f"{version.name}@{version.number} was withdrawn; choose another version "
        f"(`manylora registry show {version.name}@{version.number}`)"
    )


def _missing(
    reference: AdapterReference, *, ambiguous: bool
) -> AliasNotFoundError | VersionNotFoundError:
    if reference.alias:
        return AliasNotFoundError(f"{reference.name} has no alias {reference.alias!r}")
    if ambiguous:
        return VersionNotFoundError(f"{reference} begins more than one digest: give more digits")
    return VersionNotFoundError(f"{reference.name} has no version {reference.selector}")


def _adapter(connection: Connection, name: str) -> int:
    found: int | None = connection.execute(_ADAPTER_ID, {"name": name}).scalar()
    if found is None:
        raise AdapterNotFoundError(f"there is no adapter {name[:80]!r} in the registry")
    return found


def _read_versions(connection: Connection, where: sa.ColumnElement[bool]) -> list[Version]:
    """The versions that fulfil a condition on the table of versions, by name and number."""
    rows = connection.execute(
        sa.select(versions, adapters.c.name)
        .join_from(versions, adapters)
        .where(where)
        .order_by(adapters.c.name, versions.c.number)
    ).all()
    metrics: dict[int, dict[str, float]] = {}
    for row in connection.execute(
        sa.select(version_metrics).join_from(version_metrics, versions).where(where)
    ):
        metrics.setdefault(row.version_id, {})[row.key] = row.value
    labels: dict[tuple[int, str], dict[str, str]] = {}
    for row in connection.execute(
        sa.select(version_labels).join_from(version_labels, versions).where(where)
    ):
        labels.setdefault((row.version_id, row.kind), {})[row.key] = row.value
    return [
        Version(
            name=row.name,
            number=row.number,
            digest=row.digest,
            base_fingerprint=row.base_fingerprint,
            rank=row.rank,
            size=row.size,
            created_at=_time(row.created_at),
            metrics=metrics.get(row.id, {}),
            tags=labels.get((row.id, "tag"), {}),
            lineage=labels.get((row.id, "lineage"), {}),
            yanked=row.yanked_at is not None,
        )
        for row in rows
    ]


def _insert(connection: Connection, table: sa.Table, **values: object) -> int:
    """Adds a row and returns its id."""
    (identity,) = table.primary_key
    return connection.execute(sa.insert(table).values(values).returning(identity)).scalar_one()


def _insert_details(
    connection: Connection, version: int, blobs: set[str], description: Description
) -> None:
    connection.execute(
        sa.insert(version_blobs),
        [{"version_id": version, "digest": digest} for digest in sorted(blobs)],
    )
    metrics = [
        {"version_id": version, "key": key, "value": value}
        for key, value in description.metrics.items()
    ]
    labels = [
        {"version_id": version, "kind": kind, "key": key, "value": value}
        for kind, pairs in (("tag", description.tags), ("lineage", description.lineage))
        for key, value in pairs.items()
    ]
    _insert_all(connection, version_metrics, metrics)
    _insert_all(connection, version_labels, labels)


def _insert_all(
    connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, object]]
) -> None:
    if rows:
        connection.execute(sa.insert(table), rows)


def _record(
    connection: Connection,
    kind: EventKind,
    adapter: int,
    version: int,
    at: int,
    alias: str | None = None,
) -> None:
    _insert(connection, events, kind=kind, adapter_id=adapter, alias=alias, version=version, at=at)


def _now() -> int:
    return (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
