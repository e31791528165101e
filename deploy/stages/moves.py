"""The moves of a stage's alias, and the record of those that nobody has told of."""

from deploy.stages.journal import Entry, Promotion
from deploy.stages.settings import Stage
from deploy.stages.work import Work, audit
from manylora_registry import AliasMove, Registry


def moves_of(registry: Registry, stage: Stage, name: str) -> list[AliasMove]:
    """Every move of the alias that a stage serves of an adapter, oldest first."""
    return [move for move in registry.history(name) if move.alias == stage.alias]


def led_to(begun: Entry, move: AliasMove) -> bool:
    """Whether a promotion or a rollback has come to its move, and `move` is that."""
    target = begun.version if isinstance(begun, Promotion) else begun.target
    return (move.generation, move.version) == (begun.generation + 1, target)


def has_moved(registry: Registry, stage: Stage, name: str, begun: Entry) -> bool:
    """Whether a promotion or a rollback has come to its move."""
    return any(led_to(begun, move) for move in moves_of(registry, stage, name))


def tell_moves(
    registry: Registry, stage: Stage, name: str, work: Work, begun: Entry | None
) -> None:
    """Keeps the newest moves that have no record: of what was `begun` and killed, and by hand."""
    kept = registry.deployments(name, stage=stage.name)
    told = max((int(record.detail.get("generation", 0)) for record in kept), default=0)
    for move in moves_of(registry, stage, name):
        if move.generation <= told:
            continue
        action, step, key = "alias", "", f"alias/{stage.name}/{name}/{move.generation}"
        if begun is not None and led_to(begun, move):
            promoted = isinstance(begun, Promotion)
            action, step, key = (
                *(("promote", "") if promoted else ("rollback", "alias")),
                begun.done,
            )
        audit(
            registry,
            stage,
            action,
            "done",
            Work(work.say, actor=move.actor, why=move.why),
            version=registry.find(f"{name}@{move.version}"),
            step=step,
            detail={"generation": move.generation, "before": move.previous},
            key=key,
        )
