"""Evaluation records: what suites found about versions, and whether a gate was passed."""

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from manylora_registry.database import Database
from manylora_registry.errors import DescriptionError, InvalidNameError, Problem
from manylora_registry.reference import AdapterReference, is_name
from manylora_registry.rows import find_row, insert, now, record, time
from manylora_registry.schema import evaluations
from manylora_registry.version import Evaluation

RESULT_BYTES = 1 << 16


class Evaluations:
    """The evaluation records of one registry; only ever added to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        reference: AdapterReference,
        suite: str,
        result: Mapping[str, Any],
        *,
        passed: bool,
        actor: str,
    ) -> Evaluation:
        """Keeps what a suite found about a version.

        Raises:
            NotFoundError: there is no such version.
            InvalidNameError: a suite cannot be called that.
            DescriptionError: the result is not JSON, or more than 64 KiB of it.
        """
        check_suite_name(suite)
        content = _as_json(reference, result)
        at = now()
        with self._database.write() as connection:
            row = find_row(connection, reference)
            insert(
                connection,
                evaluations,
                version_id=row.id,
                suite=suite,
                passed=passed,
                result=content,
                actor=actor,
                at=at,
            )
            record(connection, "evaluated", row.adapter_id, row.number, at)
        return Evaluation(suite, passed, json.loads(content), actor, time(at))

    def of(self, reference: AdapterReference) -> list[Evaluation]:
        """Every record of a version, oldest first.

        Raises:
            NotFoundError: there is no such version.
        """
        with self._database.read() as connection:
            rows = connection.execute(
                sa.select(evaluations)
                .where(evaluations.c.version_id == find_row(connection, reference).id)
                .order_by(evaluations.c.id)
            )
            return [
                Evaluation(row.suite, row.passed, json.loads(row.result), row.actor, time(row.at))
                for row in rows
            ]


def why_not_passed(connection: Connection, version: int, suite: str | None) -> str | None:
    """What a version lacks to have passed `suite`, or all there are records of; None: nothing."""
    records = (
        sa.select(evaluations.c.suite, evaluations.c.passed)
        .where(evaluations.c.version_id == version)
        .order_by(evaluations.c.id)
    )
    latest: dict[str, bool] = {row.suite: row.passed for row in connection.execute(records)}
    if suite is not None:
        latest = {suite: latest[suite]} if suite in latest else {}
    if not latest:
        return f"has no record of {suite or 'any gate'}"
    failed = [name for name, passed in latest.items() if not passed]
    return f"failed {', '.join(failed)}" if failed else None


def check_suite_name(suite: str) -> None:
    """Raises InvalidNameError unless a suite may be called `suite`."""
    if not is_name(suite):
        raise InvalidNameError(
            f"{suite[:80]!r} cannot name a suite: use up to 64 of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or digit"
        )


def _as_json(reference: AdapterReference, result: Mapping[str, Any]) -> str:
    try:
        content = json.dumps(dict(result), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        problem = Problem("result", f"is not JSON: {error}")
        raise DescriptionError(str(reference), [problem]) from error
    if len(content) > RESULT_BYTES:
        problem = Problem("result", f"is larger than {RESULT_BYTES} bytes")
        raise DescriptionError(str(reference), [problem])
    return content
