"""Who asks: a tenant, what it may use and how much of it."""

from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from manylora_gateway.errors import PermissionDeniedError

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

    def may_use(self, adapter: str) -> bool:
        """Whether it may use the adapter of this name, or with an empty one the bare base."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def require_adapter(self, reference: str) -> None:
        """Refuses what `reference` names before it is looked up.

        So that nobody learns which adapters there are that are not theirs.

        Raises:
            PermissionDeniedError: it may not be used.
        """
        name = reference.partition("@")[0]
        if not self.may_use(name):
            what = f"the adapter {name!r}" if name else "the bare base"
            raise PermissionDeniedError(f"{self.name} may not use {what}.")

    def require_role(self, role: Role) -> None:
        """Refuses a caller without `role`.

        Raises:
            PermissionDeniedError: it does not have it.
        """
        if role not in self.roles:
            raise PermissionDeniedError(f"{self.name} does not have the role {role!r}.")


ANONYMOUS = Tenant("anonymous")
"""Everybody, where no authentication is configured."""

_caller = ContextVar("caller", default=ANONYMOUS)


def caller() -> Tenant:
    """Who made the call that this task answers."""
    return _caller.get()


def set_caller(tenant: Tenant) -> None:
    """Has `caller` say `tenant` in this task and those it starts."""
    _caller.set(tenant)
