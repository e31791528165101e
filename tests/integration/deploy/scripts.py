"""Runs the scripts of `deploy/`, each in a process of its own, and kills them where it is told.

`python -m tests.integration.deploy.scripts` answers each line of JSON `{"arguments", "kill",
"stages"}` with one about the script that it ran. It imports what scripts need once and forks, as
imports would take most of the time; it opens no gRPC channel itself, which a fork would break.

An effect is a call that changes something others see: the journal, a rollout, the registry, a
process. A script is killed before its first effect, after it, before its second, and so on.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Ended:
    """How a script ended."""

    status: int
    """Negative: the signal that killed it."""
    out: str
    err: str
    moments: int
    """Moments before and after an effect that it came to."""

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Scripts:
    """A process that runs scripts for one directory of stages."""

    def __init__(self, stages: Path) -> None:
        self._stages = stages
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._runner = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.deploy.scripts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=dict(os.environ, MANYLORA_STAGES=str(stages), PYTHONPATH=os.pathsep.join(path)),
        )

    def run(
        self,
        *arguments: str,
        kill: int | None = None,
        by: signal.Signals = signal.SIGKILL,
        times: int = 1,
    ) -> Ended:
        """Runs `deploy/ARGUMENTS`.

        It gets the signal `by` at its moment number `kill`, from 0, and at the next ones if it is
        to get it several times.
        """
        signalled = [] if kill is None else list(range(kill, kill + times))
        assert self._runner.stdin is not None
        assert self._runner.stdout is not None
        self._runner.stdin.write(
            json.dumps({"arguments": arguments, "kill": signalled, "by": by}) + "\n"
        )
        self._runner.stdin.flush()
        return Ended(**json.loads(self._runner.stdout.readline()))

    def good(self, *arguments: str) -> str:
        """Runs one that must end well; what it printed."""
        ended = self.run(*arguments)
        assert ended.status == 0, ended.err
        return ended.out

    def refused(self, *arguments: str) -> str:
        """Runs one that must fail with one clear line; that line."""
        ended = self.run(*arguments)
        assert ended.status == 1, (ended.status, ended.out, ended.err)
        assert "Traceback" not in ended.err
        return ended.err.strip().splitlines()[-1]

    def close(self) -> None:
        self._runner.communicate()


def effects() -> list[tuple[type, str]]:
    """What is an effect."""
    from deploy.stages.hosting import Hosting
    from deploy.stages.journal import Journal
    from deploy.stages.operator import Operator
    from manylora_registry import Registry

    return [
        *((Journal, name) for name in ("write", "end")),
        (Operator, "divide"),
        *((Registry, f"record_{what}") for what in ("deployment", "evaluation")),
        (Registry, "set_alias"),
        *((Hosting, name) for name in ("_spawn", "_wait", "forget")),
    ]


def run(arguments: list[str], kill: list[int], by: int, counted: int) -> None:
    """In the child: the script, sent `by` at the moments `kill`; says how many there were."""
    from deploy.stages.__main__ import main

    moments = 0

    def moment() -> None:
        nonlocal moments
        at, moments = moments, moments + 1
        if at in kill:
            os.kill(os.getpid(), by)
        os.pwrite(counted, moments.to_bytes(4, "big"), 0)

    def between_moments(effect: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(effect)
        def act(*arguments: Any, **options: Any) -> Any:
            moment()
            result = effect(*arguments, **options)
            moment()
            return result

        return act

    # The real thing, with a moment before and after. A profiler would see them too, and make the
    # rest of the script several times as slow.
    for owner, name in effects():
        setattr(owner, name, between_moments(getattr(owner, name)))
    sys.argv = ["deploy", *arguments]
    # What shells do to a script that another one has begun in its background.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Under `nohup`, which the tests may be run under, it is nothing.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    main()


def serve() -> None:
    """Runs what it is told to, until there is no more."""
    for name in ("promote", "rollback", "history", "status"):
        importlib.import_module(f"deploy.stages.{name}")
    for line in sys.stdin:
        told: dict[str, Any] = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with tempfile.TemporaryFile() as counted:
                child = os.fork()
                if child == 0:
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    status = 0
                    try:
                        run(told["arguments"], told["kill"], told["by"], counted.fileno())
                    except SystemExit as error:
                        status = error.code if isinstance(error.code, int) else 1
                    except BaseException:
                        import traceback

                        traceback.print_exc()
                        status = 3
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                moments = int.from_bytes(os.pread(counted.fileno(), 4, 0), "big")
            texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err)]
        ended = {"status": status, "out": texts[0], "err": texts[1], "moments": moments}
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    serve()
