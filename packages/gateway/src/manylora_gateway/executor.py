"""How vLLM runs the model: inside its engine process, which ends with the replica."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class LocalExecutor(UniProcExecutor):
    """The worker in the engine's own process.

    vLLM would start a third process for it on a CPU, to set its OpenMP variables; the replica
    has set them already, and a process less saves its imports (12 s) and a hop for each step.
    """

    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()


def _end_with_parent() -> None:
    """Kills this process when the replica that started it is gone, however it went.

    A replica killed with SIGKILL cannot end its engine, which would hold its memory for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
