"""Materialized versions of limited size, shared by the processes of a machine.

Who uses a version holds a shared lock on its lease file, from before it looks for the directory;
who needs room takes the exclusive lock first, so nothing in use is ever removed, and the kernel
drops the locks of the dead. Least recently taken goes first; the lease file's mtime says when.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from manylora_registry.blobs import BlobStore
from manylora_registry.errors import RegistryLocationError
from manylora_registry.manifest import load_manifest
from manylora_registry.materialize import materialize

DIRECTORY_VARIABLE = "MANYLORA_CACHE"
SIZE_VARIABLE = "MANYLORA_CACHE_SIZE"
DEFAULT_BYTES = 20 << 30
LEFTOVER_SECONDS = 24 * 3600
"""A directory that is not whole after this long belongs to a process that died."""
_LEASE = re.compile(r"\.([0-9a-f]{64})\.lease")


@dataclass(frozen=True)
class Cache:
    """A directory of materialized versions.

        cache = Cache(Path("/var/cache/manylora"), limit=5 << 30)
        with registry.hold(version, cache) as directory:
            engine.load(directory)

    Every process that shares the directory must use it through a `Cache`.
    """

    directory: Path
    limit: int = DEFAULT_BYTES
    """Bytes of all versions together, as far as the disk has room. What is in use stays, even where
    that is more."""

    @classmethod
    def from_environment(cls) -> "Cache":
        """`$MANYLORA_CACHE`, else `~/.cache/manylora`; `$MANYLORA_CACHE_SIZE`, e.g. `5GB`, of it.

        Raises:
            RegistryLocationError: the size is none.
        """
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = Path(os.environ.get(DIRECTORY_VARIABLE) or home / "manylora")
        size = os.environ.get(SIZE_VARIABLE)
        try:
            limit = TypeAdapter(ByteSize).validate_python(size) if size else DEFAULT_BYTES
        except ValidationError as error:
            raise RegistryLocationError(
                f"{SIZE_VARIABLE}={size[:40] if size else ''} is no size: write e.g. 5GB"
            ) from error
        return cls(directory, int(limit))

    @contextlib.contextmanager
    def hold(self, blobs: BlobStore, digest: str) -> Generator[Path]:
        """The version's verified directory, there to stay until the block ends.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            BlobStoreError: it cannot be read.
        """
        name = digest.removeprefix("sha256:")
        self.directory.mkdir(parents=True, exist_ok=True)
        made = False
        try:
            with _locked(self._lease(name), fcntl.LOCK_SH) as lease:
                # A kernel's own clock for files may stand still for milliseconds: many of one age.
                now = time.time_ns()
                os.utime(lease, ns=(now, now))
                if not (self.directory / name).is_dir():
                    made = True
                    self._make_room(load_manifest(blobs, digest).size)
                yield materialize(blobs, digest, self.directory)
        finally:
            # What was in use could not go before. Where the cache was taken away or closed to
            # this process meanwhile, nothing of it is this one's to remove.
            with contextlib.suppress(OSError):
                self._make_room(0, unless_kept=not made)

    def size(self) -> int:
        """Bytes of the versions that are there."""
        return sum(_size(self.directory / name) for name, _ in self._leases())

    def _make_room(self, needed: int, *, unless_kept: bool = False) -> None:
        """Removes versions nobody uses, the one longest unused first, until `needed` bytes fit.

        Args:
            needed: bytes that are about to come.
            unless_kept: do nothing where the last look left no more than the limit. A look at
                thousands of versions takes longer than loading one.
        """
        with _locked(self.directory / ".room", fcntl.LOCK_EX) as room:
            if unless_kept and self._kept(os.pread(room, 32, 0)):
                return
            excess = self._remove_unused(needed)
            os.ftruncate(room, 0)
            # A full disk may not even take this: then the next one looks again.
            with contextlib.suppress(OSError):
                os.pwrite(room, b"" if excess > 0 else b"%d" % self.limit, 0)

    def _kept(self, limit: bytes) -> bool:
        """Whether `limit`, which the last look left, is one and no more than this one."""
        return limit.isdigit() and int(limit) <= self.limit

    def _remove_unused(self, needed: int) -> int:
        """Bytes that are still too many then."""
        self._sweep()
        leases = sorted(self._leases(), key=lambda lease: lease[1])
        sizes = {name: _size(self.directory / name) for name, _ in leases}
        free = shutil.disk_usage(self.directory).free
        # The disk may be full before the limit is reached.
        excess = max(sum(sizes.values()) + needed - self.limit, needed - free)
        for name, _ in leases:
            if excess <= 0:
                break
            if self._remove(name):
                excess -= sizes[name]
        return excess

    def _remove(self, name: str) -> bool:
        """Whether nobody used the version, which is gone then."""
        try:
            with _locked(self._lease(name), fcntl.LOCK_EX | fcntl.LOCK_NB):
                target = self.directory / name
                if target.exists():
                    aside = self.directory / f".{uuid.uuid4().hex}.wrong"
                    target.rename(aside)
                    shutil.rmtree(aside, ignore_errors=True)
                (self.directory / f".{name}.verified").unlink(missing_ok=True)
                self._lease(name).unlink()
        except BlockingIOError:
            return False
        return True

    def _sweep(self) -> None:
        """Removes what processes that died left half made or half removed."""
        latest = time.time() - LEFTOVER_SECONDS
        for path in [*self.directory.glob(".*.wrong"), *self.directory.glob(".*.partial")]:
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".wrong" or path.stat().st_mtime < latest:
                    shutil.rmtree(path, ignore_errors=True)

    def _leases(self) -> Iterator[tuple[str, int]]:
        """Each version there is, or is being made, and when it was last taken."""
        for path in self.directory.glob(".*.lease"):
            if match := _LEASE.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    yield match[1], path.stat().st_mtime_ns

    def _lease(self, name: str) -> Path:
        return self.directory / f".{name}.lease"


@contextlib.contextmanager
def _locked(file: Path, mode: int) -> Generator[int]:
    """Holds a lock on `file`, made if it is new, and on no file that was unlinked meanwhile.

    Raises:
        BlockingIOError: the mode says not to wait, and another holds it.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, mode)
            if _is(handle, file):
                yield handle
                return
        finally:
            os.close(handle)


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _size(directory: Path) -> int:
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory))
    except FileNotFoundError:
        return 0
