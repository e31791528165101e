"""The hash chain over alias moves: history that cannot be rewritten without being noticed.

Each move carries `sha256(previous chain value + canonical JSON of the move)`, over the whole
registry in the order of the moves. A changed, inserted or removed line breaks the chain behind
it; removed last lines leave aliases at a generation that has no move.
"""

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from manylora_registry.errors import Problem
from manylora_registry.manifest import canonical_json
from manylora_registry.schema import adapters, alias_moves, aliases, versions

ROOT = "sha256:" + "0" * 64
"""What the first move follows."""
_FIELDS = ("name", "alias", "generation", "version", "digest", "previous", "actor", "why", "at")

MOVES = (
    sa.select(alias_moves, adapters.c.name)
    .join_from(alias_moves, adapters)
    .order_by(alias_moves.c.id)
)


def way(moved: Iterable[int]) -> tuple[list[int], bool]:
    """The versions an alias came by to the present one, and whether its last move went back.

    Moving to a version that it meant before undoes everything since.

    Args:
        moved: where it was moved, oldest first.
    """
    came: list[int] = []
    back = False
    for version in moved:
        if came and came[-1] == version:
            continue
        back = version in came
        came = came[: came.index(version) + 1] if back else [*came, version]
    return came, back


def back_to(came: Sequence[int], back: bool, gone: Container[int]) -> int | None:
    """Where a rollback goes: to the version before the present one came, past what is gone.

    Args:
        came: by which versions the alias came to the present one; see `way`.
        back: whether its last move went back.
        gone: versions that were withdrawn or deleted.

    Returns:
        None: there is none, or the alias was moved back already and what it means is not gone.
    """
    if back and came[-1] not in gone:
        return None
    return next((version for version in reversed(came[:-1]) if version not in gone), None)


def last_link(connection: Connection) -> str:
    """The chain value of the last move of all."""
    newest = sa.select(alias_moves.c.chain).order_by(alias_moves.c.id.desc()).limit(1)
    return connection.execute(newest).scalar() or ROOT


def link(previous: str, move: Mapping[Any, str | int | None]) -> str:
    """The chain value of `move`, a value for each column but the ids, after `previous`."""
    told = {field: move[field] for field in _FIELDS}
    if move.get("override"):
        # Only where it is set: moves from before there were protected aliases keep their value.
        told["override"] = True
    content = canonical_json(told)
    return f"sha256:{hashlib.sha256(previous.encode() + content).hexdigest()}"


def check_history(connection: Connection) -> tuple[int, list[Problem]]:
    """Counts the moves and says where the chain, or its agreement with the aliases, breaks."""
    moves = connection.execute(MOVES).mappings().all()
    return len(moves), [*_check_chain(moves), *_check_aliases(connection, moves)]


def _check_chain(moves: Sequence[RowMapping]) -> Iterable[Problem]:
    previous = ROOT
    for move in moves:
        if link(previous, move) != move["chain"]:
            yield Problem(
                f"{move['name']}@{move['alias']}",
                f"history was changed at or before generation {move['generation']}",
            )
        previous = move["chain"]


def _check_aliases(connection: Connection, moves: Sequence[RowMapping]) -> Iterable[Problem]:
    last = {(move["name"], move["alias"]): (move["generation"], move["version"]) for move in moves}
    current = sa.select(
        adapters.c.name, aliases.c.alias, aliases.c.generation, versions.c.number
    ).select_from(
        aliases.join(adapters, adapters.c.id == aliases.c.adapter_id).join(
            versions, versions.c.id == aliases.c.version_id
        )
    )
    for name, alias, generation, number in connection.execute(current):
        if last.pop((name, alias), None) != (generation, number):
            yield Problem(f"{name}@{alias}", "does not point where its history says")
    for name, alias in last:
        yield Problem(f"{name}@{alias}", "has a history but is gone")
