"""Rows of files with one JSON object a line."""

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from manylora_registry.json_objects import distinct
from manylora_trainer.errors import SourceError
from manylora_trainer.files import find_files, open_file, why
from manylora_trainer.mix import Part
from manylora_trainer.sources import Place, Row, bad_row, row_of, runs

MAX_LINE_BYTES = 4 * 1024 * 1024
"""A longer line is a mistake (a file without line ends), not an example."""


@dataclass(frozen=True)
class JsonLines:
    """Files with one JSON object a line; blank lines are skipped.

    A place is the file, the offset of the next line in (decompressed) bytes and its number.
    """

    locations: Sequence[str]

    @property
    def name(self) -> str:
        """The paths."""
        return ", ".join(self.locations)

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the lines of all files."""
        files = find_files(self.locations)
        first, offset, number = _file_place(after, "offset")
        for index in range(first, len(files)):
            yield from _lines(files[index], index, offset, number)
            offset = number = 0

    def divided(self, most: int) -> Sequence[Part]:
        """Several runs of files; one file is one part, as lines are counted from its start."""
        return [
            Part(JsonLines(files), float(len(files)))
            for files in runs(find_files(self.locations), most)
        ]


def _file_place(after: Place | None, within: str) -> tuple[int, int, int]:
    if after is None:
        return 0, 0, 0
    return int(after["file"]), int(after[within]), int(after["row"])


def _lines(file: str, index: int, offset: int, number: int) -> Iterator[Row]:
    """Streams one file from `offset` on, which is the place after line `number`."""
    before = max(offset - 1, 0)
    try:
        with open_file(file, offset=before) as raw, io.BufferedReader(raw, 1 << 20) as lines:
            if offset and not _stands_behind_a_line(lines):
                raise SourceError(
                    f"{file} is not as it was: behind row {number}, where this run goes on, no "
                    "line ends; put the file back, or begin a new run"
                )
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                offset += len(line)
                too_long = len(line) > MAX_LINE_BYTES
                while too_long and line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
                    offset += len(line)
                after = {"file": index, "offset": offset, "row": number}
                if too_long:
                    yield bad_row(file, number, f"longer than {MAX_LINE_BYTES >> 20} MiB", after)
                    continue
                if number == 1:
                    # Before the first line of files from some editors.
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _parse(file, number, line, after)
    except OSError as error:
        where = "" if number == 0 else f" behind row {number}"
        raise SourceError(f"{file} cannot be read{where}: {why(error)}") from error


def _stands_behind_a_line(lines: io.BufferedReader) -> bool:
    """Passes over one byte, which ends a line as long as the file is what it was."""
    last = lines.read(1)
    # The last line of all may have no end, or have got one since.
    return last in (b"\n", b"") or lines.peek(1)[:1] in (b"\r", b"\n", b"")


def _parse(file: str, number: int, line: bytes, after: Place) -> Row:
    try:
        value: Any = json.loads(line.decode(), object_pairs_hook=distinct)
    except UnicodeDecodeError as error:
        return bad_row(file, number, f"not UTF-8: {error.reason} at byte {error.start}", after)
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
        if number == 1 and line.lstrip().startswith(b"["):
            problem = "not an object: the file is a JSON array; write one object a line instead"
        return bad_row(file, number, problem, after)
    return row_of(file, number, value, after)
