"""What the registry tells: versions, aliases and their moves, events, the report of a check."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from manylora_registry.errors import Problem, WrongBaseError


@dataclass(frozen=True)
class Version:
    """One immutable adapter; `digest` is what it is, the rest describes it."""

    name: str
    """The adapter it is a version of."""
    number: int
    """1, 2, 3 … without gaps within one adapter."""
    digest: str
    """Of the manifest: `sha256:` and 64 hexadecimal digits."""
    base_fingerprint: str
    """The base model it belongs to, `sha256:` and 64 hexadecimal digits."""
    rank: int
    """The highest of its modules: what the engine must allow."""
    size: int
    """Bytes of its files together."""
    created_at: datetime
    """When it was first published here, UTC."""
    metrics: Mapping[str, float] = field(hash=False)
    tags: Mapping[str, str] = field(hash=False)
    lineage: Mapping[str, str] = field(hash=False)
    """Where it came from: run, recipe digest, data fingerprint, parent …"""
    yanked: bool
    """Withdrawn: kept, but not served."""
    parent: str | None = None
    """The version it was trained on from, as NAME@NUMBER."""
    deleted: bool = False
    """Not served; garbage collection removes its bytes once nothing needs them."""
    collected: bool = False
    """Its bytes are gone; number, digest and description stay."""

    @property
    def engine_name(self) -> str:
        """The engine's name for it, never reused for other weights."""
        return f"{self.name}@{self.number}-{self.digest.removeprefix('sha256:')[:12]}"

    def require_base(self, fingerprint: str) -> None:
        """Raises WrongBaseError unless it was made for the base of this fingerprint."""
        if self.base_fingerprint != fingerprint:
            raise WrongBaseError(f"{self.name}@{self.number}", self.base_fingerprint, fingerprint)


@dataclass(frozen=True)
class VersionPage:
    """Some of the versions that match."""

    versions: tuple[Version, ...]
    next: str | None
    """Where to go on, if there are more."""


@dataclass(frozen=True)
class Alias:
    """Where an alias points, and how many times it was moved to get there."""

    version: int
    generation: int
    protected: bool = False
    """A move needs a version that has passed its gate."""


@dataclass(frozen=True)
class Adapter:
    """A named line of versions."""

    name: str
    latest: Version
    aliases: Mapping[str, Alias]
    targets: Mapping[str, Version]
    """What each alias points at, withdrawn or not."""


@dataclass(frozen=True)
class AliasMove:
    """One line of an alias's history."""

    name: str
    alias: str
    generation: int
    """1 for the first move of this alias, then without gaps."""
    version: int
    previous: int | None
    """The version it pointed at before; none at its first move."""
    actor: str
    why: str
    at: datetime
    override: bool = False
    """The alias was protected and the version had not passed; `why` says why it was done."""


@dataclass(frozen=True)
class Evaluation:
    """What a suite found about a version; kept for ever."""

    suite: str
    """The suite or gate, by name."""
    passed: bool
    result: Mapping[str, Any] = field(hash=False)
    """Its figures, as JSON."""
    actor: str
    at: datetime


@dataclass(frozen=True)
class Protection:
    """A rule for an alias: it moves only to versions that have passed a gate."""

    alias: str
    suite: str | None
    """The suite whose latest record must have passed; None for every suite there is a record of,
    and at least one."""
    actor: str
    why: str
    at: datetime


@dataclass(frozen=True)
class Deployment:
    """Something that was done to a stage, and what came of it; kept for ever."""

    key: str
    """Unique in the registry; a record is kept once under a key."""
    stage: str
    action: str
    """What was done, e.g. `promote`."""
    step: str
    """The part of it that this is about; empty: the whole."""
    outcome: str
    """What came of it, e.g. `done`."""
    name: str | None
    """The adapter, if it is about one."""
    version: int | None
    digest: str | None
    actor: str
    why: str
    detail: Mapping[str, Any] = field(hash=False)
    """Figures and reasons, as JSON."""
    at: datetime


EventKind = Literal[
    "published",
    "alias_moved",
    "yanked",
    "described",
    "evaluated",
    "deleted",
    "collected",
    "restored",
]


@dataclass(frozen=True)
class Event:
    """Something that happened, in the order in which it became visible."""

    sequence: int
    kind: EventKind
    name: str
    alias: str | None
    version: int
    at: datetime


@dataclass(frozen=True)
class VerifyReport:
    """What a check of everything found."""

    versions: int
    blobs: int
    size: int
    """Bytes read and hashed."""
    moves: int
    problems: tuple[Problem, ...]
    unreferenced: tuple[str, ...]
    """Digests no version needs: left for garbage collection, harmless."""
    affected: tuple[str, ...] = ()
    """Versions that cannot be trusted or read, as NAME@NUMBER."""
    set_aside: tuple[str, ...] = ()
    """Digests of damaged blobs that were taken out of the store."""

    @property
    def ok(self) -> bool:
        """Whether every version can be trusted."""
        return not self.problems


@dataclass(frozen=True)
class GarbageReport:
    """What a garbage collection did, or would do."""

    collected: tuple[str, ...]
    """Deleted versions that gave up their bytes, as NAME@NUMBER."""
    kept: tuple[Problem, ...]
    """Deleted versions that something still needs, and what."""
    waiting: int
    """Blobs that are condemned and wait out their grace."""
    deleted: tuple[str, ...]
    """Digests of the blobs that were deleted."""
    freed: int
    """Bytes of those."""
