"""gates.yaml: what a version must show to enter a stage."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from manylora_evaluator.suite import Decision, Threshold
from manylora_registry.config import ConfigModel


class SuiteGate(ConfigModel):
    """A suite of `manylora evaluate`; of its tasks, those for the adapter are asked."""

    path: Path
    """The suite's YAML file."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows of a task. Unset: as the suite says."""
    thresholds: dict[str, tuple[Threshold, ...]] = Field(default_factory=dict)
    """Bounds that scores must keep, by task, beside those in the suite itself."""


class Smoke(ConfigModel):
    """A short load on the gateway the version comes from."""

    requests: int = Field(default=60, ge=1)
    """How many are sent."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Most of them under way at once."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds one may take; a later answer is an error."""
    errors: float = Field(default=0.0, ge=0, lt=1)
    """Share that may fail; less than 1, as times are those of answers."""
    first_token_p95_s: float | None = Field(default=None, gt=0)
    """Seconds to the first token, 95th percentile."""
    answer_p95_s: float | None = Field(default=None, gt=0)
    """Seconds to the whole answer, 95th percentile."""


class Approval(ConfigModel):
    """A person says yes, with `deploy/approve`."""

    required: bool = False
    """Whether a version waits for it."""
    by: tuple[str, ...] = ()
    """Who may, as USER@HOST or the name given with --actor. Empty: anybody."""
    of_another: bool = True
    """Not by whoever promotes."""


class Bounds(ConfigModel):
    """What a version may not break while it takes its first shares; unset bounds nothing."""

    errors: float = Field(default=0.01, ge=0, le=1)
    """Share of its requests that may fail for a reason that is not the client's."""
    first_token_p95_s: float | None = Field(default=None, gt=0)
    """Seconds to the first token, 95th percentile of its newest 1,000 requests."""
    first_token_ratio: float | None = Field(default=None, gt=1)
    """The same as a multiple of the present version's."""
    tokens_ratio: float | None = Field(default=None, gt=1)
    """Tokens of an answer, on average, as a multiple of the present version's."""
    different: float | None = Field(default=None, ge=0, le=1)
    """Share of the copied requests that it answers otherwise than the present version; needs
    `copies`."""


class Canary(ConfigModel):
    """How a version takes over the requests for the alias, share by share."""

    steps: tuple[int, ...] = (5, 25, 100)
    """Percent of the requests, one step after the other."""
    window_s: float = Field(default=300.0, gt=0)
    """Seconds each step is watched, at the least."""
    look_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks at the gateway's figures."""
    requests: int = Field(default=50, ge=1)
    """Fewest requests of the version in a step. Where clients send fewer in the window, the
    script sends the rest itself."""
    copies: int = Field(default=0, ge=0, le=100)
    """Percent of the present version's requests that the new one answers too, for nobody."""
    bounds: Bounds = Bounds()
    """What it may not break."""

    @field_validator("steps")
    @classmethod
    def _rises_to_all(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or steps[-1] != 100 or list(steps) != sorted(set(steps)) or steps[0] < 1:
            raise ValueError("must rise from 1 or more to 100, e.g. [5, 25, 100]")
        return steps

    @model_validator(mode="after")
    def _can_tell_what_is_bounded(self) -> Self:
        bounds = self.bounds
        if bounds.different is not None and not self.copies:
            raise ValueError("bounds.different is about copies: set copies too")
        beside = {
            "first_token_ratio": bounds.first_token_ratio,
            "tokens_ratio": bounds.tokens_ratio,
            "different": bounds.different,
        }
        held = [name for name, bound in beside.items() if bound is not None]
        if held and self.steps[0] == 100:
            raise ValueError(
                f"steps must begin below 100: bounds.{held[0]} sets the version beside the present "
                "one, which then has no requests"
            )
        return self


class Gates(ConfigModel):
    """The whole file. Paths are relative to it."""

    signatures: tuple[Path, ...] = ()
    """Public keys, PEM files, one of which must have signed the version. Empty: none."""
    suites: tuple[SuiteGate, ...] = ()
    """Suites the version must pass."""
    not_worse: bool = True
    """Whether it must be no worse than the stage's present version, by the suites' paired tests."""
    decision: Decision | None = None
    """When it counts as worse. Unset: as each suite says."""
    prompts: Path | None = None
    """JSON lines with `messages` for smoke load and probes. Unset: rows of the suites."""
    max_tokens: int = Field(default=64, ge=1)
    """Most tokens of an answer to one of them."""
    smoke: Smoke | None = None
    """A short load the version must stand. Unset: none."""
    approval: Approval = Approval()
    """Whether somebody must say yes."""
    canary: Canary | None = None
    """How the version takes over. Unset: the alias moves at once."""
    evidence_hours: float = Field(default=24.0, gt=0)
    """How long gates that were passed count, should a promotion be interrupted."""

    def relative_to(self, directory: Path) -> "Gates":
        """The same with its paths read from `directory`."""
        return self.model_copy(
            update={
                "signatures": tuple(directory / key for key in self.signatures),
                "suites": tuple(
                    suite.model_copy(update={"path": directory / suite.path})
                    for suite in self.suites
                ),
                "prompts": None if self.prompts is None else directory / self.prompts,
            }
        )
