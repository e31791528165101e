"""deploy/status [STAGE]: what stages serve, what is under way, and whether they are well."""

from dataclasses import asdict
from typing import Any

from deploy.stages.errors import DamagedError
from deploy.stages.hosting import Hosting
from deploy.stages.journal import Journal, Promotion
from deploy.stages.operator import Operator
from deploy.stages.settings import Stage
from manylora_client.errors import ClientError
from manylora_registry.errors import RegistryError


def status(stage: Stage) -> dict[str, Any]:
    """What can be told of a stage; whatever is away is said to be."""
    running = Hosting(stage).find()
    state = "stopped" if running is None else "serving" if running.ready else "starting"
    told: dict[str, Any] = {
        "stage": stage.name,
        "alias": stage.alias,
        "state": state,
        "pid": None if running is None else running.pid,
        "inference": "" if running is None else running.inference,
        "admin": "" if running is None else running.admin,
        "healthy": False,
        "error": "",
        "adapters": [],
    }
    errors: list[str] = []
    try:
        told["adapters"] = _aliases(stage)
    except (RegistryError, DamagedError) as error:
        errors.append(str(error))
    if running is not None and running.ready:
        try:
            with Operator(running, stage.token) as operator:
                told["healthy"] = operator.healthy()
                _add_served(told["adapters"], stage, operator)
        except ClientError as error:
            errors.append(str(error))
            if running.pid is None and not told["healthy"]:
                # Something else runs it; a lock tells of those that run here.
                told["state"] = "not reached"
    told["error"] = "; ".join(errors)
    return told


def _aliases(stage: Stage) -> list[dict[str, Any]]:
    with stage.open_registry() as registry:
        return [
            {
                "name": adapter.name,
                "version": adapter.aliases[stage.alias].version,
                "serving": None,
                "pending_error": "",
                "rollout": [],
                "under_way": _under_way(stage, adapter.name),
            }
            for adapter in registry.adapters()
            if stage.alias in adapter.aliases
        ]


def _under_way(stage: Stage, name: str) -> str:
    journal = Journal(stage, name)
    begun = journal.read()
    if begun is None:
        return ""
    if isinstance(begun, Promotion):
        at = f"at {_step(stage, begun)}" if begun.gates else "at the gates"
        what, verb = f"promotion of version {begun.version} {at}", "promote"
    else:
        what, verb = "rollback", "rollback"
    return what if journal.running() else f"{what}, interrupted: run deploy/{verb} again"


def _step(stage: Stage, begun: Promotion) -> str:
    canary = stage.gates.canary
    steps = () if canary is None else canary.steps
    return f"{steps[begun.step]} %" if begun.step < len(steps) else "the alias"


def _add_served(adapters: list[dict[str, Any]], stage: Stage, operator: Operator) -> None:
    served = {
        listing.name: entry
        for listing in operator.listings()
        for entry in listing.aliases
        if entry.alias == stage.alias
    }
    for told in adapters:
        entry = served.get(told["name"])
        if entry is None:
            continue
        told["serving"] = None if entry.serving is None else entry.serving.number
        told["pending_error"] = entry.pending_error
        if entry.serving is None:
            # Of a version that was withdrawn, say: nobody's requests are divided.
            continue
        rollout = operator.rollout(told["name"], stage.alias)
        told["rollout"] = [asdict(share) for share in rollout.shares]
