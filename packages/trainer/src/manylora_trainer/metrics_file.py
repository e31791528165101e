"""metrics.jsonl of a run: losses of every step, and the lock that keeps other processes out."""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from manylora_trainer.errors import RunDirectoryError

LOCK_ATTEMPTS = 5
LOCK_SECONDS = 0.02


class MetricsFile:
    """metrics.jsonl: one object a line, cut back to the checkpoint when a run is resumed."""

    def __init__(self, path: Path) -> None:
        """Opens the file and keeps other processes from the run until it is closed.

        Raises:
            RunDirectoryError: another process is training into the same run.
        """
        self._path = path
        self._file = path.open("ab")
        if not self._lock():
            self._file.close()
            raise RunDirectoryError(f"{path.parent} is being trained by another process")

    def cut(self, length: int) -> None:
        """Keeps the first `length` bytes.

        Raises:
            RunDirectoryError: they are damaged.
        """
        if self._file.tell():
            _check_metrics(self._path, length)
            self._file.truncate(length)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Adds one line with the time, readable at once by who follows the file."""
        stamped = {**entry, "time": round(time.time(), 3)}
        self._file.write(json.dumps(stamped).encode() + b"\n")
        self._file.flush()

    def _lock(self) -> bool:
        # Whoever looks whether the run is under way holds the lock for an instant.
        for _ in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_SECONDS)
            else:
                return True
        return False

    def sync(self) -> int:
        """Puts all lines on disk; returns the length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Closes the file, and lets other processes have the run."""
        # Each line was flushed; one that could not be has been told of.
        with suppress(OSError):
            self._file.close()


class NoMetrics:
    """Metrics of a worker whose neighbour writes them."""

    def cut(self, length: int) -> None:
        """Keeps nothing."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def sync(self) -> int:
        """Puts nothing on disk."""
        return 0

    def close(self) -> None:
        """Closes nothing."""


def _check_metrics(path: Path, length: int) -> None:
    """Before a run trains on: at its end the curves would find out."""
    kept = path.read_bytes()[:length]
    try:
        if len(kept) < length:
            raise ValueError("it is shorter than when the checkpoint was written")
        for line in kept.splitlines():
            _ = [json.loads(line)[key] for key in ("step", "task")]
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged ({error}): put it back from a copy, or remove it to go on without "
            "the losses so far"
        ) from error
