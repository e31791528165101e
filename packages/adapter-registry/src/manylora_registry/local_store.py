"""Blobs in a directory, written as restic writes a pack.

Into a private staging directory while hashing, synced, renamed to their final names, and then the
directories are synced. So a blob that can be seen is whole, and a blob that was acknowledged
survives a power cut.
"""

import contextlib
import errno
import fcntl
import io
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from manylora_registry.blobs import DIGITS, Staging
from manylora_registry.errors import BlobStoreError, CorruptBlobError
from manylora_registry.syncs import Syncs, sync


class LocalBlobStore:
    """Blobs as files `blobs/sha256/ab/<64 hexadecimal digits>` below a directory."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._incoming = root / "incoming"
        self._damaged = root / "damaged"
        self._durable: set[Path] = set()
        """Directories that this process knows to survive a power cut."""

    @contextlib.contextmanager
    def staging(self) -> Generator[Staging]:
        """See `BlobStore`; on the same file system as the blobs, so that `put` is a rename."""
        with self._writing(), self._private_directory() as directory, Syncs() as syncs:
            yield _LocalStaging(directory, self.path, syncs, self._durable)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except IsADirectoryError as error:
            raise BlobStoreError(
                f"{error.filename2 or error.filename} is a directory where a blob belongs: move it "
                "away, then repeat"
            ) from error
        except OSError as error:
            advice = "make room or mend the permissions, then repeat"
            if error.errno == errno.EXDEV:
                advice = "incoming and blobs must lie on one file system: move what lies elsewhere"
            raise BlobStoreError(
                f"the blobs in {self._incoming.parent} cannot be written: {error.strerror}; "
                f"{advice}"
            ) from error

    @contextlib.contextmanager
    def _private_directory(self) -> Generator[Path]:
        """One that `sweep` leaves alone while it is used."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        directory = self._incoming / uuid.uuid4().hex
        with _flock(self._incoming, fcntl.LOCK_SH):
            directory.mkdir(mode=0o700)
            owned = os.open(directory, os.O_RDONLY)
            fcntl.flock(owned, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(owned)

    def open(self, digest: str) -> BufferedIOBase:
        """See `BlobStore`."""
        try:
            # Not to wait for whoever writes to a pipe that was put in a blob's place.
            handle = os.open(self.path(digest), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            # A store that is gone as a whole, moved or not mounted, says nothing of its blobs.
            if not self._blobs.is_dir():
                raise _unreadable(error) from error
            raise CorruptBlobError(digest, "is missing") from error
        except OSError as error:
            # A socket, and a link to itself.
            if error.errno in (errno.ENXIO, errno.ELOOP):
                raise CorruptBlobError(digest, "is no file") from error
            raise _unreadable(error) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise CorruptBlobError(digest, "is no file")
        return io.BufferedReader(_BlobFile(handle, digest))

    def digests(self) -> Iterator[str]:
        """See `BlobStore`."""
        for path in self._blobs.glob("??/*"):
            # What others have put there is none of ours: to count, to hash or to delete.
            if DIGITS.fullmatch(path.name):
                yield f"sha256:{path.name}"

    def size(self, digest: str) -> int:
        """See `BlobStore`."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno == errno.ELOOP:
                return 0
            raise _unreadable(error) from error

    def delete(self, digest: str) -> None:
        """See `BlobStore`."""
        path = self.path(digest)
        with self._writing(), contextlib.suppress(FileNotFoundError):
            try:
                path.unlink()
            except IsADirectoryError:
                # None of ours, so what is in it is not ours to remove.
                self.set_aside(digest)
            sync(path.parent)

    def set_aside(self, digest: str) -> None:
        """See `BlobStore`."""
        path = self.path(digest)
        with self._writing(), contextlib.suppress(FileNotFoundError):
            self._damaged.mkdir(parents=True, exist_ok=True)
            aside = self._damaged / path.name
            if os.path.lexists(aside):
                aside = aside.with_name(f"{path.name}.{uuid.uuid4().hex}")
            path.rename(aside)
            for directory in (self._damaged, path.parent, self._damaged.parent):
                sync(directory)

    def sweep(self, unused: timedelta) -> int:
        """See `BlobStore`; a publisher holds a lock on its directory while it lives."""
        if not self._incoming.is_dir():
            return 0
        latest = time.time() - unused.total_seconds()
        count = 0
        # Alone here, no publisher is between making its directory and locking it.
        with self._writing(), _flock(self._incoming, fcntl.LOCK_EX):
            for directory in self._incoming.iterdir():
                if directory.is_symlink() or not directory.is_dir():
                    # Of somebody else, as what NFS keeps of a file that was removed.
                    continue
                with (
                    contextlib.suppress(BlockingIOError, FileNotFoundError),
                    _flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB),
                ):
                    if directory.stat().st_mtime <= latest:
                        shutil.rmtree(directory)
                        count += 1
        return count

    def path(self, digest: str) -> Path:
        """Where a blob is, if it is there."""
        name = digest.removeprefix("sha256:")
        return self._blobs / name[:2] / name


class _BlobFile(io.FileIO):
    """A stored blob, whose disk may fail in the middle: as damaged as one that differs."""

    def __init__(self, handle: int, digest: str) -> None:
        super().__init__(handle)
        self._digest = digest

    def readinto(self, buffer: Any, /) -> int:
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            raise CorruptBlobError(self._digest, f"cannot be read: {error.strerror}") from error


def _unreadable(error: OSError) -> BlobStoreError:
    return BlobStoreError(f"stored blobs cannot be read: {error.strerror} ({error.filename})")


@dataclass(frozen=True)
class _LocalStaging:
    """See `Staging`."""

    directory: Path
    target: Callable[[str], Path]
    syncs: Syncs
    durable: set[Path]

    def settle(self, file: Path) -> None:
        file.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        self.syncs.begin(file)

    def put(self, files: Mapping[str, Path]) -> None:
        targets = {file: self.target(digest) for digest, file in files.items()}
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.settle(file)
        self.syncs.wait()
        for file, target in targets.items():
            file.replace(target)
        # The levels above up to the registry's root, even if the directory was there: who made it
        # may have died before syncing it. Directories are never removed, so once is enough.
        changed = {target.parent for target in targets.values()}
        found = {level for at in changed for level in (at, *at.parents[:2])} - self.durable
        for directory in {*changed, *(level.parent for level in found)}:
            self.syncs.begin(directory)
        self.syncs.wait()
        self.durable.update(found)


@contextlib.contextmanager
def _flock(path: Path, mode: int) -> Generator[None]:
    """Holds an advisory lock on a directory; the kernel drops it when the process dies."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, mode)
        yield
    finally:
        os.close(handle)
