"""Everything that can go wrong with a stage, each one line that says what to do.

StageError
├── NoStageError          there is no stage of that name
├── SettingsError         files of a stage have mistakes; says them all
├── DamagedError          a file the scripts keep is not as they wrote it
├── UnwritableError       a file the scripts keep cannot be written
├── StartError            a stage's gateway did not start
├── StopError             it does not end
├── NotRunningError       it does not run, and must
├── ForeignGatewayError   it is run by something else than these scripts
├── BusyError             another process does the same thing just now
├── CheckError            a version may not enter the stage; says why
├── GateError             the gates are closed to it
├── ApprovalError         nobody has approved it yet
├── CanaryError           it was taken back: a bound was broken
├── MovedError            somebody else moved the alias or changed the rollout meanwhile
├── SwapError             the gateway does not serve what the alias points at
├── NothingBeforeError    there is nothing to go back to
└── SignalledError      a signal ended it; says what stands now
"""

from collections.abc import Sequence
from pathlib import Path


class StageError(Exception):
    """Base of all; its text is one line a user can act on."""


class NoStageError(StageError):
    """There is no stage of that name."""


class SettingsError(StageError):
    """Files of a stage have mistakes."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problems))


class DamagedError(StageError):
    """A file the scripts keep is not as they wrote it."""

    def __init__(self, file: Path) -> None:
        self.what = f"{file} is damaged"
        super().__init__(
            f"{self.what}: remove it, and see with deploy/status what the gateway serves"
        )


class UnwritableError(StageError):
    """A file the scripts keep cannot be written."""

    def __init__(self, file: Path, error: OSError) -> None:
        self.what = f"{file} cannot be written ({error.strerror})"
        super().__init__(f"{self.what}: make room or mend the permissions, then run it again")


class StartError(StageError):
    """A stage's gateway did not start; nothing is left of it."""


class StopError(StageError):
    """A stage's gateway does not end."""


class NotRunningError(StageError):
    """A stage's gateway does not run, and must."""


class ForeignGatewayError(StageError):
    """A stage's gateway is run by something else than these scripts."""


class BusyError(StageError):
    """Another process does the same thing just now."""


class CheckError(StageError):
    """A version may not enter the stage."""


class GateError(StageError):
    """The gates of a stage are closed to a version."""


class ApprovalError(StageError):
    """A version needs somebody's approval first."""


class CanaryError(StageError):
    """A version broke a bound while it took its first share, and everybody is back."""


class MovedError(StageError):
    """Somebody else moved the alias or changed the rollout meanwhile."""


class SwapError(StageError):
    """The gateway does not serve what the alias points at."""


class NothingBeforeError(StageError):
    """There is no version to go back to."""


class SignalledError(StageError):
    """A signal ended it."""
