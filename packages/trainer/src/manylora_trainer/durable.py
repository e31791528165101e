"""Writes that a crash at any moment leaves either whole or absent."""

# safetensors' torch half is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import errno
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manylora_trainer.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

STORAGE_FAULTS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENOTDIR,
    }
)
"""What a disk or a directory can have against being written."""


@contextmanager
def stating_storage_faults(path: Path, how_to_resume: str) -> Generator[None]:
    """States it as one line with what to do, when something of the run cannot be written.

    Raises:
        StorageError: instead of the OSError of a write inside the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        raise StorageError(
            f"{path} cannot be written ({error.strerror}: {error.filename or path}). What was "
            "finished and the last checkpoint are whole: make room or give write access, then go "
            f"on with: {how_to_resume}"
        ) from error


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

    Files are on disk before the name appears. What had that name is removed first.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    except OSError:
        # A disk that is full should not stay so for half a directory.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(temporary)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    temporary.rename(path)
    sync_directory(path.parent)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Writes a safetensors file.

    Raises:
        OSError: as any other write; safetensors has an error of its own for it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(kept, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
