"""Small files that are whole or absent, and locks that die with their holder."""

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from deploy.stages.errors import DamagedError, UnwritableError

Content = TypeVar("Content")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replaces `file`, so that a crash leaves the old or the new one.

    Raises:
        UnwritableError: the disk is full, say; the old one is left.
    """
    fresh = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(file)
        _sync(file.parent)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise UnwritableError(file, error) from error


def read_json(file: Path, form: TypeAdapter[Content]) -> Content | None:
    """What `file` holds; None where there is none.

    Raises:
        DamagedError: something else than these scripts wrote it.
    """
    try:
        return form.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedError(file) from error


def remove(file: Path) -> None:
    """Removes `file`, if it is there, for good."""
    file.unlink(missing_ok=True)
    if file.parent.is_dir():
        _sync(file.parent)


def open_lock(file: Path) -> int:
    """A descriptor to lock `file` by; the lock belongs to it and to what inherits it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Takes a lock once nobody has it, or once nobody has it alone."""
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(descriptor: int) -> bool:
    """Takes a lock if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(file: Path) -> Generator[bool]:
    """Holds the lock of `file` while the block lasts; False where another process has it."""
    descriptor = open_lock(file)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def waited_for(file: Path) -> Generator[None]:
    """Holds the lock of `file` while the block lasts, once nobody else has it."""
    descriptor = open_lock(file)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_locked(file: Path) -> bool:
    """Whether a living process holds the lock of `file`."""
    if not file.exists():
        return False
    descriptor = open_lock(file)
    try:
        # Shared: two that look at once do not take each other for its holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
