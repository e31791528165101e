"""Content-addressed bytes: a blob is found by the sha256 of its content and never changes.

In a local store a blob is written as restic writes a pack: into a private staging directory while
hashing, synced, renamed to its final name, and then the directories are synced. So a blob that
can be seen is whole, and a blob that was acknowledged survives a power cut. `s3_store` promises
the same over the S3 API.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
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

from manylora_registry.errors import BlobStoreError, CorruptBlobError, RegistryLocationError

CHUNK_BYTES = 1 << 20
READ_ATTEMPTS = 3
"""How often bytes that do not match their digest are read again: a wire may err once, a disk that
errs always is told from it by the last attempt."""


class BlobSource(Protocol):
    """Where blobs are read from. Digests are `sha256:` and 64 hexadecimal digits."""

    def open(self, digest: str) -> BufferedIOBase:
        """The blob's bytes, not yet verified: see `copy_verified` and `read_verified`.

        Raises:
            CorruptBlobError: it is not there.
        """
        ...


class BlobStore(BlobSource, Protocol):
    """Where blobs lie.

    Safe to share by threads and processes. Every method may raise BlobStoreError, for a store
    that cannot be reached or refuses.
    """

    def staging(self) -> AbstractContextManager[Path]:
        """A private empty directory for files on their way into the store; removed at the end.

        An OSError inside of it, such as a full disk, comes out as BlobStoreError.
        """
        ...

    def put(self, file: Path, digest: str) -> None:
        """Takes over a staged file whose sha256 is `digest`; durable when this returns.

        A blob that is there already is replaced by the same bytes, which heals a damaged one.
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


def open_blob_store(url: str) -> BlobStore:
    """The store at `file:///DIRECTORY` or `s3://BUCKET[/PREFIX]`.

    Credentials, region and endpoint of S3 come from where boto3 looks for them:
    `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `~/.aws/config` …

    Raises:
        RegistryLocationError: `url` is neither, or S3 is not installed.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return LocalBlobStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not (parts.query or parts.fragment):
        try:
            from manylora_registry.s3_store import S3BlobStore
        except ModuleNotFoundError as error:
            raise RegistryLocationError(
                "blobs in a bucket need boto3: install manylora-registry[s3]"
            ) from error
        return S3BlobStore(parts.netloc, parts.path.strip("/"))
    raise RegistryLocationError(
        "the URL of the registry's blobs must be file:///DIRECTORY or s3://BUCKET/PREFIX"
    )


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
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with target.open("xb") as out:
        while count := source.readinto(buffer):
            size += count
            if size > limit:
                return Copied("", limit + 1)
            digest.update(buffer[:count])
            out.write(buffer[:count])
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
        directory = self._incoming / uuid.uuid4().hex
        with _flock(self._incoming, fcntl.LOCK_SH):
            directory.mkdir(mode=0o700)
            owned = os.open(directory, os.O_RDONLY)
            fcntl.flock(owned, fcntl.LOCK_EX)
        try:
            yield directory
        except OSError as error:
            raise BlobStoreError(
                f"{self._incoming.parent} cannot be written: {error.strerror}"
            ) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(owned)

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
        path = self._path(digest)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync(path.parent)

    def set_aside(self, digest: str) -> None:
        """See `BlobStore`."""
        path = self._path(digest)
        self._damaged.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.replace(self._damaged / path.name)
            for directory in (self._damaged, path.parent, self._damaged.parent):
                sync(directory)

    def sweep(self, unused: timedelta) -> int:
        """See `BlobStore`; a publisher holds a lock on its directory while it lives."""
        if not self._incoming.is_dir():
            return 0
        latest = time.time() - unused.total_seconds()
        count = 0
        # Alone here, no publisher is between making its directory and locking it.
        with _flock(self._incoming, fcntl.LOCK_EX):
            for directory in self._incoming.iterdir():
                with (
                    contextlib.suppress(BlockingIOError, FileNotFoundError),
                    _flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB),
                ):
                    if directory.stat().st_mtime <= latest:
                        shutil.rmtree(directory)
                        count += 1
        return count

    def _path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._blobs / name[:2] / name


def sync(path: Path) -> None:
    """Waits until the file's content, or the directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _flock(path: Path, mode: int) -> Generator[None]:
    """Holds an advisory lock on a directory; the kernel drops it when the process dies."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, mode)
        yield
    finally:
        os.close(handle)
