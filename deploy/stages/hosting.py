"""Starting a stage's gateway apart from its terminal, finding it again, and ending it.

Two locks tell what is, and both die with the gateway's process: `gateway.lock` is held as long as
it lives, `starting.lock` until it serves. Whoever waits for a start or an end waits for a lock.
"""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from deploy.stages import files
from deploy.stages.errors import (
    ForeignGatewayError,
    NotRunningError,
    StartError,
    StopError,
)
from deploy.stages.settings import Stage

END_MARGIN_S = 60.0
"""Beside what requests have to end: for engines and Ray."""


@dataclass(frozen=True)
class Running:
    """A gateway that serves, or is about to."""

    pid: int | None
    """None: something else runs it. 0: not known yet."""
    inference: str
    """HOST:PORT; empty while it starts."""
    admin: str
    http: str = ""
    began: float = 0.0
    """When its process began, in seconds since 1970."""

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return bool(self.inference)


_RUNNING = TypeAdapter(Running)


class Hosting:
    """The gateway process of one stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._lock = stage.state / "gateway.lock"
        self._starting = stage.state / "starting.lock"
        self._record = stage.state / "gateway.json"
        self.log = stage.state / "gateway.log"

    def find(self) -> Running | None:
        """The gateway, if it lives."""
        connect = self._stage.config.connect
        if connect is not None:
            return Running(None, connect.inference, connect.admin)
        if not files.is_locked(self._lock):
            return None
        # Removed before a start, so a record that is there is the living one's own.
        return self.last() or Running(0, "", "")

    def last(self) -> Running | None:
        """The gateway that was started last, whether it lives or not, until it is forgotten."""
        return files.read_json(self._record, _RUNNING)

    def forget(self) -> None:
        """Nothing more is to be told of the last one."""
        files.remove(self._record)

    def require(self) -> Running:
        """The gateway, serving.

        Raises:
            NotRunningError: it does not.
        """
        running = self.find()
        if running is None or not running.ready:
            state = "does not run" if running is None else "is still starting"
            raise NotRunningError(
                f"the gateway of {self._stage.name} {state}: deploy/up {self._stage.name}"
            )
        return running

    def start(self) -> Running:
        """Has the gateway serve; returns once it does.

        A signal while it waits ends what it started; what another process started goes on.

        Raises:
            StartError: it does not start.
        """
        lock = files.open_lock(self._lock)
        try:
            # The child inherits both locks, and they are its own once they are closed here.
            process = self._spawn(lock) if files.try_lock(lock) else None
        finally:
            os.close(lock)
        try:
            return self._await_start()
        except BaseException:
            if process is not None:
                self._end(process)
            raise

    def stop(self) -> bool:
        """Drains the gateway and waits for its end; False where there is none.

        Raises:
            StopError: it does not end.
        """
        running = self.find()
        if running is None:
            return False
        if not running.pid:
            # Between its start and its first words.
            self._wait(self._starting, self._stage.config.start_timeout_s)
            running = self.find()
            if running is None or not running.pid:
                return False
        os.kill(running.pid, signal.SIGTERM)
        within = self._stage.gateway.drain_s + END_MARGIN_S
        if not self._wait(self._lock, within):
            raise StopError(
                f"the gateway of {self._stage.name} (process {running.pid}) has not ended in "
                f"{within:.0f} s; see {self.log}"
            )
        return True

    def require_own(self) -> None:
        """Refuses to begin or end what something else runs.

        Raises:
            ForeignGatewayError: something else runs it.
        """
        if self._stage.config.connect is not None:
            raise ForeignGatewayError(
                f"something else runs the gateway of {self._stage.name}: its stage.yaml says where "
                "to connect to"
            )

    def _spawn(self, lock: int) -> "subprocess.Popen[bytes]":
        starting = files.open_lock(self._starting)
        try:
            files.lock(starting)
            files.remove(self._record)
            with self.log.open("wb") as log:
                return subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "deploy.stages.host"),
                        *(str(self._stage.gateway_file), str(self._record)),
                        *(self._stage.config.engine or "", str(lock), str(starting)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock, starting),
                )
        finally:
            os.close(starting)

    def _await_start(self) -> Running:
        within = self._stage.config.start_timeout_s
        if not self._wait(self._starting, within):
            raise StartError(
                f"the gateway of {self._stage.name} does not serve after {within:.0f} s; "
                f"see {self.log}"
            )
        running = self.find()
        if running is None or not running.ready:
            raise StartError(
                f"the gateway of {self._stage.name} did not start: {self._last_words()} "
                f"({self.log})"
            )
        return running

    def _last_words(self) -> str:
        if not self.log.is_file():
            return "it said nothing"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        process.terminate()
        try:
            process.wait(END_MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self, lock: Path, within_s: float) -> bool:
        """Waits until nobody holds `lock`; False where that takes too long."""
        descriptor = files.open_lock(lock)
        free = threading.Event()

        def wait() -> None:
            files.lock(descriptor, shared=True)
            os.close(descriptor)
            free.set()

        # A thread, as a blocked flock cannot be given up; it ends with this process.
        threading.Thread(target=wait, daemon=True).start()
        return free.wait(within_s)
