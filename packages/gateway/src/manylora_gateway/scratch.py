"""The directory of one gateway's run: Ray's files, and copies of adapters.

A gateway that was killed leaves its own behind, gigabytes of it, for the next one to remove. A lock
on the directory, which ends with its process however that ends, tells it from one in use.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "manylora-g-"
"""Short: sockets, whose paths may have 107 bytes, are far below."""

logger = logging.getLogger(__name__)


@contextmanager
def scratch_directory(parent: Path) -> Generator[Path, None, None]:
    """A new directory in `parent`, gone with the context; first removes abandoned ones."""
    for path in parent.glob(f"{PREFIX}*"):
        _remove_if_abandoned(path)
    path, lock = _made(parent)
    try:
        yield path
    finally:
        remove(path)
        os.close(lock)


def remove(path: Path) -> None:
    """Removes such a directory.

    Before the processes that use it are ended, too: where this one is a child of init, Ray ends it
    as soon as its raylet is gone.
    """
    shutil.rmtree(path, ignore_errors=True)


def _made(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = _opened(path)
        except FileNotFoundError:
            continue
        # Where a file system has no locks, nobody can take it for abandoned either.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another gateway may have taken it for abandoned before the lock was there.
        if os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def _remove_if_abandoned(path: Path) -> None:
    try:
        lock = _opened(path)
    except OSError:
        # Gone, another user's, or no directory.
        return
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        logger.info("removing %s, which a gateway that was killed left behind", path)
        remove(path)
    except OSError:
        # In use, or a file system without locks.
        return
    finally:
        os.close(lock)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
