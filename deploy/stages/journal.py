"""What is under way on one adapter of a stage: a small file, and a lock that dies with its holder.

The file says what was begun and cannot be read off the registry or the gateway. Everything else
is looked up again by whoever goes on.
"""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from deploy.stages import files
from deploy.stages.errors import BusyError, UnwritableError
from deploy.stages.operator import Figures
from deploy.stages.settings import Stage


@dataclass(frozen=True)
class Promotion:
    """A promotion that was begun."""

    attempt: str
    """Unique; what the registry keeps of it goes by this."""
    version: int
    digest: str
    source: str
    """The stage it comes from."""
    present: int | None
    """The version that the alias means meanwhile; None: it is new."""
    generation: int
    """Of the alias, meanwhile."""
    gates: str = ""
    """What was asked of it; empty until it has passed."""
    passed_at: float = 0.0
    """When it passed, in seconds since 1970."""
    step: int = 0
    """Index of the canary's step."""
    began_at: float | None = None
    """When the step's window began; None: it has not."""
    began: Figures = field(default_factory=Figures)
    """What the version had done on the gateway by then."""
    present_began: Figures = field(default_factory=Figures)
    """What the present version had done when the canary began."""
    present_did: Figures = field(default_factory=Figures)
    """What it had done when it was last seen."""
    broken: tuple[str, ...] = ()
    """Bounds that were broken: it is being taken back."""
    kind: Literal["promotion"] = "promotion"

    @property
    def done(self) -> str:
        """What the record of its end goes by."""
        return f"promote/{self.attempt}//done"


@dataclass(frozen=True)
class Rollback:
    """A rollback that was begun."""

    attempt: str
    target: int | None
    """Where the alias goes; None: it stays, and the rollout ends."""
    generation: int
    """Of the alias before."""
    kind: Literal["rollback"] = "rollback"

    @property
    def done(self) -> str:
        """What the record of its end goes by."""
        return f"rollback/{self.attempt}"


Entry = Promotion | Rollback
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


@dataclass(frozen=True)
class Holder:
    """Who has the lock."""

    pid: Annotated[int, Field(gt=0)]
    """Of one process: others are sent the same signal by what is no such number."""
    action: str


_HOLDER = TypeAdapter(Holder)


class Journal:
    """What is under way on one adapter of a stage."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._file = stage.state / "promotions" / f"{name}.json"
        self._lock = self._file.with_suffix(".lock")
        self._what = f"{name} on {stage.name}"
        self.known: Entry | None = None
        """What was read or kept last: who holds the lock need not believe the file any more."""

    def read(self) -> Entry | None:
        """What was begun and is not over."""
        self.known = files.read_json(self._file, _ENTRY)
        return self.known

    def write(self, entry: Entry) -> None:
        """Keeps where it stands."""
        files.write_json(self._file, asdict(entry))
        self.known = entry

    def update(self, entry: Promotion, **changes: Any) -> Promotion:
        """Keeps `entry` with changes; returns that."""
        changed = replace(entry, **changes)
        self.write(changed)
        return changed

    def end(self) -> None:
        """It is over."""
        files.remove(self._file)
        self.known = None

    def running(self) -> bool:
        """Whether a process works on it."""
        return files.is_locked(self._lock)

    @contextmanager
    def alone(self, action: str, *, instead_of: str | None = None) -> Generator[None]:
        """Lets no other process work on the same while the block lasts.

        Args:
            action: what this process does.
            instead_of: an action that is ended first, should another process be doing it.

        Raises:
            BusyError: another process does something else.
        """
        descriptor = files.open_lock(self._lock)
        try:
            # Whoever has the lock has said so by the time another reads who has it.
            with files.waited_for(self._file.with_suffix(".taking")):
                if not files.try_lock(descriptor):
                    self._end_other(descriptor, instead_of)
                try:
                    files.write_json(self._holder, asdict(Holder(os.getpid(), action)))
                except UnwritableError:
                    if instead_of is None:
                        raise
                    # Who ends others waits for no room. Better nobody than the holder before.
                    files.remove(self._holder)
            yield
        finally:
            os.close(descriptor)

    @property
    def _holder(self) -> Path:
        return self._file.with_suffix(".holder")

    def _end_other(self, descriptor: int, instead_of: str | None) -> None:
        holder = files.read_json(self._holder, _HOLDER) or Holder(0, "something")
        if instead_of is None or holder.action != instead_of:
            raise BusyError(
                f"{holder.action} of {self._what} is under way in process {holder.pid}: wait for "
                "it, or end it"
            )
        # Gone already, where it was about to end by itself.
        with suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGTERM)
        # It takes its version back first.
        files.lock(descriptor)
