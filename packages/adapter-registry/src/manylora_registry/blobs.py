"""Content-addressed bytes: a blob is found by the sha256 of its content and never changes.

In every store a blob that can be seen is whole, and a blob that was acknowledged survives a power
cut.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from io import BufferedIOBase
from pathlib import Path
from typing import Protocol

from manylora_registry.errors import BlobStoreError, CorruptBlobError

Progress = Callable[[str, int, int], None]
"""Is told what is being done with blobs, with how many it is done, and of how many."""
CHUNK_BYTES = 1 << 20
DIGITS = re.compile(r"[0-9a-f]{64}")
"""How a store names a blob."""
READ_ATTEMPTS = 3
"""How often bytes that do not match their digest are read again: a wire may err once, a disk that
errs always is told from it by the last attempt."""


def untold(_what: str, _done: int, _total: int) -> None:
    """The progress nobody asked for."""


class BlobSource(Protocol):
    """Where blobs are read from. Digests are `sha256:` and 64 hexadecimal digits."""

    def open(self, digest: str) -> BufferedIOBase:
        """The blob's bytes, not yet verified: see `copy_verified` and `read_verified`.

        Raises:
            CorruptBlobError: it is not there.
        """
        ...


class Staging(Protocol):
    """A private directory for files on their way into a store."""

    @property
    def directory(self) -> Path:
        """Empty at first."""
        ...

    def settle(self, file: Path, /) -> None:
        """Begins to bring a file that is not written any more to disk, should `put` need that.

        Returns at once: the file can be read and checked meanwhile.
        """
        ...

    def put(self, files: Mapping[str, Path]) -> None:
        """Takes over staged files, each by its digest; durable when this returns.

        A blob that is there already is replaced by the same bytes, which heals a damaged one.
        """
        ...


class BlobStore(BlobSource, Protocol):
    """Where blobs lie.

    Safe to share by threads and processes. Every method may raise BlobStoreError, for a store
    that cannot be reached or refuses.
    """

    def staging(self) -> AbstractContextManager[Staging]:
        """A place for files on their way into the store; removed at the end.

        An OSError inside of it, such as a full disk, comes out as BlobStoreError.
        """
        ...

    def digests(self) -> Iterator[str]:
        """Every blob in the store."""
        ...

    def size(self, digest: str) -> int:
        """Bytes of a blob; 0 where there is none."""
        ...

    def delete(self, digest: str) -> None:
        """Removes a blob, durably; one that is gone already is fine."""
        ...

    def set_aside(self, digest: str) -> None:
        """Takes a damaged blob out of the store but keeps its bytes below `damaged/`, to look at.

        One that is gone already is fine.
        """
        ...

    def sweep(self, unused: timedelta) -> int:
        """Removes what publishers that died that long ago left behind; how many there were."""
        ...


@contextlib.contextmanager
def temporary_directory() -> Generator[Path]:
    """A private directory of this machine's, removed at the end.

    Raises:
        BlobStoreError: what the block writes finds no room there, or may not be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="manylora-") as directory:
            yield Path(directory)
    except OSError as error:
        raise BlobStoreError(
            f"{tempfile.gettempdir()} cannot be written: {error.strerror}; set TMPDIR"
        ) from error


@dataclass(frozen=True)
class Copied:
    """What `copy_hashed` wrote."""

    digest: str
    size: int


def copy_hashed(source: BufferedIOBase, target: Path, limit: int) -> Copied:
    """Copies `source` to the new file `target`, hashing on the way, in constant memory.

    Stops after `limit` bytes, then `size` is `limit` + 1: the caller knows that there was more.
    """
    digest = hashlib.sha256()
    size = 0
    # One is hashed, by another thread, while the other is filled: hashing takes as long as copying.
    buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)]
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(1) as hasher, target.open("xb", buffering=0) as out:
        while count := source.readinto(buffers[0]):
            size += count
            if size > limit:
                return Copied("", limit + 1)
            chunk = buffers[0][:count]
            before, hashed = hashed, hasher.submit(digest.update, chunk)
            written = 0
            while written < count:
                written += out.write(chunk[written:])
            if before:
                before.result()
            buffers.reverse()
        if hashed:
            hashed.result()
    return Copied(f"sha256:{digest.hexdigest()}", size)


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file, never through a link and never waiting for a pipe to be written.

    Raises:
        OSError: it is no regular file, or it cannot be read; `strerror` says so in words.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise OSError(error.errno, what, str(path)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def hash_file(path: Path) -> str:
    """The digest of a file's content, read in constant memory."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def read_verified(blobs: BlobSource, digest: str, limit: int) -> bytes:
    """A small blob, read whole.

    Raises:
        CorruptBlobError: it is missing, longer than `limit` bytes, or not what its digest says.
    """
    for _ in range(READ_ATTEMPTS):
        with blobs.open(digest) as file:
            content = file.read(limit + 1)
        if len(content) <= limit and f"sha256:{hashlib.sha256(content).hexdigest()}" == digest:
            return content
    raise CorruptBlobError(digest, "does not match its digest")


def copy_verified(blobs: BlobSource, digest: str, size: int, target: Path) -> None:
    """Writes a blob of `size` bytes to the new file `target`, hashing on the way.

    Raises:
        CorruptBlobError: it is missing or not what its digest says; there is no `target` then.
    """
    for _ in range(READ_ATTEMPTS):
        try:
            with blobs.open(digest) as source:
                copied = copy_hashed(source, target, limit=size)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        if (copied.digest, copied.size) == (digest, size):
            return
        target.unlink()
    raise CorruptBlobError(digest, "does not match its digest")
