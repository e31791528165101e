"""Files by path or URI, through pyarrow's file systems: local, `s3://`, `gs://`, `hdfs://`."""

# pyarrow comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manylora_trainer.errors import SourceError
from manylora_trainer.source_settings import is_uri

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""By the end of a file's name, in capitals or not."""


def find_files(locations: Sequence[str]) -> list[str]:
    """The files that paths, globs and URIs name, in order; those of a glob sorted by name.

    Raises:
        SourceError: a glob matches nothing, or a directory cannot be listed.
    """
    found: list[str] = []
    for location in locations:
        matches = _matches(location) if "*" in location else [location]
        if not matches:
            raise SourceError(f"{location} matches no file")
        found += matches
    return found


def open_file(location: str, *, offset: int = 0) -> Any:
    """Opens a file for reading bytes from `offset`, decompressed if its name says it is packed.

    Returns a `pyarrow.NativeFile`. In a compressed file an offset counts decompressed bytes, and
    what stands before it is read once more.

    Raises:
        OSError: it cannot be opened.
    """
    import pyarrow

    file = open_seekable(location)
    compression = COMPRESSIONS.get("." + location.partition("?")[0].rpartition(".")[2].lower())
    if compression is None:
        if offset:
            file.seek(offset)
        return file
    stream = pyarrow.CompressedInputStream(file, compression)
    while offset and (skipped := stream.read(min(offset, 1 << 20))):
        offset -= len(skipped)
    return stream


def open_seekable(location: str) -> Any:
    """Opens a file for reading at any place, as it lies; a `pyarrow.NativeFile`.

    Raises:
        OSError: it cannot be opened.
    """
    import pyarrow

    if not is_uri(location):
        return pyarrow.OSFile(location)
    system, path = _file_system(location)
    return system.open_input_file(path)


def why(error: BaseException) -> str:
    """The reason in an error of a file system or a decoder, on one line."""
    text = re.sub(r"^\[Errno \d+\] ", "", str(error)).strip().partition("\n")[0]
    detail = re.search(r"Detail: (?:\[errno \d+\] )?([^\n]+?)(?: Failed to open|$)", text)
    return detail.group(1) if detail else text or type(error).__name__


def _matches(pattern: str) -> list[str]:
    if not is_uri(pattern):
        return _local_matches(pattern)
    from pyarrow.fs import FileSelector, FileType

    location, question, options = pattern.partition("?")
    scheme, _, path = location.partition("://")
    directory = path[: path.index("*")].rpartition("/")[0]
    try:
        system, root = _file_system(f"{scheme}://{directory}{question}{options}")
        listed = system.get_file_info(FileSelector(root, recursive=True))
    except OSError as error:
        raise SourceError(f"{pattern} cannot be listed: {why(error)}") from error
    wanted = re.compile(_as_regex(path[len(directory) :]))
    return sorted(
        f"{scheme}://{directory}{info.path[len(root) :]}{question}{options}"
        for info in listed
        if info.type == FileType.File and wanted.fullmatch(info.path[len(root) :])
    )


def _local_matches(pattern: str) -> list[str]:
    """Each file once, by its shortest name: links lead round in circles, and to other matches."""
    directory = pattern[: pattern.index("*")].rpartition("/")[0]
    if Path(directory).is_dir():
        # Its name may hold brackets.
        pattern = glob.escape(directory) + pattern[len(directory) :]
    named: dict[str, str] = {}
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute patterns)
    for match in sorted(matches, key=lambda match: (len(match), match)):
        if not Path(match).is_dir():
            named.setdefault(os.path.realpath(match), match)
    return sorted(named.values())


def _as_regex(pattern: str) -> str:
    """`*` within one name, `**/` over any number of directories."""
    parts = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*"}
    return "".join(parts.get(p) or re.escape(p) for p in re.split(r"(\*\*/|\*\*|\*)", pattern))


def _file_system(uri: str) -> tuple[Any, str]:
    """Pyarrow's file system for a URI, and the path within it.

    Raises:
        SourceError: the URI names no file system that is known.
    """
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(uri)
    except ValueError as error:
        raise SourceError(f"{uri.partition('?')[0]}: {why(error)}") from error
