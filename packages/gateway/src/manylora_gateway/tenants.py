"""Who asks: a tenant, what it may use and how much of it."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["infer", "admin"]


@dataclass(frozen=True)
class TenantLimits:
    """How much one tenant may use at a time; None is no limit of its own."""

    concurrent_requests: int | None = None
    """Requests running or queued at once."""
    tokens_per_second: float | None = None
    """Prompt and generated tokens, sustained; ten seconds' worth may be spent in one burst."""
    weight: float = 1.0
    """Share of the engine beside other tenants when all of them wait."""


@dataclass(frozen=True)
class Tenant:
    """One party that calls the gateway."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    """Globs of adapter names it may use; the empty name is the bare base."""
    roles: frozenset[Role] = frozenset({"infer", "admin"})
    limits: TenantLimits = TenantLimits()


ANONYMOUS = Tenant("anonymous")
"""Everybody, where no authentication is configured."""
