"""Leaving no process behind.

Every process below the gateway inherits one environment variable, so that it is found even where
its parent died first and it now belongs to init.
"""

import os
import uuid

import psutil

MARK = "MANYLORA_GATEWAY_RUN"


def mark_descendants() -> None:
    """Has all processes started from here on carry this run's mark."""
    os.environ[MARK] = uuid.uuid4().hex


def marked() -> list[psutil.Process]:
    """The living processes of this run, without this one."""
    run = os.environ[MARK]
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != os.getpid() and process.environ().get(MARK) == run
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            # Gone meanwhile, or another user's.
            continue
    return found


def end_marked(grace_s: float) -> int:
    """Ends what is left of this run, by force after `grace_s`; says how many needed force."""
    left = marked()
    for process in left:
        _signal(process, force=False)
    _, stubborn = psutil.wait_procs(left, timeout=grace_s)
    for process in stubborn:
        _signal(process, force=True)
    psutil.wait_procs(stubborn, timeout=5)
    return len(stubborn)


def _signal(process: psutil.Process, *, force: bool) -> None:
    try:
        process.kill() if force else process.terminate()
    except psutil.NoSuchProcess:
        return
