"""What a gateway prints, and what Ray prints in its process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from manylora_registry import Registry
from tests.e2e.harness import ROOT
from tests.integration.gateway.test_ending import CONFIG

TOLD = "(raylet) Task ServeController.graceful_shutdown failed."
TALKS = f"""
import signal, sys
from pathlib import Path
from benchmarks import synthetic
from manylora_gateway.serve import serve

# As a thread of Ray's does when something goes wrong in the cluster.
signal.signal(signal.SIGUSR1, lambda *_: print({TOLD!r}, flush=True))
serve(Path(sys.argv[1]), (), synthetic.make_engine)
"""


def test_only_the_ready_line_is_on_stdout(
    tmp_path: Path, base_directory: Path, location: Path, registry: Registry
) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(CONFIG.format(base=base_directory, registry=location))
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", TALKS, str(config)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=dict(os.environ, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"),
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""

    assert process.returncode == 0
    assert TOLD in (tmp_path / "log").read_text()
