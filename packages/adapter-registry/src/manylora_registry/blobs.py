"""Content-addressed bytes: a blob is found by the sha256 of its content and never changes.

A blob is written as restic writes a pack: into a private staging directory while hashing, synced,
renamed to its final name, and then the directories are synced. So a blob that can be seen is
whole, and a blob that was acknowledged survives a power cut.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from io import BufferedIOBase
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from manylora_registry.errors import CorruptBlobError, RegistryLocationError

CHUNK_BYTES = 1 << 20


class BlobStore(Protocol):
    """Where blobs lie. Digests are `sha256:` and 64 hexadecimal digits."""

    def staging(self) -> AbstractContextManager[Path]:
        """A private empty directory for files on their way into the store; removed at the end."""
        ...

    def put(self, file: Path, digest: str) -> None:
        """Takes over a staged file whose sha256 is `digest`; durable when this returns.

        A blob that is there already is replaced by the same bytes, which heals a damaged one.
        """
        ...

    def open(self, digest: str) -> BufferedIOBase:
        """The blob's bytes, not yet verified.

        Raises:
            CorruptBlobError: it is not there.
        """
        ...

    def digests(self) -> Iterator[str]:
        """Every blob in the store."""
        ...

    def size(self, digest: str) -> int:
        """Bytes of a blob; 0 where there is none."""
        ...

    def delete(self, digest: str) -> None:
        """Removes a blob; one that is gone already is fine."""
        ...

    def set_aside(self, digest: str) -> None:
        """Takes a damaged blob out of the store and keeps its bytes for whoever examines them."""
        ...

    def sweep(self, unused: timedelta) -> int:
        """Removes what killed processes left in staging that long ago; how many there were."""
        ...


def open_blob_store(url: str) -> BlobStore:
    """The blob store at `url`.

    Raises:
        RegistryLocationError: it is no URL of a blob store.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and len(parts.path) > 1:
        return LocalBlobStore(Path(unquote(parts.path)))
    raise RegistryLocationError("the URL of the registry's blobs must be file:///DIR")


@dataclass(frozen=True)
class Copied:
    """What `copy_hashed` wrote."""

    digest: str
    size: int


def copy_hashed(source: BufferedIOBase, target: Path, limit: int | None = None) -> Copied:
    """Copies `source` to the new file `target`, hashing on the way, in constant memory.

    Stops after `limit` bytes, then `size` is `limit` + 1: the caller knows that there was more.
    """
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with target.open("xb") as out:
        while count := source.readinto(buffer):
            size += count
            if limit is not None and size > limit:
                return Copied("", limit + 1)
            digest.update(buffer[:count])
            out.write(buffer[:count])
    return Copied(f"sha256:{digest.hexdigest()}", size)


def hash_file(path: Path) -> str:
    """The digest of a file's content, read in constant memory."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def read_verified(blobs: BlobStore, digest: str, limit: int) -> bytes:
    """A small blob, read whole.

    Raises:
        CorruptBlobError: it is missing, longer than `limit` bytes, or not what its digest says.
    """
    with blobs.open(digest) as file:
        content = file.read(limit + 1)
    if len(content) > limit or f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise CorruptBlobError(digest, "does not match its digest")
    return content


class LocalBlobStore:
    """Blobs as files `blobs/sha256/ab/<64 hexadecimal digits>` below a directory."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._incoming = root / "incoming"
        self._damaged = root / "damaged"

    @contextlib.contextmanager
    def staging(self) -> Generator[Path]:
        """See `BlobStore`; on the same file system as the blobs, so that `put` is a rename."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        directory, lock = _locked_directory(self._incoming)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)

    def put(self, file: Path, digest: str) -> None:
        """See `BlobStore`."""
        target = self._path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        sync(file)
        file.replace(target)
        # Every level, every time: one who made a directory may have died before syncing it.
        for directory in (target.parent, self._blobs, self._blobs.parent):
            sync(directory)

    def open(self, digest: str) -> BufferedIOBase:
        """See `BlobStore`."""
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError as error:
            raise CorruptBlobError(digest, "is missing") from error

    def digests(self) -> Iterator[str]:
        """See `BlobStore`."""
        for path in self._blobs.glob("??/*"):
            yield f"sha256:{path.name}"

    def size(self, digest: str) -> int:
        """See `BlobStore`."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def delete(self, digest: str) -> None:
        """See `BlobStore`."""
        self._path(digest).unlink(missing_ok=True)

    def set_aside(self, digest: str) -> None:
        """See `BlobStore`: it becomes `damaged/<64 hexadecimal digits>`."""
        self._damaged.mkdir(exist_ok=True)
        path = self._path(digest)
        with contextlib.suppress(FileNotFoundError):
            path.replace(self._damaged / path.name)
            sync(self._damaged)

    def sweep(self, unused: timedelta) -> int:
        """See `BlobStore`: a staging directory is left over when nobody holds its lock."""
        swept = 0
        for directory in self._incoming.glob("*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                lock = os.open(directory, os.O_RDONLY)
                try:
                    age = time.time() - os.fstat(lock).st_mtime
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if age >= unused.total_seconds():
                        shutil.rmtree(directory)
                        swept += 1
                finally:
                    os.close(lock)
        return swept

    def _path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._blobs / name[:2] / name


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """A new directory with its lock held: `sweep` knows by it that somebody is at work there."""
    while True:
        directory = parent / uuid.uuid4().hex
        directory.mkdir(mode=0o700)
        # A sweep between these two calls may have had the lock first.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(directory, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return directory, lock
            os.close(lock)


def sync(path: Path) -> None:
    """Waits until the file's content, or the directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
