"""deploy/promote NAME --from STAGE --to STAGE: gates, approval, canary, alias.

Whatever ends it, running it again goes on: the journal says what was passed, the gateway how the
requests are divided, the registry where the alias is. A signal sends everybody back first, as
nobody watches the version any more; SIGKILL leaves its share as it is until this or a rollback
is run.
"""

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from deploy.stages import gates
from deploy.stages.approve import approvers
from deploy.stages.checks import unprotected
from deploy.stages.errors import (
    ApprovalError,
    BusyError,
    CanaryError,
    CheckError,
    GateError,
    MovedError,
    SettingsError,
    UnwritableError,
)
from deploy.stages.hosting import Hosting
from deploy.stages.journal import Journal, Promotion
from deploy.stages.moves import has_moved, tell_moves
from deploy.stages.operator import Operator
from deploy.stages.settings import Stage
from deploy.stages.taking_over import BoundBrokenError, Place, take_over
from deploy.stages.way_back import end_rollout, interrupted, send_back, where
from deploy.stages.work import Outcome, Work, audit
from manylora_registry import Registry
from manylora_registry.errors import AliasConflictError, AliasNotFoundError


def promote(name: str, source: Stage, target: Stage, work: Work) -> Outcome:
    """Has `target` serve the version of an adapter that `source` serves.

    Raises:
        SettingsError: the stages have no registry in common, or their alias.
        GateError, CheckError: the gates are closed to it; nothing was changed.
        ApprovalError: they are open, and somebody must approve it.
        CanaryError: it broke a bound with its first share; everybody is back.
        MovedError: somebody moved the alias or divided the requests otherwise meanwhile.
        SignalledError: a signal came; everybody is back, and running it again goes on.
        BusyError: the same is under way elsewhere.
        RegistryError, StatusError: the registry or a gateway is away.
    """
    if source.registry != target.registry:
        raise SettingsError(
            [f"{source.name} and {target.name} have different registries in their gateway.yaml"]
        )
    if source.alias == target.alias:
        same = f"{source.name} and {target.name} both serve the alias {source.alias!r}"
        raise SettingsError([f"{same} of one registry"])
    journal = Journal(target, name)
    if work.plan:
        with source.open_registry() as registry:
            return _Promoting(registry, name, source, target, work, journal).plan()
    with journal.alone("promote"):
        try:
            with source.open_registry() as registry:
                return _Promoting(registry, name, source, target, work, journal).run()
        except KeyboardInterrupt:
            raise interrupted(source, target, name, work, journal) from None


class _Promoting:
    """One adapter on its way from a stage to another."""

    def __init__(
        self,
        registry: Registry,
        name: str,
        source: Stage,
        target: Stage,
        work: Work,
        journal: Journal,
    ) -> None:
        self.registry, self.name, self.source, self.target = registry, name, source, target
        self.work, self.journal = work, journal
        try:
            self.version = registry.resolve(f"{name}@{source.alias}")
        except AliasNotFoundError:
            raise CheckError(
                f"{source.name} has no version of {name} to promote: deploy/candidate "
                f"{name}@NUMBER --stage {source.name} brings one there"
            ) from None
        self.alias = registry.aliases(name).get(target.alias)
        present = None if self.alias is None else registry.find(f"{name}@{self.alias.version}")
        self.present = None if present is None or present.yanked else present
        """What is served now; a version that was withdrawn is no more."""

    @property
    def what(self) -> str:
        return f"{self.name}@{self.version.number}"

    def plan(self) -> Outcome:
        """Says what would be done, from where it stands."""
        begun = self._begun()
        target, alias = self.target, self.alias
        if alias is not None and alias.version == self.version.number:
            return self._done("serves")
        if begun is None or not gates.still_open(begun, target, self.name):
            for step in gates.planned(self._asked(Promotion("plan", 0, "", "", None, 0))):
                self.work.step(step)
        if target.gates.approval.required:
            self.work.step("ask for somebody's approval")
        canary = target.gates.canary
        if canary is not None and self.present is not None:
            for percent in canary.steps[0 if begun is None else begun.step :]:
                self.work.step(
                    f"give version {self.version.number} {percent} % of {self.name}@{target.alias} "
                    f"and watch it for {canary.window_s:g} s and {canary.requests} requests"
                )
        before = "nothing" if alias is None else f"version {alias.version}"
        self.work.step(
            f"move {self.name}@{target.alias} from {before} to {self.version.number}, if it is at "
            f"generation {0 if alias is None else alias.generation} still"
        )
        return self._done("would serve")

    def run(self) -> Outcome:
        """Goes on from where it stands."""
        begun = self._begun()
        present = self.alias
        if begun is not None and begun.broken:
            self._take_back(begun, begun.broken)
        if present is not None:
            tell_moves(self.registry, self.target, self.name, self.work, begun)
        # Whether it had come to its end, but for its own words about it.
        if begun is not None and has_moved(self.registry, self.target, self.name, begun):
            self.journal.end()
            begun = None
        if begun is not None and not self._still_meant(begun):
            self._abandon(begun, "the alias, what it serves or the candidate has changed since")
            begun = None
        if present is not None and present.version == self.version.number:
            return self._await_serving()
        self._require_operator()
        promotion = begun or self._begin()
        promotion = self._pass_gates(promotion)
        self._require_approval(promotion)
        promotion = self._canary(promotion)
        self._move(promotion)
        served = self._await_serving()
        self._audit(promotion, "done", detail={"generation": promotion.generation + 1})
        self.journal.end()
        return served

    def _begun(self) -> Promotion | None:
        begun = self.journal.read()
        if begun is None or isinstance(begun, Promotion):
            return begun
        raise BusyError(
            f"a rollback of {self.name} on {self.target.name} was interrupted: run it again first"
        )

    def _latest(self, promotion: Promotion) -> Promotion:
        """How far it came: a canary keeps its steps."""
        known = self.journal.known
        return known if isinstance(known, Promotion) else promotion

    def _still_meant(self, begun: Promotion) -> bool:
        generation = 0 if self.alias is None else self.alias.generation
        present = None if self.present is None else self.present.number
        return (begun.digest, begun.generation, begun.present) == (
            self.version.digest,
            generation,
            present,
        )

    def _begin(self) -> Promotion:
        alias = self.alias
        promotion = Promotion(
            attempt=uuid.uuid4().hex,
            version=self.version.number,
            digest=self.version.digest,
            source=self.source.name,
            present=None if self.present is None else self.present.number,
            generation=0 if alias is None else alias.generation,
        )
        self.journal.write(promotion)
        return promotion

    def _asked(self, promotion: Promotion) -> gates.Asked:
        reports = self.target.state / "reports" / f"{self.what}-{promotion.attempt[:8]}"
        through = Hosting(self.source).require()
        return gates.Asked(
            self.registry, self.source, self.target, through, self.version, self.present, reports
        )

    def _pass_gates(self, promotion: Promotion) -> Promotion:
        if gates.still_open(promotion, self.target, self.name):
            self.work.say(f"{self.what} has passed the gates already")
            return promotion
        # Before they are asked: whoever changes one meanwhile has it asked again.
        asked = gates.fingerprint(self.target, self.name)
        try:
            reasons = gates.closed(self._asked(promotion), self.work)
        except CheckError as error:
            reasons = [str(error)]
        if reasons:
            self._audit(promotion, "refused", step="gates", detail={"reasons": reasons})
            self.journal.end()
            raise GateError(
                f"the gates of {self.target.name} are closed to {self.what}: {'; '.join(reasons)}"
            )
        self._audit(promotion, "passed", step="gates")
        unprotected(self.registry, self.target, self.version)
        return self.journal.update(promotion, gates=asked, passed_at=time.time())

    def _require_operator(self) -> None:
        """The canary needs the target's gateway; the gates before it take minutes."""
        if self.target.gates.canary is not None and self.present is not None:
            with Operator(Hosting(self.target).require(), self.target.token) as operator:
                operator.rollout(self.name, self.target.alias)

    def _require_approval(self, promotion: Promotion) -> None:
        if not self.target.gates.approval.required:
            return
        by = approvers(self.registry, self.target, self.version, self.work.actor)
        if not by:
            self._audit(promotion, "waiting", step="approval")
            allowed = ", ".join(self.target.gates.approval.by) or "somebody else"
            raise ApprovalError(
                f"{self.what} has passed the gates of {self.target.name} and needs approval by "
                f"{allowed}: deploy/approve {self.what} --stage {self.target.name}, then run this "
                "again"
            )
        self._audit(promotion, "given", step="approval", detail={"by": by})

    def _canary(self, promotion: Promotion) -> Promotion:
        settings = self.target.gates.canary
        if settings is None or promotion.present is None:
            return promotion
        running = Hosting(self.target).require()
        with Operator(running, self.target.token) as operator:
            place = Place(
                self.registry,
                self.target,
                running,
                operator,
                self.journal,
                self.version,
                promotion.present,
            )
            try:
                return take_over(place, settings, promotion, self.work)
            except BoundBrokenError as error:
                self._take_back(promotion, error.reasons)
            except MovedError as error:
                self._abandon(promotion, str(error))
                raise
            except Exception:
                self.work.say(
                    send_back(self.target, self.name, self._latest(promotion), self.journal)
                )
                raise
        raise AssertionError("one of them always raises")

    def _move(self, promotion: Promotion) -> None:
        self.work.say(f"moving {self.name}@{self.target.alias} to version {promotion.version}")
        try:
            self.registry.set_alias(
                self.name,
                self.target.alias,
                promotion.version,
                expect=promotion.generation,
                actor=self.work.actor,
                why=self.work.why or f"promoted from {promotion.source}",
            )
        except AliasConflictError as error:
            self._abandon(promotion, str(error))
            raise MovedError(str(error)) from error
        except Exception:
            if self.target.gates.canary is not None and promotion.present is not None:
                self.work.say(send_back(self.target, self.name, promotion, self.journal))
            raise

    def _await_serving(self) -> Outcome:
        """Waits until the gateway has followed the alias, if there is one."""
        running = Hosting(self.target).find()
        if running is not None and running.ready:
            with Operator(running, self.target.token) as operator:
                within = self.target.config.start_timeout_s
                operator.await_serving(self.version, self.target.alias, within)
        return self._done("serves")

    def _take_back(self, promotion: Promotion, reasons: tuple[str, ...]) -> None:
        begun = self._latest(promotion)
        # A disk that is full keeps nobody on a version that broke a bound.
        with suppress(UnwritableError):
            self.journal.update(begun, broken=reasons)
        end_rollout(self.target, self.name)
        self._audit(
            begun, "rolled-back", step=where(self.target, begun), detail={"reasons": list(reasons)}
        )
        self.journal.end()
        raise CanaryError(
            f"{self.name}@{begun.version} was taken back at {where(self.target, begun)}, and "
            f"everybody is on version {begun.present} again: {'; '.join(reasons)}"
        )

    def _abandon(self, promotion: Promotion, reason: str) -> None:
        """Ends a promotion that is none any more; its rollout too, unless it is another's now."""
        begun = self._latest(promotion)
        running = Hosting(self.target).find()
        divided = begun.gates and self.present is not None
        if divided and running is not None and running.ready:
            with Operator(running, self.target.token) as operator:
                rollout = operator.rollout(self.name, self.target.alias)
                # One that a restarted gateway cannot set yet would come back, watched by nobody.
                waits = len(rollout.division) == 1 and rollout.copies is None
                if waits or begun.version in rollout.division:
                    operator.divide(self.name, self.target.alias, ())
        self._audit(begun, "abandoned", step=where(self.target, begun), detail={"reason": reason})
        self.journal.end()

    def _audit(
        self,
        promotion: Promotion,
        outcome: str,
        *,
        step: str = "",
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        audit(
            self.registry,
            self.target,
            "promote",
            outcome,
            self.work,
            version=self.registry.find(f"{self.name}@{promotion.version}"),
            step=step,
            detail=detail,
            key=f"promote/{promotion.attempt}/{step}/{outcome}",
        )

    def _done(self, verb: str) -> Outcome:
        return Outcome(
            f"{self.target.name} {verb} {self.what}",
            {"stage": self.target.name, "name": self.name, "version": self.version.number},
        )
