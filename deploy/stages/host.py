"""The process of a stage's gateway: `manylora serve` that keeps in a file where it serves.

`python -m deploy.stages.host GATEWAY_FILE RECORD ENGINE LOCK STARTING`; the last two are
descriptors of the locks it inherits, see hosting.py.
"""

import importlib
import io
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from deploy.stages import files
from manylora_cli.main import is_stated

ADDRESSES = {"grpc": "inference", "admin": "admin", "http": "http"}
"""What the ready line calls them, and what the record does."""


class ReadyLine(io.TextIOBase):
    """Passes on what is printed; keeps what the ready line says and lets the waiting go on."""

    def __init__(self, record: Path, process: dict[str, Any], starting: int) -> None:
        self._record, self._process, self._starting = record, process, starting
        self._out = sys.stdout
        self._line = ""

    def write(self, text: str) -> int:
        """Prints `text`."""
        self._out.write(text)
        self._line += text
        *lines, self._line = self._line.split("\n")
        for line in lines:
            if line.startswith("ready "):
                said = dict(word.split("=", 1) for word in line.split() if "=" in word)
                found = {name: said[word] for word, name in ADDRESSES.items() if word in said}
                files.write_json(self._record, {**self._process, **found})
                os.close(self._starting)
        return len(text)

    def flush(self) -> None:
        """Has it printed."""
        self._out.flush()


def main() -> None:
    """Serves until SIGTERM; an error is the last line of the log."""
    gateway, record, engine, lock, starting = sys.argv[1:]
    for descriptor in (int(lock), int(starting)):
        # Not for the processes of Ray and of the engine, which must not outlive the locks.
        os.set_inheritable(descriptor, False)
    process = {"pid": os.getpid(), "began": time.time()}
    files.write_json(Path(record), {**process, "inference": "", "admin": ""})
    from manylora_gateway.serve import serve

    make_engine = None
    if engine:
        module, _, function = engine.partition(":")
        make_engine = getattr(importlib.import_module(module), function)
    try:
        with redirect_stdout(ReadyLine(Path(record), process, int(starting))):
            serve(Path(gateway), make_engine=make_engine)
    except Exception as error:
        if not is_stated(error):
            raise
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
