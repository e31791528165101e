"""Aliases: moved by compare-and-set, kept in a history that cannot be rewritten, protected.

A protected alias moves only to a version that has passed its gate, or against it with a reason.
Protections are rows that are only added to, so that lifting one leaves a trace too.
"""

import getpass
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from manylora_registry.catalog import current_protections
from manylora_registry.database import Database
from manylora_registry.description import one_line
from manylora_registry.errors import (
    AliasConflictError,
    AliasNotFoundError,
    AliasProtectedError,
    VersionNotFoundError,
)
from manylora_registry.evaluations import why_not_passed
from manylora_registry.history import MOVES, back_to, last_link, link, way
from manylora_registry.reference import AdapterReference
from manylora_registry.rows import (
    adapter_id,
    find_row,
    gone_versions,
    insert,
    now,
    record,
    require_served,
    time,
)
from manylora_registry.schema import alias_moves, aliases, protections, versions
from manylora_registry.version import AliasMove, Protection


@dataclass(frozen=True)
class Reason:
    """Who changes something, and why."""

    actor: str
    why: str
    override: bool = False
    """Whether it is to be done against a protection."""

    @classmethod
    def of(cls, actor: str | None, why: str, *, override: bool = False) -> "Reason":
        """As a history can show it; without an actor it is the user and host of this process."""
        return cls(one_line(actor or "") or this_user(), one_line(why), override)


class Aliases:
    """The aliases of one registry; thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def move(
        self, name: str, alias: str, number: int, reason: Reason, *, expect: int | None
    ) -> AliasMove:
        """Points `alias` at a version, if it is still at generation `expect`.

        Raises:
            AliasConflictError: it is at another generation.
            AliasProtectedError: the version has not passed, or an override has no reason.
            NotFoundError: there is no such version.
            YankedError: the version was withdrawn or deleted.
        """
        with self._database.write() as connection:
            adapter = adapter_id(connection, name)
            version = find_row(connection, AdapterReference(name, str(number)))
            return _move(connection, _Alias(name, adapter, alias), version, reason, expect)

    def before(self, name: str, alias: str) -> tuple[int | None, int]:
        """Where a rollback of `alias` goes, and the alias's present generation.

        None: it was moved back already, and what it points at was not withdrawn.

        Raises:
            AliasNotFoundError: there is no such alias.
            VersionNotFoundError: there is no version to go back to.
        """
        with self._database.read() as connection:
            moved = _moved(connection, name, alias)
            gone = gone_versions(connection, adapter_id(connection, name))
        came, back = way(moved)
        before = back_to(came, back, gone)
        if before is None and (not back or came[-1] in gone):
            raise VersionNotFoundError(
                f"{name}@{alias} pointed at no version before {came[-1]} that can be served"
            )
        return before, len(moved)

    def way(self, name: str, alias: str) -> list[int]:
        """The versions `alias` came by to the present one, which is the last.

        Raises:
            AliasNotFoundError: there is no such alias.
        """
        with self._database.read() as connection:
            came, _ = way(_moved(connection, name, alias))
        return came

    def history(self, name: str) -> list[AliasMove]:
        """Every move of every alias of one adapter, oldest first.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        with self._database.read() as connection:
            moves = MOVES.where(alias_moves.c.adapter_id == adapter_id(connection, name))
            return [
                AliasMove(
                    row.name,
                    row.alias,
                    row.generation,
                    row.version,
                    row.previous,
                    row.actor,
                    row.why,
                    time(row.at),
                    row.override,
                )
                for row in connection.execute(moves)
            ]

    def protect(
        self, name: str, alias: str, reason: Reason, *, suite: str | None, protected: bool
    ) -> None:
        """Protects an alias, or no longer.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            AliasProtectedError: a protection is to be lifted without a reason.
        """
        if not protected and not reason.why:
            raise AliasProtectedError(
                f"the protection of {name}@{alias} is lifted only for a reason: give --why"
            )
        with self._database.write() as connection:
            insert(
                connection,
                protections,
                adapter_id=adapter_id(connection, name),
                alias=alias,
                suite=suite,
                protected=protected,
                actor=reason.actor,
                why=reason.why,
                at=now(),
            )

    def protections(self, name: str) -> list[Protection]:
        """The protections of an adapter's aliases that hold now, by alias.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        with self._database.read() as connection:
            adapter = adapter_id(connection, name)
            rows = connection.execute(
                current_protections()
                .where(protections.c.adapter_id == adapter)
                .order_by(protections.c.alias)
            )
            return [
                Protection(row.alias, row.suite, row.actor, row.why, time(row.at)) for row in rows
            ]


def _moved(connection: Connection, name: str, alias: str) -> Sequence[int]:
    """Where `alias` was moved, oldest first.

    Raises:
        AliasNotFoundError: there is no such alias.
    """
    here = (alias_moves.c.adapter_id == adapter_id(connection, name)) & (
        alias_moves.c.alias == alias
    )
    moved = connection.scalars(
        sa.select(alias_moves.c.version).where(here).order_by(alias_moves.c.generation)
    ).all()
    if not moved:
        raise AliasNotFoundError(f"{name} has no alias {alias!r}")
    return moved


@dataclass(frozen=True)
class _Alias:
    name: str
    adapter: int
    alias: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


def _move(
    connection: Connection, of: _Alias, version: Row[Any], reason: Reason, expect: int | None
) -> AliasMove:
    require_served(
        f"{of.name}@{version.number}",
        yanked=version.yanked_at is not None,
        deleted=version.deleted_at is not None,
    )
    here = (aliases.c.adapter_id == of.adapter) & (aliases.c.alias == of.alias)
    current = connection.execute(
        sa.select(aliases.c.generation, versions.c.number).join_from(aliases, versions).where(here)
    ).first()
    generation = current.generation if current else 0
    previous = current.number if current else None
    if expect is not None and expect != generation:
        raise AliasConflictError(str(of), expect, generation)
    override = _must_override(connection, of, version, reason)
    moved = {"version_id": version.id, "generation": generation + 1}
    if current:
        connection.execute(sa.update(aliases).where(here).values(moved))
    else:
        connection.execute(
            sa.insert(aliases).values(adapter_id=of.adapter, alias=of.alias, **moved)
        )
    at = now()
    move = {
        "alias": of.alias,
        "generation": generation + 1,
        "version": version.number,
        "digest": version.digest,
        "previous": previous,
        "actor": reason.actor,
        "why": reason.why,
        "at": at,
        "override": override,
    }
    chain = link(last_link(connection), {"name": of.name, **move})
    insert(connection, alias_moves, adapter_id=of.adapter, chain=chain, **move)
    record(connection, "alias_moved", of.adapter, version.number, at, of.alias)
    return AliasMove(
        of.name,
        of.alias,
        generation + 1,
        version.number,
        previous,
        reason.actor,
        reason.why,
        time(at),
        override,
    )


def _must_override(connection: Connection, of: _Alias, version: Row[Any], reason: Reason) -> bool:
    """Whether the move goes against a protection and may.

    Raises:
        AliasProtectedError: it may not.
    """
    protection = connection.execute(
        current_protections().where(
            protections.c.adapter_id == of.adapter, protections.c.alias == of.alias
        )
    ).first()
    if protection is None:
        return False
    lacking = why_not_passed(connection, version.id, protection.suite)
    if lacking is None:
        return False
    what = f"{of} is protected, and version {version.number} {lacking}"
    if not reason.override:
        raise AliasProtectedError(
            f"{what}: record a passed gate (`manylora registry gate`), or move it all the same "
            "with --override and a reason"
        )
    if not reason.why:
        raise AliasProtectedError(f"{what}: to override that, say why (--why)")
    return True


def this_user() -> str:
    """User and host of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
