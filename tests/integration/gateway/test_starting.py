"""A gateway that cannot start."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from manylora_registry import Registry
from tests.e2e.harness import ROOT
from tests.integration.gateway.test_ending import CONFIG

DIES = """
import os, signal, sys
from pathlib import Path
from manylora_gateway.serve import serve

serve(Path(sys.argv[1]), (), lambda base, config, gpus: os.kill(os.getpid(), signal.SIGKILL))
"""
# What vLLM says of an engine process of its own that was killed before it could say anything.
LOSES_A_PROCESS = """
import sys
from pathlib import Path
from manylora_gateway.serve import serve

def make_engine(base, config, gpus):
    raise RuntimeError(
        "Engine core initialization failed. See root cause above. "
        "Failed core proc(s): {'EngineCore': -9}"
    )

serve(Path(sys.argv[1]), (), make_engine)
"""
KILLED = "The engine did not start: its process was killed, as where memory runs out"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (
            ["-m", "manylora_cli", "serve", "--set=engine.gpus=16", "--set=engine.replicas=16"],
            "engine.gpus: 16 replica(s) with 16 GPU(s) each need 256; here there are ",
        ),
        (
            ["-m", "manylora_cli", "serve", "--set=engine.dtype=float16"],
            "The engine did not start: engine.dtype: in float16 ",
        ),
        (["-c", DIES], KILLED),
        (["-c", LOSES_A_PROCESS], KILLED),
    ],
    ids=["lacks GPUs", "lacks range", "is killed", "loses a process"],
)
def test_a_gateway_whose_engine_cannot_be_says_why_and_ends(
    tmp_path: Path,
    base_directory: Path,
    location: Path,
    registry: Registry,
    command: Sequence[str],
    why: str,
) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(CONFIG.format(base=base_directory, registry=location))
    ended = subprocess.run(
        [sys.executable, *command, str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=dict(os.environ, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"),
        cwd=ROOT,
    )
    assert ended.returncode == 1
    assert why in ended.stderr
    assert ended.stdout == ""
