"""What was done to stages, by whom, why and what came of it; kept for ever.

Each record carries `sha256(previous chain value + canonical JSON of the record)`, over the whole
registry in the order of the records, so that none can be changed, inserted or taken out of the
middle without being noticed.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row, RowMapping

from manylora_registry.database import Database
from manylora_registry.description import one_line
from manylora_registry.errors import DescriptionError, InvalidNameError, Problem
from manylora_registry.history import ROOT
from manylora_registry.manifest import canonical_json
from manylora_registry.reference import is_name
from manylora_registry.rows import adapter_id, insert, now, time
from manylora_registry.schema import adapters, deployments
from manylora_registry.version import Deployment, Version

DETAIL_BYTES = 1 << 16
KEY_CHARACTERS = 128
_TOLD = ("key", "stage", "action", "step", "outcome", "name", "version", "digest")
_FIELDS = (*_TOLD, "actor", "why", "detail", "at")

_RECORDS = (
    sa.select(deployments, adapters.c.name)
    .join_from(deployments, adapters, isouter=True)
    .order_by(deployments.c.id)
)


class Deployments:
    """The deployment records of one registry; only ever added to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        stage: str,
        action: str,
        outcome: str,
        *,
        step: str,
        version: Version | None,
        actor: str,
        why: str,
        detail: Mapping[str, Any],
        key: str | None,
    ) -> Deployment:
        """Keeps a record; one whose `key` is there already is returned as it is.

        Raises:
            InvalidNameError: a stage, an action or an outcome cannot be called that.
            AdapterNotFoundError: the version's adapter is not there.
            DescriptionError: the detail is not JSON or more than 64 KiB of it, or the key too long.
        """
        for what, word in (("stage", stage), ("action", action), ("outcome", outcome)):
            if not is_name(word):
                raise InvalidNameError(f"{word[:80]!r} cannot name the {what} of a deployment")
        content = _as_json(detail)
        key = key or uuid.uuid4().hex
        if len(key) > KEY_CHARACTERS:
            raise DescriptionError(stage, [Problem("key", "is too long")])
        with self._database.write() as connection:
            there = _RECORDS.where(deployments.c.key == key)
            if (row := connection.execute(there).first()) is not None:
                return _deployment(row)
            values = {
                "key": key,
                "stage": stage,
                "action": action,
                "step": one_line(step),
                "outcome": outcome,
                "version": None if version is None else version.number,
                "digest": None if version is None else version.digest,
                "actor": actor,
                "why": one_line(why),
                "detail": content,
                "at": now(),
            }
            name = None if version is None else version.name
            owner = None if version is None else adapter_id(connection, version.name)
            last = sa.select(deployments.c.chain).order_by(deployments.c.id.desc()).limit(1)
            chain = _link(connection.execute(last).scalar() or ROOT, {**values, "name": name})
            insert(connection, deployments, adapter_id=owner, chain=chain, **values)
            return _deployment(connection.execute(there).one())

    def all(self, name: str | None, stage: str | None, limit: int | None) -> list[Deployment]:
        """The newest `limit` records of an adapter, of a stage, or of both; oldest first.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        wanted = _RECORDS.order_by(None).order_by(deployments.c.id.desc()).limit(limit)
        with self._database.read() as connection:
            if name is not None:
                wanted = wanted.where(deployments.c.adapter_id == adapter_id(connection, name))
            if stage is not None:
                wanted = wanted.where(deployments.c.stage == stage)
            return [_deployment(row) for row in reversed(connection.execute(wanted).all())]


def check_deployments(connection: Connection) -> Iterable[Problem]:
    """Says where the chain of records breaks."""
    previous = ROOT
    for record in connection.execute(_RECORDS).mappings():
        if _link(previous, record) != record["chain"]:
            yield Problem(
                f"deployments of {record['stage']}",
                f"the record {record['key']} or one before it was changed",
            )
        previous = record["chain"]


def _link(previous: str, record: Mapping[str, Any] | RowMapping) -> str:
    content = canonical_json({field: record[field] for field in _FIELDS})
    return f"sha256:{hashlib.sha256(previous.encode() + content).hexdigest()}"


def _deployment(row: Row[Any]) -> Deployment:
    told = {field: getattr(row, field) for field in _TOLD}
    return Deployment(
        **told, actor=row.actor, why=row.why, detail=json.loads(row.detail), at=time(row.at)
    )


def _as_json(detail: Mapping[str, Any]) -> str:
    try:
        content = json.dumps(dict(detail), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DescriptionError(
            "a deployment", [Problem("detail", f"is not JSON: {error}")]
        ) from error
    if len(content) > DETAIL_BYTES:
        raise DescriptionError(
            "a deployment", [Problem("detail", f"is larger than {DETAIL_BYTES} bytes")]
        )
    return content
