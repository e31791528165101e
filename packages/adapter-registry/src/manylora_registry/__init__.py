"""Immutable, verified adapter versions with aliases, history and lineage.

with Registry.open("registry") as registry:
    version = registry.publish("spelling", run / "adapters/spelling", base=identify_base(base))
    registry.set_alias("spelling", "production", version.number, why="first release")
    directory = registry.materialize(registry.resolve("spelling"))
"""

from typing import TYPE_CHECKING, Any

from manylora_registry.base import BaseModelIdentity, identify_base
from manylora_registry.reference import AdapterReference
from manylora_registry.version import (
    Adapter,
    Alias,
    AliasMove,
    Deployment,
    Evaluation,
    Event,
    GarbageReport,
    Protection,
    VerifyReport,
    Version,
    VersionPage,
)

if TYPE_CHECKING:
    from manylora_registry.cache import Cache
    from manylora_registry.registry import Registry

__all__ = [
    "Adapter",
    "AdapterReference",
    "Alias",
    "AliasMove",
    "BaseModelIdentity",
    "Cache",
    "Deployment",
    "Evaluation",
    "Event",
    "GarbageReport",
    "Protection",
    "Registry",
    "VerifyReport",
    "Version",
    "VersionPage",
    "identify_base",
]


def __getattr__(name: str) -> Any:
    # The database library takes half a second to import; those who only read a config or parse
    # a reference do not wait for it.
    if name == "Registry":
        from manylora_registry.registry import Registry

        return Registry
    if name == "Cache":
        from manylora_registry.cache import Cache

        return Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
