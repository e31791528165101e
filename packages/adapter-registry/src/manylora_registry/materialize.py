"""Versions as directories an engine can read: content-addressed, whole, verified, never changed.

Rule for a directory that is already there: it is trusted while size, inode, mtime and ctime of
each of its files are what they were when its digests were last verified (the kernel moves ctime
at every change, and no call sets it back). Otherwise it is hashed again, and replaced if wrong.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import TextIO

from manylora_registry.blobs import BlobStore, copy_verified, hash_file
from manylora_registry.manifest import Manifest, load_manifest
from manylora_registry.syncs import Syncs, sync


def materialize(blobs: BlobStore, digest: str, directory: Path) -> Path:
    """Makes `directory/<hexadecimal digest>/` with the version's files and returns it.

    Any number of processes may ask for the same version at the same time: one copies, the others
    wait for it. A process that dies leaves at most a hidden directory nobody reads.

    Raises:
        CorruptBlobError: a stored blob is damaged; nothing is left behind.
    """
    name = digest.removeprefix("sha256:")
    target = directory / name
    verified = directory / f".{name}.verified"
    if _stamp(target) == _read(verified) is not None:
        return target
    manifest = load_manifest(blobs, digest)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(verified) as stamp:
        if not _is_right(target, manifest):
            _discard(target)
            with _written(blobs, manifest, directory) as whole:
                whole.rename(target)
            sync(directory)
        stamp.truncate(0)
        stamp.write(_stamp(target) or "")
    return target


@contextlib.contextmanager
def _written(blobs: BlobStore, manifest: Manifest, parent: Path) -> Generator[Path]:
    """A hidden directory below `parent` with all files, verified and synced, to be renamed."""
    directory = parent / f".{uuid.uuid4().hex}.partial"
    directory.mkdir()
    try:
        with Syncs() as syncs:
            for file in manifest.files:
                copy_verified(blobs, file.digest, file.size, directory / file.title)
                (directory / file.title).chmod(0o444)
                syncs.begin(directory / file.title)
            syncs.begin(directory)
            syncs.wait()
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path) -> Generator[TextIO]:
    """`file`, opened to be rewritten, with no other process or thread doing the same."""
    with file.open("a+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened


def _is_right(target: Path, manifest: Manifest) -> bool:
    """Whether `target` holds exactly the manifest's files, by their digests."""
    try:
        if {path.name for path in target.iterdir()} != {file.title for file in manifest.files}:
            return False
        for file in manifest.files:
            path = target / file.title
            if path.is_symlink() or path.stat().st_size != file.size:
                return False
            if hash_file(path) != file.digest:
                return False
    except OSError:
        return False
    return True


def _discard(target: Path) -> None:
    """Moves a wrong directory out of the way before deleting it: a name is whole or absent."""
    aside = target.with_name(f".{uuid.uuid4().hex}.wrong")
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _stamp(target: Path) -> str | None:
    """What changes when a file of the directory does; nothing where there is no directory."""
    try:
        entries = sorted(os.scandir(target), key=lambda entry: entry.name)
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return None
    return json.dumps(
        [[name, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns] for name, at in stats]
    )


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
