"""deploy/up and deploy/down: a stage's gateway begins and ends."""

from deploy.stages.hosting import Hosting, Running
from deploy.stages.settings import Stage
from deploy.stages.work import Outcome, Work, audit


def bring_up(stage: Stage, work: Work) -> Outcome:
    """Has the gateway serve.

    Raises:
        StartError: it does not start.
        ForeignGatewayError: something else runs it.
    """
    hosting = Hosting(stage)
    hosting.require_own()
    running = hosting.find()
    there = running is not None and running.ready
    if not there and work.step(f"start the gateway of {stage.name} ({stage.gateway_file})"):
        running = hosting.start()
    if not work.plan and running is not None and running.pid:
        detail = {"pid": running.pid, "inference": running.inference}
        with stage.open_registry() as registry:
            # Whoever finds it kept nowhere keeps it: who started it may have been killed.
            key = _key("up", stage, running)
            audit(registry, stage, "up", "done", work, detail=detail, key=key)
    if running is None or not running.ready:
        return Outcome(f"{stage.name} would serve", {"stage": stage.name, "state": "stopped"})
    return Outcome(
        f"{stage.name} serves: inference {running.inference}, admin {running.admin}"
        + (f", http {running.http}" if running.http else ""),
        {
            "stage": stage.name,
            "state": "serving",
            "started": not there,
            "pid": running.pid,
            "inference": running.inference,
            "admin": running.admin,
            "http": running.http,
        },
    )


def take_down(stage: Stage, work: Work) -> Outcome:
    """Drains the gateway and waits for its end.

    Raises:
        StopError: it does not end.
        ForeignGatewayError: something else runs it.
    """
    hosting = Hosting(stage)
    hosting.require_own()
    running = hosting.find()
    stopped = False
    if running is not None and work.step(f"drain the gateway of {stage.name} and end it"):
        stopped = hosting.stop()
    last = hosting.last()
    if not work.plan and last is not None:
        with stage.open_registry() as registry:
            key = _key("down", stage, last)
            audit(registry, stage, "down", "done", work, detail={"pid": last.pid}, key=key)
        hosting.forget()
    state = "would stop" if work.plan and running is not None else "is stopped"
    return Outcome(f"{stage.name} {state}", {"stage": stage.name, "stopped": stopped})


def _key(action: str, stage: Stage, running: Running) -> str:
    return f"{action}/{stage.name}/{running.pid}-{running.began:.3f}"
