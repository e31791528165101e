"""What every script is told and tells: who asks and why, what is planned, what was done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.stages.settings import Stage
from manylora_registry import Registry, Version
from manylora_registry.aliases import this_user


@dataclass(frozen=True)
class Work:
    """One run of a script."""

    say: Callable[[str], None]
    """Tells people how it goes."""
    actor: str = field(default_factory=this_user)
    why: str = ""
    plan: bool = False
    """Only say what would be done."""

    def step(self, what: str) -> bool:
        """Says what comes next; whether to do it."""
        self.say(f"would {what}" if self.plan else what)
        return not self.plan


@dataclass(frozen=True)
class Outcome:
    """What came of a script, for people and for machines."""

    text: str
    data: Mapping[str, Any]


def audit(
    registry: Registry,
    stage: Stage,
    action: str,
    outcome: str,
    work: Work,
    *,
    version: Version | None = None,
    step: str = "",
    detail: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> None:
    """Keeps in the registry what was done; once, where `key` says what "once" is."""
    registry.record_deployment(
        stage.name,
        action,
        outcome,
        step=step,
        version=version,
        actor=work.actor,
        why=work.why,
        detail=detail,
        key=key,
    )
