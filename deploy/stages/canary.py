"""What a canary's figures say: pure functions of two readings.

A step passes once its window is over, the version has had its fewest requests and no bound is
broken. It is broken at once when more requests failed than the bound allows of the fewest, or of
as many as there were; the other bounds are held once there are enough requests to tell.
"""

import math
from dataclasses import dataclass
from typing import Literal

from deploy.stages.gate_settings import Bounds, Canary
from deploy.stages.operator import Copies, Figures

FEWEST_COMPARED = 10
"""Copies below which nothing is said about how many differ."""
PATIENCE = 10
"""Windows watched after which a version that nothing can be said about is taken back."""
LEAST_PATIENCE_S = 300.0
"""Seconds before which it is not, however short the window: a probe alone may take a minute."""


@dataclass(frozen=True)
class Reading:
    """What was seen of one step up to now."""

    seconds: float
    """Since its window began."""
    watched_s: float
    """Seconds of them in which this script watched: nobody probes for a script that was killed."""
    candidate: Figures
    """What the new version did in the window."""
    present: Figures
    """What the present one did since the canary began."""
    copies: Copies | None = None
    said: str = ""
    """What the first probe that failed was told."""


@dataclass(frozen=True)
class Verdict:
    """Whether to go on."""

    state: Literal["watch", "passed", "broken"]
    reasons: tuple[str, ...] = ()
    """Which bounds are broken, or what is still missing."""


def judge(canary: Canary, reading: Reading) -> Verdict:
    """What to do about a step."""
    seen, bounds = reading.candidate, canary.bounds
    # A little more, as 0.29 times 100 is a little less than 29.
    allowed = math.floor(bounds.errors * max(seen.requests, canary.requests) + 1e-9)
    if seen.errors > allowed:
        return Verdict(
            "broken",
            (f"{seen.errors} of {seen.requests} requests failed, {allowed} may{_why(reading)}",),
        )
    enough = seen.requests >= canary.requests
    if enough and (broken := _broken(bounds, reading)):
        return Verdict("broken", broken)
    missing = _missing(canary, reading)
    if not missing:
        return Verdict("passed")
    if reading.watched_s > max(PATIENCE * canary.window_s, LEAST_PATIENCE_S):
        return Verdict("broken", (f"after {reading.watched_s:.0f} s: {missing[0]}",))
    return Verdict("watch", missing)


def compared(copies: Copies | None) -> int:
    """Copies there is something to say about."""
    return 0 if copies is None else copies.same + copies.different + copies.failed


def did(now: Figures, before: Figures) -> Figures:
    """What was done between two readings; its latency is that of the later one."""
    return Figures(
        now.requests - before.requests,
        now.errors - before.errors,
        now.tokens - before.tokens,
        now.first_token_p95_s,
        {
            reason: count - before.reasons.get(reason, 0)
            for reason, count in now.reasons.items()
            if count > before.reasons.get(reason, 0)
        },
    )


def restarted(now: Figures, before: Figures) -> bool:
    """Whether the gateway counts anew since `before`."""
    return now.requests < before.requests


def _broken(bounds: Bounds, reading: Reading) -> tuple[str, ...]:
    new, old = reading.candidate, reading.present
    reasons: list[str] = []
    first, limit = new.first_token_p95_s, bounds.first_token_p95_s
    ratio = bounds.first_token_ratio
    told = [] if limit is None and ratio is None else [first]
    told += [] if ratio is None or not old.requests else [old.first_token_p95_s]
    # No comparison with a NaN is true: a figure that is none would keep every bound.
    if not all(math.isfinite(seconds) and seconds > 0 for seconds in told):
        reasons.append("the gateway tells no time to the first token of what it answered")
    if limit is not None and first > limit:
        reasons.append(f"the first token takes {first:.3f} s (95th percentile), {limit:g} s may be")
    if ratio is not None and old.requests and first > ratio * old.first_token_p95_s > 0:
        reasons.append(
            f"the first token takes {first:.3f} s (95th percentile), more than {ratio:g} times the "
            f"present version's {old.first_token_p95_s:.3f} s"
        )
    ratio = bounds.tokens_ratio
    if ratio is not None and old.requests and _answer(new) > ratio * _answer(old) > 0:
        reasons.append(
            f"an answer has {_answer(new):.1f} tokens, more than {ratio:g} times the present "
            f"version's {_answer(old):.1f}"
        )
    copies, most = reading.copies, bounds.different
    if copies is not None and most is not None and compared(copies) >= FEWEST_COMPARED:
        share = (copies.different + copies.failed) / compared(copies)
        if share > most:
            reasons.append(
                f"{share:.0%} of {compared(copies)} copies were answered otherwise or not at all, "
                f"{most:.0%} may be"
            )
    return tuple(reasons)


def _why(reading: Reading) -> str:
    told = [f"{count} {reason}" for reason, count in reading.candidate.reasons.items()]
    if reading.said:
        told.append(f"a probe was told: {reading.said}")
    return f" ({'; '.join(told)})" if told else ""


def _answer(figures: Figures) -> float:
    return figures.tokens / figures.requests


def _missing(canary: Canary, reading: Reading) -> tuple[str, ...]:
    reasons: list[str] = []
    if reading.candidate.requests < canary.requests:
        reasons.append(f"{reading.candidate.requests} of {canary.requests} requests")
    if reading.seconds < canary.window_s:
        reasons.append(f"{reading.seconds:.0f} of {canary.window_s:.0f} s")
    if _lonely(canary, reading):
        reasons.append("no request of the present version to compare with")
    if (
        reading.copies is not None
        and canary.bounds.different is not None
        and compared(reading.copies) < FEWEST_COMPARED
    ):
        reasons.append(f"{compared(reading.copies)} of {FEWEST_COMPARED} copies")
    return tuple(reasons)


def _lonely(canary: Canary, reading: Reading) -> bool:
    """Whether a bound is about a present version that did nothing."""
    held = (canary.bounds.first_token_ratio, canary.bounds.tokens_ratio)
    return held != (None, None) and not reading.present.requests


def probes_due(canary: Canary, reading: Reading) -> int:
    """Requests the script sends now so that the version has its fewest by the window's end."""
    share = min(1.0, (reading.seconds + canary.look_s) / canary.window_s)
    short = math.ceil(share * canary.requests) - reading.candidate.requests
    if (
        short <= 0
        and canary.bounds.different is not None
        and reading.copies is not None
        and reading.seconds >= canary.window_s
        and compared(reading.copies) < FEWEST_COMPARED
    ):
        return FEWEST_COMPARED
    return max(int(_lonely(canary, reading)), short)
