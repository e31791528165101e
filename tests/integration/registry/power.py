"""What a disk may hold after a power cut: a file system that forgets what was not synced.

Fed with the calls that crash.c traced. POSIX promises a file's bytes after its fsync, and a name
after the fsync of its directory, and nothing before. Of all that may be left, the two extremes:

- `nothing more`: what was not synced is gone, bytes and names alike;
- `names only`: names are there, as a journal of metadata keeps them, bytes that were not synced
  are not.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class File:
    written: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass
class Directory:
    entries: "dict[str, File | Directory]" = field(default_factory=dict)
    synced: "dict[str, File | Directory]" = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One line of a trace."""

    name: str
    path: str
    target: str
    offset: int
    data: bytes


def read_trace(file: Path) -> Iterator[Call]:
    content = file.read_bytes()
    position = 0
    while position < len(content):
        end = content.index(b"\n", position)
        name, path, target, offset, size = content[position:end].decode().split("\t")
        position = end + 1 + int(size)
        yield Call(name, path, target, int(offset), content[end + 1 : position])


class Disk:
    """A tree below one directory, which begins as durable as `content` is."""

    def __init__(self, root: str, content: Path | None) -> None:
        self._root = root
        self._top = _loaded(content) if content else Directory()

    def do(self, call: Call) -> None:
        """What the call does; one that failed does nothing here either."""
        parent, name = self._parent(call.path)
        node = parent.entries.get(name) if name else self._top
        match call.name:
            case "open" | "truncated":
                found = parent.entries.setdefault(name, File())
                if call.name == "truncated" and isinstance(found, File):
                    found.written.clear()
            case "mkdir":
                parent.entries.setdefault(name, Directory())
            case "write" if isinstance(node, File):
                end = call.offset + len(call.data)
                node.written.extend(bytes(max(0, end - len(node.written))))
                node.written[call.offset : end] = call.data
            case "truncate" if isinstance(node, File):
                del node.written[call.offset :]
                node.written.extend(bytes(call.offset - len(node.written)))
            case "fsync" if isinstance(node, File):
                node.synced = bytes(node.written)
            case "fsync" if isinstance(node, Directory):
                node.synced = dict(node.entries)
            case "unlink" | "rmdir":
                parent.entries.pop(name, None)
            case "rename" if node is not None:
                to, new = self._parent(call.target)
                to.entries[new] = parent.entries.pop(name)

    def left(self, how: str) -> dict[str, bytes | None]:
        """Paths and bytes after a power cut; None for a directory."""
        found: dict[str, bytes | None] = {}

        def walk(directory: Directory, prefix: str) -> None:
            entries = directory.synced if how == "nothing more" else directory.entries
            for name, node in entries.items():
                # Rebuilt by SQLite, and mapped into memory: its writes are not traced.
                if name.endswith("-shm"):
                    continue
                found[prefix + name] = node.synced if isinstance(node, File) else None
                if isinstance(node, Directory):
                    walk(node, f"{prefix}{name}/")

        walk(self._top, "")
        return found

    def _parent(self, path: str) -> tuple[Directory, str]:
        steps = path.removeprefix(self._root).strip("/").split("/")
        directory = self._top
        for step in steps[:-1]:
            below = directory.entries.get(step)
            directory = below if isinstance(below, Directory) else Directory()
        return directory, steps[-1]


def write_tree(tree: dict[str, bytes | None], target: Path) -> None:
    """Makes the tree on a real disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path, content in tree.items():
        if content is None:
            (target / path).mkdir()
        else:
            (target / path).write_bytes(content)


def _loaded(directory: Path) -> Directory:
    nodes: dict[str, File | Directory] = {}
    for path in directory.iterdir():
        if path.is_dir():
            nodes[path.name] = _loaded(path)
        else:
            content = path.read_bytes()
            nodes[path.name] = File(bytearray(content), content)
    return Directory(nodes, dict(nodes))
