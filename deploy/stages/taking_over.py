"""A canary: a version takes the requests for an alias share by share, watched on the gateway."""

import time
from dataclasses import asdict, dataclass, replace

from deploy.stages import canary
from deploy.stages.errors import MovedError
from deploy.stages.gate_settings import Canary
from deploy.stages.hosting import Running
from deploy.stages.journal import Journal, Promotion
from deploy.stages.load import Prompts, send
from deploy.stages.operator import Figures, Operator, Rollout
from deploy.stages.settings import Stage
from deploy.stages.work import Work, audit
from manylora_client.errors import (
    PermissionDeniedError,
    StatusError,
    UnauthenticatedError,
    UnavailableError,
    UnreachableError,
)
from manylora_registry import Registry, Version

PROBES_AT_ONCE = 4
PROBE_S = 60.0
"""Seconds a probe may take; a later answer counts as a failure of the version."""


@dataclass(frozen=True)
class Place:
    """Where a version takes over."""

    registry: Registry
    stage: Stage
    running: Running
    operator: Operator
    journal: Journal
    version: Version
    present: int


class BoundBrokenError(Exception):
    """The version broke bounds, or cannot be served at all; it is to be taken back."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        self.reasons = reasons
        super().__init__("; ".join(reasons))


def take_over(place: Place, settings: Canary, promotion: Promotion, work: Work) -> Promotion:
    """Goes through the canary's steps, from where the promotion stands.

    Raises:
        BoundBrokenError: the version must be taken back.
        MovedError: somebody moved the alias or divided the requests otherwise.
        StatusError: the gateway is away for longer than it may take to start.
    """
    probing = _Probing(place, settings)
    while promotion.step < len(settings.steps):
        step = _Step(place, settings, probing, work, settings.steps[promotion.step])
        promotion = step.watch(step.begin(promotion))
    return promotion


class _Step:
    """One share of the requests, watched for a window."""

    def __init__(
        self, place: Place, settings: Canary, probing: "_Probing", work: Work, percent: int
    ) -> None:
        self._place, self._settings, self._probing, self._work = place, settings, probing, work
        self._percent = percent
        self._division = _division(place, percent)
        self._copies = settings.copies if percent < 100 else 0
        self._watching_since = time.monotonic()
        self._before_s = 0.0
        """Seconds of the window that had passed when this process began to watch."""

    def begin(self, promotion: Promotion) -> Promotion:
        """Has the version take its share, unless it has it already."""
        place = self._place
        rollout = self._look()
        ours = [_division(place, percent) for percent in (*self._settings.steps, 0)]
        if rollout.division not in ours:
            raise MovedError(
                f"{self._alias} is divided otherwise already ({_told(rollout)}): end that first, "
                "with `manylora rollout clear`"
            )
        copied = 0 if rollout.copies is None else rollout.copies.percent
        if rollout.division != self._division or copied != self._copies:
            self._work.say(f"{self._what} takes {self._percent} % of {self._alias}")
            rollout = self._divide()
            promotion = replace(promotion, began_at=None)
        if promotion.began_at is None:
            first = {"present_began": rollout.figures(place.present)} if promotion.step == 0 else {}
            promotion = place.journal.update(
                promotion,
                began_at=time.time(),
                began=rollout.figures(place.version.number),
                **first,
            )
        return promotion

    def watch(self, promotion: Promotion) -> Promotion:
        """Looks at it until the step has passed."""
        assert promotion.began_at is not None, "the step was begun"
        # The clock on the wall is asked once: it may be set in the middle of a window, and where a
        # process that was killed read it, it may have been wrong.
        self._before_s = max(0.0, time.time() - promotion.began_at)
        self._watching_since = time.monotonic()
        while True:
            promotion, reading = self._read(promotion)
            verdict = canary.judge(self._settings, reading)
            if verdict.state == "broken":
                raise BoundBrokenError(verdict.reasons)
            if verdict.state == "passed":
                return self._pass(promotion, reading)
            began = time.monotonic()
            self._probing.send(canary.probes_due(self._settings, reading), self._percent)
            time.sleep(max(0.0, self._settings.look_s - (time.monotonic() - began)))

    def _read(self, promotion: Promotion) -> tuple[Promotion, canary.Reading]:
        place = self._place
        rollout = self._look()
        alias = place.registry.aliases(place.version.name)[place.stage.alias]
        if alias.generation != promotion.generation or rollout.division != self._division:
            version = place.registry.find(f"{place.version.name}@{place.version.number}")
            withdrawn = f", as {self._what} was withdrawn" if version.yanked else ""
            raise MovedError(
                f"{self._alias} was moved or divided otherwise meanwhile ({_told(rollout)})"
                f"{withdrawn}; this promotion is over"
            )
        now, present_now = rollout.figures(place.version.number), rollout.figures(place.present)
        shared = place.present in rollout.division
        # The new version may have begun with nothing: what it has done since tells nothing then.
        if canary.restarted(now, promotion.began) or (
            shared and canary.restarted(present_now, promotion.present_began)
        ):
            self._watching_since, self._before_s = time.monotonic(), 0.0
            self._work.say("the gateway was restarted and counts anew: so does this step")
            promotion = place.journal.update(
                promotion, began_at=time.time(), began=Figures(), present_began=Figures()
            )
        present = promotion.present_did
        if shared:
            present = canary.did(present_now, promotion.present_began)
        seen = canary.did(now, promotion.began)
        # What the gateway calls the client's doing, a deadline that passed, is the version's.
        seen = replace(seen, errors=max(seen.errors, self._probing.failed))
        watched_s = time.monotonic() - self._watching_since
        reading = canary.Reading(
            seconds=self._before_s + watched_s,
            watched_s=watched_s,
            candidate=seen,
            present=present,
            copies=rollout.copies,
            said=self._probing.said,
        )
        return replace(promotion, present_did=present), reading

    def _pass(self, promotion: Promotion, reading: canary.Reading) -> Promotion:
        place, seen = self._place, reading.candidate
        sent = self._probing.sent
        copies = canary.compared(reading.copies)
        self._work.say(
            f"{self._percent} % passed: {seen.requests} requests, {sent} of them or of the present "
            f"version probes, {seen.errors} failed, first token {seen.first_token_p95_s:.3f} s "
            f"(95th percentile), {seen.tokens / max(1, seen.requests):.1f} tokens an answer"
            + (f", {copies} copies compared" if copies else "")
        )
        audit(
            place.registry,
            place.stage,
            "promote",
            "passed",
            self._work,
            version=place.version,
            step=f"canary {self._percent} %",
            detail={"probes": sent, **asdict(reading)},
            key=f"promote/{promotion.attempt}/canary-{self._percent}",
        )
        self._probing.reset()
        # Before the next share is given, so that whoever goes on never gives this one again.
        return place.journal.update(promotion, step=promotion.step + 1, began_at=None)

    def _divide(self) -> Rollout:
        place = self._place
        copies = (place.version.number, self._copies) if self._copies else None
        shares = list(self._division.items())
        within = place.stage.config.start_timeout_s
        try:
            return place.operator.divide(
                place.version.name, place.stage.alias, shares, copies, within_s=within
            )
        except (UnreachableError, UnauthenticatedError, PermissionDeniedError):
            raise
        except StatusError as error:
            raise BoundBrokenError((f"the gateway cannot serve it: {error}",)) from error

    def _look(self) -> Rollout:
        """The division now; a gateway that is away is given the time it may take to start."""
        deadline = time.monotonic() + self._place.stage.config.start_timeout_s
        waiting = False
        while True:
            try:
                return self._place.operator.rollout(
                    self._place.version.name, self._place.stage.alias
                )
            except UnavailableError as error:
                if time.monotonic() > deadline:
                    raise
                if not waiting:
                    self._work.say(f"waiting: {error}")
                waiting = True
                time.sleep(self._settings.look_s)

    @property
    def _alias(self) -> str:
        return f"{self._place.version.name}@{self._place.stage.alias}"

    @property
    def _what(self) -> str:
        return f"version {self._place.version.number}"


class _Probing:
    """Sends requests where clients send too few."""

    def __init__(self, place: Place, settings: Canary) -> None:
        self._place, self._settings = place, settings
        self._prompts: Prompts | None = None
        self.reset()

    def reset(self) -> None:
        """Counts anew, for another step."""
        self.sent = self.failed = 0
        self.said = ""

    def send(self, count: int, percent: int) -> None:
        """Asks the version itself `count` times, and its alias as often: for what it is held to."""
        if not count:
            return
        place, gates = self._place, self._place.stage.gates
        self._prompts = self._prompts or Prompts(place.stage, place.version.name)
        references = [f"{place.version.name}@{place.version.number}"]
        if percent < 100:
            references.append(f"{place.version.name}@{place.stage.alias}")
        requests = [
            (reference, prompt) for reference in references for prompt in self._prompts.take(count)
        ]
        load = send(
            place.running,
            place.stage.token,
            requests,
            concurrency=PROBES_AT_ONCE,
            timeout_s=PROBE_S,
            max_tokens=gates.max_tokens,
        )
        self.sent += len(requests)
        errors = [one.error for one in load.asked[:count] if one.error]
        self.failed += len(errors)
        self.said = self.said or next(iter(errors), "")


def _division(place: Place, percent: int) -> dict[int, int]:
    """Percent by version, the new one first: its sessions stay with it while its share grows."""
    division = {place.version.number: percent, place.present: 100 - percent}
    return {version: share for version, share in division.items() if share}


def _told(rollout: Rollout) -> str:
    return ", ".join(f"version {share.version} {share.percent} %" for share in rollout.shares)
