"""deploy/candidate REF: moves a stage's alias to a version, after the cheap checks."""

from deploy.stages.checks import servable
from deploy.stages.errors import SwapError
from deploy.stages.hosting import Hosting
from deploy.stages.journal import Journal
from deploy.stages.moves import moves_of, tell_moves
from deploy.stages.operator import Operator
from deploy.stages.settings import Stage
from deploy.stages.work import Outcome, Work, audit
from manylora_registry import Registry, Version


def candidate(stage: Stage, reference: str, work: Work) -> Outcome:
    """Has `stage` serve what `reference` means; nothing happens where it does already.

    Raises:
        CheckError: the version may not enter the stage.
        RegistryError: it is not there, or somebody else moved the alias meanwhile.
        SwapError: the gateway cannot serve it, and goes on with the one before.
    """
    with stage.open_registry() as registry:
        version = servable(registry, stage, reference)
        what = f"{version.name}@{version.number}"
        alias = registry.aliases(version.name).get(stage.alias)
        moved = alias is None or alias.version != version.number
        found = Hosting(stage).find()
        running = found if found is not None and found.ready else None
        if running is not None:
            # Asked before anything moves: it may not know who asks.
            with Operator(running, stage.token) as operator:
                operator.listings()
        if moved:
            generation = 0 if alias is None else alias.generation
            before = "nothing" if alias is None else f"version {alias.version}"
            if work.step(f"move {version.name}@{stage.alias} from {before} to {version.number}"):
                if alias is not None:
                    begun = Journal(stage, version.name).read()
                    tell_moves(registry, stage, version.name, work, begun)
                registry.set_alias(
                    version.name,
                    stage.alias,
                    version.number,
                    expect=generation,
                    actor=work.actor,
                    why=work.why,
                )
        if running is not None and work.step(
            f"wait until the gateway of {stage.name} serves {what}"
        ):
            with Operator(running, stage.token) as operator:
                try:
                    operator.await_serving(version, stage.alias, stage.config.start_timeout_s)
                except SwapError as error:
                    _record(registry, stage, version, "failed", work, str(error))
                    raise
        if not work.plan:
            _record(registry, stage, version, "done", work)
        state = "will serve, once it is up," if running is None else "serves"
        verb = "would move to" if work.plan and moved else state
        return Outcome(
            f"{stage.name} {verb} {what}",
            {
                "stage": stage.name,
                "version": version.number,
                "moved": moved,
                "served": bool(running),
            },
        )


def _record(
    registry: Registry, stage: Stage, version: Version, outcome: str, work: Work, error: str = ""
) -> None:
    """Keeps a move once, by the generation it led to, whoever sees to it that it is kept."""
    move = moves_of(registry, stage, version.name)[-1]
    by = Work(work.say, actor=move.actor, why=move.why)
    key = f"candidate/{stage.name}/{version.name}/{move.generation}/{outcome}"
    detail = {"generation": move.generation, "before": move.previous, "error": error}
    audit(registry, stage, "candidate", outcome, by, version=version, detail=detail, key=key)
