"""deploy/approve REF --stage STAGE: a person says that a version may enter a stage."""

from deploy.stages.errors import ApprovalError
from deploy.stages.settings import Stage
from deploy.stages.work import Outcome, Work, audit
from manylora_registry import Deployment, Registry, Version

GIVEN, WITHDRAWN = "given", "withdrawn"


def approve(stage: Stage, reference: str, work: Work, *, withdraw: bool) -> Outcome:
    """Keeps an approval, or its withdrawal, once for each person.

    Raises:
        ApprovalError: the stage lets others approve.
        RegistryError: there is no such version, or it was withdrawn.
    """
    allowed = stage.gates.approval.by
    if allowed and work.actor not in allowed:
        raise ApprovalError(
            f"{work.actor} may not approve for {stage.name}; {', '.join(allowed)} may"
        )
    with stage.open_registry() as registry:
        version = registry.resolve(reference)
        what = f"{version.name}@{version.number}"
        given = work.actor in _standing(registry, stage, version)
        verb = "withdraw the approval of" if withdraw else "approve"
        if given == withdraw and work.step(f"{verb} {what} for {stage.name}"):
            outcome = WITHDRAWN if withdraw else GIVEN
            audit(registry, stage, "approve", outcome, work, version=version)
    state = "not approved" if withdraw else "approved"
    verb = "would be" if work.plan and given == withdraw else "is"
    return Outcome(
        f"{what} {verb} {state} for {stage.name} by {work.actor}",
        {
            "stage": stage.name,
            "version": version.number,
            "approved": given if work.plan else not withdraw,
        },
    )


def approvers(registry: Registry, stage: Stage, version: Version, promoter: str) -> list[str]:
    """Who said yes and counts."""
    approval = stage.gates.approval
    return [
        actor
        for actor in _standing(registry, stage, version)
        if not approval.by or actor in approval.by
        if not (approval.of_another and actor == promoter)
    ]


def _standing(registry: Registry, stage: Stage, version: Version) -> dict[str, Deployment]:
    latest: dict[str, Deployment] = {}
    for record in registry.deployments(version.name, stage=stage.name):
        if record.action == "rollback":
            # What was known when they approved was not enough.
            latest.clear()
        elif record.action == "approve" and record.digest == version.digest:
            latest[record.actor] = record
    return {actor: record for actor, record in latest.items() if record.outcome == GIVEN}
