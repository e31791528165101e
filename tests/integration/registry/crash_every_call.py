"""Does one thing to copies of a registry, killed at its first, second, third … file-system call.

Run with crash.c preloaded: `crash_every_call.py DIRECTORY ACTION ADAPTER torn|whole|unkilled`.
Copies DIRECTORY/prepared, where there is one, to DIRECTORY/0, 1, …; prints how many died. The last
one, DIRECTORY/survivor, was not killed. The calls each made are in N.calls beside it, and what
they did to the disk in N.calls.trace.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import alembic.command  # noqa: F401  (imported once here and not again by every child)

from manylora_registry import BaseModelIdentity, registry

DIRECTORY, ACTION, ADAPTER = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
TORN = sys.argv[4] == "torn"
BASE_FILE = DIRECTORY / "base.json"


def act(place: Path, arm) -> None:
    """What is interrupted; a copy of the registry is in `place`."""
    record = json.loads(BASE_FILE.read_text())
    base = BaseModelIdentity(
        record["fingerprint"], {name: tuple(shape) for name, shape in record["tensors"].items()}
    )
    if ACTION == "first publish" or sys.argv[4] == "unkilled":
        # A trace begins with the disk as it was prepared.
        arm()
    with registry.Registry.open(place / "registry") as opened:
        arm()
        if ACTION.endswith("publish"):
            opened.publish("spelling", ADAPTER, base=base, metrics={"loss": 0.5}, tags={"a": "b"})
        elif ACTION == "alias":
            opened.set_alias("spelling", "production", 2, expect=1)
        elif ACTION == "materialize":
            opened.materialize(opened.find("spelling@1"), place / "cache")
        elif ACTION == "gc":
            opened.collect_garbage(grace=timedelta(0))


def run(place: Path, calls: int) -> bool:
    """Whether the process lived after at most `calls` calls."""
    place.mkdir()
    if (DIRECTORY / "prepared").is_dir():
        shutil.copytree(DIRECTORY / "prepared", place, dirs_exist_ok=True)
    child = os.fork()
    if child == 0:
        armed: list[bool] = []

        def arm() -> None:
            if not armed:
                log = str(place.with_suffix(".calls")).encode()
                ctypes.CDLL(None).crash_arm(str(place).encode(), ctypes.c_long(calls), TORN, log)
                armed.append(True)

        try:
            act(place, arm)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"killed before call {calls}, but it ended with {status}")
    return status == 0


# Nothing makes a million calls: then the first one survives.
count = 1_000_000 if sys.argv[4] == "unkilled" else 0
while not run(DIRECTORY / str(count), count):
    count += 1
(DIRECTORY / str(count)).rename(DIRECTORY / "survivor")
for ending in ("calls", "calls.trace"):
    (DIRECTORY / f"{count}.{ending}").rename(DIRECTORY / f"survivor.{ending}")
print(count)
