"""Nothing of a run outlives it, whoever its parent is by then."""

import os
import subprocess
import sys

import psutil
import pytest

from manylora_gateway.processes import MARK, end_marked, mark_descendants, marked

ORPHANING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid)
"""
SLEEP = "import time; print(flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


@pytest.fixture(autouse=True)
def _own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "")
    mark_descendants()


def orphan(code: str) -> psutil.Process:
    """A process whose parent has ended."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHANING, code], stdout=subprocess.PIPE, check=True, text=True
    )
    return psutil.Process(int(done.stdout))


def test_an_orphan_is_found_and_ended() -> None:
    process = orphan(SLEEP)
    assert process in marked()
    end_marked(grace_s=10)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert marked() == []


def test_one_that_ignores_the_first_signal_is_killed() -> None:
    process = orphan(STUBBORN)
    end_marked(grace_s=0.5)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_processes_of_others_are_left_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    with subprocess.Popen([sys.executable, "-c", SLEEP], env=environment) as other:
        try:
            end_marked(grace_s=0)
            assert other.poll() is None
        finally:
            other.kill()
