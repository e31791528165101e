"""What a killed gateway left is removed, and nothing that anybody uses."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from manylora_gateway.scratch import PREFIX, scratch_directory

HOLD = """
import sys
from pathlib import Path
from manylora_gateway.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1])) as scratch:
    (scratch / "ray").mkdir()
    print(scratch, flush=True)
    sys.stdin.read()
"""


def test_it_goes_with_its_context(tmp_path: Path) -> None:
    with scratch_directory(tmp_path) as scratch:
        (scratch / "adapters").mkdir()
    assert not list(tmp_path.iterdir())


def test_the_next_gateway_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with scratch_directory(tmp_path):
            assert (left / "ray").is_dir(), "it was in use"
        process.send_signal(signal.SIGKILL)
    assert (left / "ray").is_dir()
    with scratch_directory(tmp_path) as scratch:
        assert list(tmp_path.iterdir()) == [scratch]


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    kept = tmp_path / "manylora-abcdefgh"
    kept.mkdir()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inside").mkdir(parents=True)
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(elsewhere)
    file = tmp_path / f"{PREFIX}file"
    file.touch()
    with scratch_directory(tmp_path):
        assert kept.is_dir()
        assert link.is_symlink()
        assert (elsewhere / "inside").is_dir()
        assert file.is_file()


def test_gateways_that_start_together_keep_theirs(tmp_path: Path) -> None:
    def start_and_stop(_: int) -> bool:
        with scratch_directory(tmp_path) as scratch:
            os.sched_yield()
            return scratch.is_dir()

    with ThreadPoolExecutor(8) as gateways:
        assert all(gateways.map(start_and_stop, range(400)))
    assert not list(tmp_path.iterdir())
