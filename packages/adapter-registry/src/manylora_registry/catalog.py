"""What the database knows of versions: their numbers, descriptions, states and events."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from manylora_registry.database import Database
from manylora_registry.description import check_description
from manylora_registry.errors import DescriptionError, VersionInUseError
from manylora_registry.history import back_to, way
from manylora_registry.leases import end_upload
from manylora_registry.manifest import Manifest
from manylora_registry.reference import AdapterReference
from manylora_registry.rows import (
    adapter_id,
    change_version,
    find_row,
    gone_versions,
    insert,
    insert_all,
    now,
    read_versions,
    record,
    time,
)
from manylora_registry.schema import (
    adapters,
    alias_moves,
    aliases,
    events,
    protections,
    version_blobs,
    version_labels,
    version_metrics,
    version_parents,
    versions,
)
from manylora_registry.version import Adapter, Alias, Event, Version

CACHED_VERSIONS = 4096


@dataclass(frozen=True)
class Description:
    """What a publisher says about a version beyond its content."""

    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    lineage: Mapping[str, str]
    parent: AdapterReference | None = None


class Catalog:
    """Versions and events of one registry; thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[int, tuple[Row[Any], Version]] = {}
        """Versions read before, with the rows they had: `revision` in them counts their changes.
        In a database that was restored the same number may count others."""

    def add(
        self, name: str, digest: str, manifest: Manifest, description: Description, lease: str
    ) -> Version:
        """Makes a version visible and ends its upload lease; the commit point of publishing.

        The blobs must be durable. An adapter that has this digest already keeps its version, and
        one that was deleted is restored.

        Raises:
            LeaseExpiredError: the upload's lease ran out and was collected.
            NotFoundError: there is no such parent.
        """
        at = now()
        with self._database.write() as connection:
            end_upload(connection, lease)
            adapter = connection.scalar(sa.select(adapters.c.id).where(adapters.c.name == name))
            if adapter is None:
                adapter = insert(connection, adapters, name=name, created_at=at)
            known = connection.execute(
                sa.select(versions).where(
                    versions.c.adapter_id == adapter, versions.c.digest == digest
                )
            ).first()
            blobs = {digest, *(file.digest for file in manifest.files)}
            if known is None:
                version = self._insert(connection, adapter, digest, manifest, description, at)
                _insert_blobs(connection, version, blobs)
            else:
                version = known.id
                if known.deleted_at is not None:
                    _restore(connection, known, blobs, at)
            (added,) = read_versions(connection, [version])
        return added

    def find(self, reference: AdapterReference) -> Version:
        """The version meant, served or not.

        Raises:
            NotFoundError: one of its three kinds, for what is missing.
        """
        with self._database.read() as connection:
            row = find_row(connection, reference)
            before, version = self._seen.get(row.id, (None, None))
            if version is None or before != row:
                (version,) = read_versions(connection, [row.id])
                if len(self._seen) >= CACHED_VERSIONS:
                    self._seen.clear()
                self._seen[row.id] = (row, version)
            return version

    def adapters(self, limit: int | None, after: str | None) -> list[Adapter]:
        """Adapters by name, at most `limit`, those behind the name `after`."""
        newest = versions.alias()
        latest = (
            sa.select(sa.func.max(newest.c.number))
            .where(newest.c.adapter_id == adapters.c.id, newest.c.deleted_at.is_(None))
            .scalar_subquery()
        )
        page = (
            sa.select(adapters.c.id, versions.c.id.label("latest"))
            .join_from(adapters, versions)
            .where(versions.c.number == latest, adapters.c.name > (after or ""))
            .order_by(adapters.c.name)
            .limit(limit)
        )
        with self._database.read() as connection:
            found = connection.execute(page).all()
            ids = [row.id for row in found]
            pointing: dict[int, list[Any]] = {}
            for row in _pointing(connection, ids if limit is not None else None):
                pointing.setdefault(row.adapter_id, []).append(row)
            targets = [row.target for rows in pointing.values() for row in rows]
            wanted = list({*[row.latest for row in found], *targets})
            read = dict(zip(wanted, read_versions(connection, wanted), strict=True))
        return [
            Adapter(
                read[row.latest].name,
                read[row.latest],
                {at.alias: _alias(at) for at in pointing.get(row.id, ())},
                {at.alias: read[at.target] for at in pointing.get(row.id, ())},
            )
            for row in found
        ]

    def aliases(self, name: str) -> Mapping[str, Alias]:
        """The aliases of one adapter.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        with self._database.read() as connection:
            adapter = adapter_id(connection, name)
            return {row.alias: _alias(row) for row in _pointing(connection, [adapter])}

    def versions(self, name: str) -> list[Version]:
        """Every version of one adapter, from 1 upwards, deleted ones too.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        with self._database.read() as connection:
            ids = (
                sa.select(versions.c.id)
                .where(versions.c.adapter_id == adapter_id(connection, name))
                .order_by(versions.c.number)
            )
            return read_versions(connection, connection.scalars(ids).all())

    def describe(
        self,
        reference: AdapterReference,
        tags: Mapping[str, str | None],
        metrics: Mapping[str, float | None],
    ) -> Version:
        """Sets tags and metrics of a version, or removes those that are None.

        Raises:
            NotFoundError: there is no such version.
            DescriptionError: a key or a value cannot be kept.
        """
        given = {key: value for key, value in metrics.items() if value is not None}
        said = {key: value for key, value in tags.items() if value is not None}
        if problems := list(check_description(given, said, {})):
            raise DescriptionError(str(reference), problems)
        at = now()
        with self._database.write() as connection:
            row = find_row(connection, reference)
            labelled = (version_labels.c.version_id == row.id) & (version_labels.c.kind == "tag")
            for table, of_version, changed in (
                (version_labels, labelled, tags),
                (version_metrics, version_metrics.c.version_id == row.id, metrics),
            ):
                connection.execute(sa.delete(table).where(of_version, table.c.key.in_([*changed])))
            _insert_labels(connection, row.id, "tag", said)
            _insert_metrics(connection, row.id, given)
            (version,) = read_versions(connection, [row.id])
            if problems := list(check_description(version.metrics, version.tags, {})):
                raise DescriptionError(str(reference), problems)
            change_version(connection, row.id)
            record(connection, "described", row.adapter_id, row.number, at)
        return version

    def yank(self, reference: AdapterReference) -> Version:
        """Withdraws a version; one that was withdrawn before stays so.

        Raises:
            NotFoundError: there is no such version.
        """
        at = now()
        with self._database.write() as connection:
            row = find_row(connection, reference)
            if row.yanked_at is None:
                change_version(connection, row.id, yanked_at=at)
                record(connection, "yanked", row.adapter_id, row.number, at)
            (version,) = read_versions(connection, [row.id])
        return version

    def delete(self, reference: AdapterReference) -> Version:
        """Marks a version for garbage collection; from now on it is not served.

        Raises:
            NotFoundError: there is no such version.
            VersionInUseError: an alias points at it, or a rollback of one would go to it and it
                was not yanked.
        """
        with self._database.write() as connection:
            row = find_row(connection, reference)
            pointing = connection.scalars(
                sa.select(aliases.c.alias).where(aliases.c.version_id == row.id)
            ).all()
            if pointing:
                raise VersionInUseError(
                    f"{reference.name}@{row.number} is what {', '.join(pointing)} points at: move "
                    "the alias first (`manylora registry alias`)"
                )
            going_back = _going_back_to(connection, row)
            if going_back:
                raise VersionInUseError(
                    f"{reference.name}@{row.number} is where a rollback of {', '.join(going_back)} "
                    "goes: withdraw it first, if nobody may go back (`manylora registry yank`)"
                )
            if row.deleted_at is None:
                at = self._database.clock(connection)
                change_version(connection, row.id, deleted_at=at)
                record(connection, "deleted", row.adapter_id, row.number, at)
            (version,) = read_versions(connection, [row.id])
        return version

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
                Event(row.sequence, row.kind, row.name, row.alias, row.version, time(row.at))
                for row in connection.execute(later)
            ]

    def _insert(
        self,
        connection: Connection,
        adapter: int,
        digest: str,
        manifest: Manifest,
        description: Description,
        at: int,
    ) -> int:
        last = sa.select(sa.func.max(versions.c.number)).where(versions.c.adapter_id == adapter)
        number = (connection.scalar(last) or 0) + 1
        version = insert(
            connection,
            versions,
            adapter_id=adapter,
            number=number,
            digest=digest,
            base_fingerprint=manifest.base_fingerprint,
            rank=manifest.rank,
            size=manifest.size,
            created_at=at,
        )
        _insert_metrics(connection, version, description.metrics)
        _insert_labels(connection, version, "tag", description.tags)
        _insert_labels(connection, version, "lineage", description.lineage)
        if description.parent is not None:
            parent = find_row(connection, description.parent).id
            insert_all(connection, version_parents, [{"version_id": version, "parent_id": parent}])
        record(connection, "published", adapter, number, at)
        return version


def current_protections() -> sa.Select[Any]:
    """The newest row of each alias that was ever protected."""
    newest = sa.select(sa.func.max(protections.c.id)).group_by(
        protections.c.adapter_id, protections.c.alias
    )
    return sa.select(protections).where(protections.c.id.in_(newest), protections.c.protected)


def _pointing(connection: Connection, of: list[int] | None) -> Sequence[Any]:
    """The aliases of some adapters, or of all, by name, with the versions they point at."""
    protected = current_protections().subquery()
    pointing = (
        sa.select(
            aliases.c.adapter_id,
            aliases.c.alias,
            versions.c.id.label("target"),
            versions.c.number,
            aliases.c.generation,
            protected.c.id.label("protection"),
        )
        .select_from(
            aliases.join(versions, versions.c.id == aliases.c.version_id).outerjoin(
                protected,
                (protected.c.adapter_id == aliases.c.adapter_id)
                & (protected.c.alias == aliases.c.alias),
            )
        )
        .order_by(aliases.c.alias)
    )
    if of is not None:
        pointing = pointing.where(aliases.c.adapter_id.in_(of))
    return connection.execute(pointing).all()


def _alias(row: Row[Any]) -> Alias:
    return Alias(row.number, row.generation, row.protection is not None)


def _going_back_to(connection: Connection, version: Row[Any]) -> list[str]:
    """The aliases whose rollback would go to a version."""
    moved: dict[str, list[int]] = {}
    moves = sa.select(alias_moves.c.alias, alias_moves.c.version)
    here = alias_moves.c.adapter_id == version.adapter_id
    for move in connection.execute(moves.where(here).order_by(alias_moves.c.id)):
        moved.setdefault(move.alias, []).append(move.version)
    gone = gone_versions(connection, version.adapter_id)
    return sorted(
        alias for alias, numbers in moved.items() if back_to(*way(numbers), gone) == version.number
    )


def _restore(connection: Connection, row: Row[Any], blobs: Iterable[str], at: int) -> None:
    """Takes a version back that was deleted: its bytes have just been published again."""
    if row.collected_at is not None:
        _insert_blobs(connection, row.id, blobs)
    change_version(connection, row.id, deleted_at=None, collected_at=None)
    record(connection, "restored", row.adapter_id, row.number, at)


def _insert_blobs(connection: Connection, version: int, blobs: Iterable[str]) -> None:
    rows = [{"version_id": version, "digest": digest} for digest in sorted(blobs)]
    insert_all(connection, version_blobs, rows)


def _insert_metrics(connection: Connection, version: int, metrics: Mapping[str, float]) -> None:
    rows = [{"version_id": version, "key": key, "value": metrics[key]} for key in metrics]
    insert_all(connection, version_metrics, rows)


def _insert_labels(
    connection: Connection, version: int, kind: str, pairs: Mapping[str, str]
) -> None:
    rows = [
        {"version_id": version, "kind": kind, "key": key, "value": value}
        for key, value in pairs.items()
    ]
    insert_all(connection, version_labels, rows)
