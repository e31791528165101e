"""Everybody is sent back to the present version when nobody watches a new one any more.

That needs the gateway alone: the registry may be what is away.
"""

import signal
from contextlib import suppress

from deploy.stages.errors import SignalledError, StageError, UnwritableError
from deploy.stages.hosting import Hosting
from deploy.stages.journal import Journal, Promotion
from deploy.stages.moves import has_moved
from deploy.stages.operator import Operator
from deploy.stages.settings import Stage
from deploy.stages.work import Work, audit
from manylora_client.errors import ClientError
from manylora_registry.errors import RegistryError


def end_rollout(target: Stage, name: str) -> None:
    """Gives everybody what the alias of `target` means.

    Raises:
        NotRunningError, StatusError: the gateway is away.
    """
    with Operator(Hosting(target).require(), target.token) as operator:
        operator.divide(name, target.alias, ())


def send_back(target: Stage, name: str, begun: Promotion, journal: Journal) -> str:
    """Sends everybody back, whatever is away; says what stands."""
    try:
        end_rollout(target, name)
    except (ClientError, StageError) as error:
        return (
            f"version {begun.version} may keep its share of {name}@{target.alias} ({error}): "
            f"deploy/rollback {name} --stage {target.name} ends that"
        )
    # Where that cannot be kept, whoever goes on sees by the division that the step is to begin.
    with suppress(UnwritableError):
        journal.update(begun, began_at=None)
    return f"everybody is back on version {begun.present}"


def interrupted(
    source: Stage, target: Stage, name: str, work: Work, journal: Journal
) -> SignalledError:
    """Sends everybody back behind a signal, undisturbed by more of them; what to tell of it."""
    begun = journal.known or journal.read()
    if not isinstance(begun, Promotion):
        return SignalledError("interrupted; nothing was begun")
    stands = "nothing was changed"
    if begun.gates and begun.present is not None and target.gates.canary is not None:
        # Who presses Ctrl-C again, or a rollback that ends this, wants just what is done here.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            # Behind the move, the old version would answer until the gateway has followed it.
            if not _moved(source, target, name, begun):
                work.say(f"interrupted: sending everybody back to version {begun.present}")
                stands = send_back(target, name, begun, journal)
        finally:
            signal.signal(signal.SIGINT, before)
    try:
        with source.open_registry() as registry:
            alias = registry.aliases(name).get(target.alias)
            if alias is not None and alias.version == begun.version:
                stands = f"{name}@{begun.version} serves already"
            version = registry.find(f"{name}@{begun.version}")
            step = where(target, begun)
            audit(registry, target, "promote", "interrupted", work, version=version, step=step)
    except (RegistryError, KeyboardInterrupt) as error:
        work.say(f"the history does not tell of this: {error or 'interrupted again'}")
    return SignalledError(f"interrupted; {stands}. Run it again to go on")


def _moved(source: Stage, target: Stage, name: str, begun: Promotion) -> bool:
    """Whether the alias has moved; in the canary before, the registry is not waited for."""
    if where(target, begun) != "alias":
        return False
    try:
        with source.open_registry() as registry:
            return has_moved(registry, target, name, begun)
    except RegistryError:
        return False


def where(target: Stage, promotion: Promotion) -> str:
    """The step at which a promotion is."""
    canary = target.gates.canary
    if not promotion.gates:
        return "gates"
    if canary is None or promotion.step >= len(canary.steps):
        return "alias"
    return f"canary {canary.steps[promotion.step]} %"
