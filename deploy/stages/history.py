"""deploy/history: what was done to stages."""

import heapq
from typing import Any

from deploy.stages.errors import NoStageError
from deploy.stages.settings import load_stage, stage_names
from manylora_cli.output import print_table
from manylora_registry import Deployment

Told = list[tuple[Deployment, dict[str, Any]]]


def records(name: str | None, stage: str | None, limit: int) -> Told:
    """The newest records, oldest first, of one stage's registry or of every stage's.

    Raises:
        NoStageError: there is no stage at all, or not the one named.
    """
    names = stage_names() if stage is None else [stage]
    if not names:
        raise NoStageError("there are no stages: see docs/deployment.md")
    # Stages share a registry, as a rule.
    kept: dict[object, list[Deployment]] = {}
    for one in names:
        loaded = load_stage(one)
        if loaded.registry not in kept:
            with loaded.open_registry() as registry:
                kept[loaded.registry] = registry.deployments(name, stage=stage, limit=limit)
    # By their moments only between registries: one keeps its order whatever clocks said.
    newest = list(heapq.merge(*kept.values(), key=lambda record: record.at))[-limit:]
    return [(record, _json(record)) for record in newest]


def print_history(found: Told) -> None:
    """A table for people and for pipes."""
    print_table(
        ("when", "stage", "what", "step", "outcome", "version", "who", "why"),
        [
            (
                f"{record.at:%Y-%m-%d %H:%M:%S}",
                record.stage,
                record.action,
                record.step,
                record.outcome,
                "" if record.name is None else f"{record.name}@{record.version}",
                record.actor,
                record.why,
            )
            for record, _ in found
        ],
        empty="nothing was done to a stage yet",
    )


def _json(record: Deployment) -> dict[str, Any]:
    return {
        "at": record.at.isoformat(),
        "stage": record.stage,
        "action": record.action,
        "step": record.step,
        "outcome": record.outcome,
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "actor": record.actor,
        "why": record.why,
        "detail": dict(record.detail),
    }
