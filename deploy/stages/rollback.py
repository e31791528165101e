"""deploy/rollback NAME --stage STAGE: sends everybody back.

A promotion under way ends, its version loses its share, and the alias stays. Otherwise the alias
moves to the version that was there before the present one came, or to the one named by --to.
Repeated, it says that this was done: it never swings back to what was rolled back.

Where it goes is in the registry and at the gateway, so that neither a damaged journal nor a disk
that takes none keeps it from going there.
"""

import uuid

from deploy.stages.errors import (
    DamagedError,
    NothingBeforeError,
    NotRunningError,
    UnwritableError,
)
from deploy.stages.hosting import Hosting
from deploy.stages.journal import Journal, Promotion, Rollback
from deploy.stages.moves import moves_of, tell_moves
from deploy.stages.operator import Operator
from deploy.stages.settings import Stage
from deploy.stages.work import Outcome, Work, audit
from manylora_client.errors import UnreachableError
from manylora_registry import Alias, Registry, Version
from manylora_registry.errors import AliasNotFoundError, VersionNotFoundError


def rollback(stage: Stage, name: str, to: str | None, work: Work) -> Outcome:
    """Takes back what was done last to an adapter on a stage.

    A promotion under way is ended first.

    Raises:
        NothingBeforeError: the alias never meant another version, or not the one named.
        NotRunningError: a rollout must end, and the gateway is away.
        BusyError: another rollback is under way.
        RegistryError: there is no such version, or it was withdrawn.
    """
    journal = Journal(stage, name)
    with stage.open_registry() as registry:
        alias = registry.aliases(name).get(stage.alias)
        if alias is None:
            raise AliasNotFoundError(f"{name} has no alias {stage.alias!r}")
        # Before a promotion is ended for it.
        named = None if to is None else _named(registry, stage, name, to)
        if work.plan:
            return _go_back(_Place(registry, stage, journal, name, work), alias, named, work)
        with journal.alone("rollback", instead_of="promote"):
            # Whoever was ended may have moved it.
            alias = registry.aliases(name)[stage.alias]
            return _go_back(_Place(registry, stage, journal, name, work), alias, named, work)


class _Place:
    """One adapter of one stage."""

    def __init__(
        self, registry: Registry, stage: Stage, journal: Journal, name: str, work: Work
    ) -> None:
        self.registry, self.stage, self.journal, self.name = registry, stage, journal, name
        running = Hosting(stage).find()
        self.serves = running is not None and running.ready and self._reached(work)
        """Whether there is a gateway to tell."""

    def _reached(self, work: Work) -> bool:
        try:
            with self.operator() as operator:
                operator.listings()
        except UnreachableError as error:
            work.say(str(error))
            return False
        return True

    def operator(self) -> Operator:
        """To speak to the gateway.

        Raises:
            NotRunningError: it does not run.
        """
        return Operator(Hosting(self.stage).require(), self.stage.token)

    def withdrawn(self, number: int) -> bool:
        """Whether nobody is served a version any more, and so nothing divided with it."""
        version = self.registry.find(f"{self.name}@{number}")
        return version.yanked or version.deleted

    def divided(self, serving: int) -> bool:
        """Whether others than the alias's version have a share or copies."""
        if not self.serves or self.withdrawn(serving):
            return False
        with self.operator() as operator:
            # It may not have followed the alias yet, or not be able to; or do so between two looks.
            before = operator.serving(self.name, self.stage.alias)
            rollout = operator.rollout(self.name, self.stage.alias)
            after = operator.serving(self.name, self.stage.alias)
        whole = not rollout.division or any(
            rollout.division == {number: 100} for number in (serving, before, after)
        )
        return not whole or rollout.copies is not None


def _go_back(place: _Place, alias: Alias, named: int | None, work: Work) -> Outcome:
    registry, stage, name = place.registry, place.stage, place.name
    elsewhere = named not in (None, alias.version)
    begun, fresh = _begun(place, work, elsewhere=elsewhere), False
    if not work.plan:
        tell_moves(registry, stage, name, work, begun)
    if isinstance(begun, Rollback) and not _still_meant(place, begun, alias, named):
        if not work.plan:
            place.journal.end()
        begun = None
    if not isinstance(begun, Rollback):
        begun = _intention(place, begun, alias, named)
        if begun is None:
            return _already(place, alias)
        fresh = not work.plan
    target = alias.version if begun.target is None else begun.target
    version = registry.resolve(f"{name}@{target}")
    # What is not to be had is not under way: it would keep promotions waiting.
    if fresh:
        try:
            place.journal.write(begun)
        except UnwritableError as error:
            work.say(f"{error.what}: going back all the same")
    told = place.serves and not place.withdrawn(alias.version)
    if told and work.step(f"end the rollout of {name}@{stage.alias}"):
        with place.operator() as operator:
            operator.divide(name, stage.alias, ())
    if alias.version != target and work.step(
        f"move {name}@{stage.alias} from version {alias.version} to {target}"
    ):
        registry.set_alias(
            name,
            stage.alias,
            target,
            expect=alias.generation,
            actor=work.actor,
            why=work.why or "rolled back",
            # It served here before, and an emergency waits for no gate.
            override=True,
        )
    if place.serves and work.step(f"wait until the gateway of {stage.name} serves {target}"):
        with place.operator() as operator:
            operator.await_serving(version, stage.alias, stage.config.start_timeout_s)
    if not work.plan:
        _record(place, version, begun, work)
        place.journal.end()
    serves = "serves" if place.serves else "will serve, once its gateway is back,"
    would = "would serve" if work.plan else serves
    return Outcome(
        f"{stage.name} {would} {name}@{target} again",
        {"stage": stage.name, "version": target, "moved": begun.target is not None},
    )


def _begun(place: _Place, work: Work, *, elsewhere: bool) -> Promotion | Rollback | None:
    """What is under way, as far as that can be told; `elsewhere`: the alias is to move anyhow."""
    try:
        return place.journal.read()
    except DamagedError as error:
        # Nobody but a gateway can tell then whether a version has a share, which a move ends too.
        if not place.serves and not elsewhere:
            stage = place.stage.name
            raise NotRunningError(
                f"{error.what}, and the gateway of {stage}, which could tell whether a version has "
                f"a share, is away: bring it back first, by deploy/up {stage} where that runs it, "
                "or name by --to where the alias goes"
            ) from error
        work.say(f"{error.what}: going by what the gateway and the registry tell")
        return None


def _named(registry: Registry, stage: Stage, name: str, to: str) -> int:
    """The version that --to names."""
    version = registry.resolve(to if "@" in to else f"{name}@{to}")
    served = {move.version for move in moves_of(registry, stage, name)}
    if version.name != name or version.number not in served:
        # It would pass no gate on its way.
        raise NothingBeforeError(
            f"{version.name}@{version.number} never served {stage.name} as {name}: new versions "
            "enter by deploy/promote"
        )
    return version.number


def _still_meant(place: _Place, begun: Rollback, alias: Alias, named: int | None) -> bool:
    """Whether nobody moved the alias elsewhere since, withdrew its version or names another."""
    target = alias.version if begun.target is None else begun.target
    moved = alias.generation != begun.generation and alias.version != begun.target
    return not moved and not place.withdrawn(target) and named in (None, target)


def _intention(
    place: _Place, promotion: Promotion | None, alias: Alias, named: int | None
) -> Rollback | None:
    """What is to be done; None: nothing."""
    attempt = uuid.uuid4().hex if promotion is None else promotion.attempt
    if promotion is not None and promotion.generation != alias.generation:
        promotion = None
    withdrawn = place.withdrawn(alias.version)
    elsewhere = named not in (None, alias.version)
    if promotion is not None and not place.serves and not withdrawn and not elsewhere:
        raise NotRunningError(
            f"version {promotion.version} may have a share of {place.name}@{place.stage.alias}, "
            f"and the gateway of {place.stage.name} is away: bring it back first, by deploy/up "
            f"{place.stage.name} where that runs it, or name by --to where the alias goes"
        )
    target: int | None
    if named is not None:
        target = named
        if target == alias.version and not place.divided(alias.version):
            return None
    elif not withdrawn and (promotion is not None or place.divided(alias.version)):
        target = None
    else:
        before = _before(place, alias)
        if before is None:
            return None
        target = before.number
    return Rollback(attempt, target, alias.generation)


def _before(place: _Place, alias: Alias) -> Version | None:
    """The version the alias meant before the present one came; None: it was moved back already.

    Raises:
        NothingBeforeError: there is none to go back to.
    """
    try:
        return place.registry.before(place.name, place.stage.alias)
    except VersionNotFoundError as error:
        served = {move.version for move in moves_of(place.registry, place.stage, place.name)}
        others = sorted(served - {alias.version})
        ways = [f"--to {number}" for number in others if not place.withdrawn(number)]
        raise NothingBeforeError(
            f"{error}: "
            + (f"{' or '.join(ways)} goes to one it meant since, " if ways else "")
            + "deploy/promote takes in another"
        ) from error


def _already(place: _Place, alias: Alias) -> Outcome:
    text = (
        f"{place.stage.name} went back to {place.name}@{alias.version} already; "
        "--to goes to another that it served"
    )
    return Outcome(text, {"stage": place.stage.name, "version": alias.version, "moved": False})


def _record(place: _Place, version: Version, begun: Rollback, work: Work) -> None:
    move = moves_of(place.registry, place.stage, place.name)[-1]
    audit(
        place.registry,
        place.stage,
        "rollback",
        "done",
        work,
        version=version,
        step="rollout" if begun.target is None else "alias",
        detail={"generation": move.generation, "before": move.previous},
        key=begun.done,
    )
