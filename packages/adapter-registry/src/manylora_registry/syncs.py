"""Waiting until bytes and names are on disk, several at a time.

A file system writes one entry in its journal for whoever waits at the same moment, so syncs that
need no order among each other are made together.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

AT_ONCE = 4


class Syncs:
    """Brings files and directories to disk in the background; a context manager."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._begun: dict[Path, Future[None]] = {}

    def begin(self, path: Path) -> None:
        """Begins with a path, unless that was begun since the last `wait`."""
        if path not in self._begun:
            self._begun[path] = self._threads.submit(sync, path)

    def wait(self) -> None:
        """Returns when all that was begun is on disk.

        Raises:
            OSError: something cannot be written.
        """
        begun = [*self._begun.values()]
        self._begun.clear()
        for one in begun:
            one.result()

    def __enter__(self) -> "Syncs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)


def sync(path: Path) -> None:
    """Waits until the file's content, or the directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
