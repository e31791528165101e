"""What judges said, what they cost, and how far they agree with others, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one answer."""

    share: float
    """1 passed or won, 0 failed or lost, 0.5 a tie."""
    reason: str
    """Of the last sample on the majority's side."""
    votes: int
    """Samples on the side of 1."""
    samples: int
    unreadable: int
    """Samples whose words held no verdict; they count as a fail."""
    error: str | None = None
    """Why the judge could not be heard; the answer then counts as failed."""


@dataclass(frozen=True)
class JudgeUsage:
    """What one judge was asked in an evaluation."""

    judge: str
    """Its name in the suite."""
    model: str
    requests: int
    """Questions sent, without those a cache or an equal question answered, and with those sent
    before the evaluation was broken off."""
    cached: int
    retries: int
    failures: int
    """Questions that were never answered."""
    unreadable: int
    """Answers that held no verdict."""
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """By the suite's prices."""
    latency_p50: float
    """Seconds of the median answered attempt."""
    latency_p95: float


@dataclass(frozen=True)
class Agreement:
    """How far a judge agrees with labels, or with a scorer that needs no model."""

    criterion: str
    """The judge's score, e.g. `judge.faithful`."""
    beside: str
    """`labels`, or the other score's name."""
    answers: int
    accuracy: float
    kappa: float | None
    """Cohen's: 1 is agreement, 0 what chance gives; None where one side never changes its word."""
    low: float | None
    """Ends of kappa's 95 % interval; None where it cannot be told."""
    high: float | None
    judge_passed: int
    other_passed: int
