"""Every error the trainer states.

TrainerError
├── DataError                 rows cannot be trained on
│   ├── RowError              one row is malformed: file, row and field are named
│   ├── SourceError           a source cannot be opened or fails midway
│   └── NoExamplesError       nothing is left to train on
├── UnsupportedBaseError      the base cannot be trained on
├── UnfitTaskError            a task's settings do not go with its rows or its base
├── InitialAdapterError       the adapter to go on from is not there or of another shape
├── RunDirectoryError         the run directory cannot be used as asked
│   ├── RunExistsError        it already holds a run and resuming was not asked for
│   ├── RecipeChangedError    the run was started with another recipe, base or data
│   ├── CheckpointError       a checkpoint is there but none of them is whole
│   ├── StorageError          the disk is full, or the directory cannot be written any more
│   └── UnreadableRunError    a directory holds no run, or a damaged one
├── SweepError                a sweep cannot go on as asked, or found nothing
├── WorkersUnavailableError   several workers were asked for, and Ray is not installed
├── WorkersLostError          workers ended more often than they may be started again
├── DeviceMemoryError         the GPU has too little memory for what the recipe asks
├── RunInterruptedError       stopped by a signal; a checkpoint was written
├── AdaptersStoppedError      one or more adapters stopped early, for the reasons given
├── ExportError               an experiment tracker is not installed or refuses
├── NotPublishableError       a run or a task of it has nothing to publish
└── BaseFetchError            a packaged base could not be put where it was asked for
"""

from typing import Any


class TrainerError(Exception):
    """Base of all; its text is one line a user can act on."""

    reason = "TRAINER"
    """For google.rpc.ErrorInfo, in UPPER_SNAKE."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled as a call with their text, which is not what these take; they
        # travel from a worker to its driver.
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[TrainerError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class DataError(TrainerError):
    """Rows cannot be trained on."""

    reason = "DATA_INVALID"


class RowError(DataError):
    """One row is malformed."""

    reason = "ROW_INVALID"

    def __init__(self, source: str, row: int, field: str | None, problem: str) -> None:
        self.source = source
        self.row = row
        self.field = field
        self.problem = problem
        where = f"{source}, row {row}" + (f", field {field!r}" if field else "")
        super().__init__(f"{where}: {problem}")


class SourceError(DataError):
    """A source cannot be opened or fails midway."""

    reason = "SOURCE_FAILED"


class NoExamplesError(DataError):
    """Nothing is left to train on."""

    reason = "NO_EXAMPLES"


class UnsupportedBaseError(TrainerError):
    """The base cannot be trained on as asked."""

    reason = "BASE_UNSUPPORTED"


class UnfitTaskError(TrainerError):
    """A task's settings do not go with its rows or its base; other tasks may well train."""

    reason = "TASK_UNFIT"

    def __init__(self, task: str, problem: str) -> None:
        self.task = task
        self.problem = problem
        super().__init__(f"task {task}: {problem}")


class InitialAdapterError(TrainerError):
    """The adapter that a task should go on from is not there, damaged, or of another shape."""

    reason = "INITIAL_ADAPTER_INVALID"


class RunDirectoryError(TrainerError):
    """The run directory cannot be used as asked."""

    reason = "RUN_DIRECTORY"


class RunExistsError(RunDirectoryError):
    """The directory already holds something and resuming was not asked for."""

    reason = "RUN_EXISTS"


class RecipeChangedError(RunDirectoryError):
    """The run was started with another recipe, base or data."""

    reason = "RECIPE_CHANGED"


class CheckpointError(RunDirectoryError):
    """Checkpoints are there, but none of them is whole."""

    reason = "CHECKPOINT_DAMAGED"


class StorageError(RunDirectoryError):
    """Something of the run could not be written; the last checkpoint is still whole."""

    reason = "RUN_STORAGE"


class UnreadableRunError(RunDirectoryError):
    """A directory holds no run, or one whose files are damaged."""

    reason = "RUN_UNREADABLE"


class SweepError(TrainerError):
    """A sweep's directory cannot be used as asked, or no trial of it came to its end."""

    reason = "SWEEP"


class WorkersUnavailableError(TrainerError):
    """Several workers were asked for, and what starts them is not installed."""

    reason = "WORKERS_UNAVAILABLE"


class WorkersLostError(TrainerError):
    """Workers ended more often than they may be started again."""

    reason = "WORKERS_LOST"


class DeviceMemoryError(TrainerError):
    """The GPU has too little memory; the last checkpoint is whole."""

    reason = "DEVICE_MEMORY"


class RunInterruptedError(TrainerError):
    """The run was stopped by a signal, after a checkpoint."""

    reason = "RUN_INTERRUPTED"


class AdaptersStoppedError(TrainerError):
    """One or more adapters stopped early."""

    reason = "ADAPTERS_STOPPED"


class ExportError(TrainerError):
    """An experiment tracker is not installed, or does not take a run."""

    reason = "EXPORT_FAILED"


class NotPublishableError(TrainerError):
    """A run, or a task of it, has nothing to publish."""

    reason = "NOT_PUBLISHABLE"


class BaseFetchError(TrainerError):
    """A packaged base could not be put where it was asked for; nothing was left half done."""

    reason = "BASE_FETCH_FAILED"
