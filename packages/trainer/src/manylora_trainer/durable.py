"""Writes that a crash at any moment leaves either whole or absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Replaces `path` by a file with this content."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes the directory `path` with the files that `fill` writes into the path it is given.

    Files are on disk before the name appears. A directory of that name is removed first.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for file in temporary.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
