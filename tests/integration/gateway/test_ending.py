"""A gateway that ends while it answers."""

import os
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from manylora_client import UnavailableError
from manylora_registry import Registry
from tests.e2e.harness import start_gateway, stop, wait_until

CONFIG = """
base: {base}
registry: {registry}
listen: {{inference: "127.0.0.1:0", admin: "127.0.0.1:0"}}
engine: {{slots: 2, max_rank: 8, max_concurrent: 4}}
drain_s: 0.1
"""


def test_an_answer_that_outlasts_the_drain_says_so(
    tmp_path: Path,
    base_directory: Path,
    location: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # However late the signal comes.
    monkeypatch.setenv("SYNTHETIC_TOKENS_PER_S", "5")
    config = tmp_path / "gateway.yaml"
    config.write_text(CONFIG.format(base=base_directory, registry=location))
    running = start_gateway(config, tmp_path / "log", ["benchmarks.synthetic"])
    try:
        with running.client() as client, client.stream([1], "red", max_tokens=1000) as answer:
            assert stop(running.process) == []
            with pytest.raises(
                UnavailableError, match="ended before the answer was whole"
            ) as ended:
                list(answer)
    finally:
        stop(running.process)
    assert ended.value.reason == "DRAINING"
    assert ended.value.retry_after
    assert "1 requests still running after 0.1 s are cut off" in (tmp_path / "log").read_text()


def test_a_terminal_that_closes_lets_answers_end(
    tmp_path: Path, base_directory: Path, location: Path, registry: Registry
) -> None:
    config = tmp_path / "gateway.yaml"
    text = CONFIG.format(base=base_directory, registry=location)
    config.write_text(text.replace("drain_s: 0.1", "drain_s: 60"))
    # Inherited, and nohup may have started the tests.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        running = start_gateway(config, tmp_path / "log", ["benchmarks.synthetic"])
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        below = psutil.Process(running.process.pid).children(recursive=True)
        with running.client() as client, client.stream([1], "red", max_tokens=900) as answer:
            next(answer)
            # As the kernel does: to all of the terminal's group.
            os.killpg(running.process.pid, signal.SIGHUP)
            assert answer.result().usage.completion_tokens == 900
        assert running.process.wait(90) == 0
        assert psutil.wait_procs(below, timeout=10)[1] == []
    finally:
        stop(running.process)


def test_a_second_signal_ends_it_at_once_and_leaves_no_files(
    tmp_path: Path,
    base_directory: Path,
    location: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SYNTHETIC_TOKENS_PER_S", "5")
    config, log = tmp_path / "gateway.yaml", tmp_path / "log"
    text = CONFIG.format(base=base_directory, registry=location)
    config.write_text(text.replace("drain_s: 0.1", "drain_s: 600"))
    # Sockets in it want a short path.
    with tempfile.TemporaryDirectory(prefix="g-") as scratch:
        monkeypatch.setenv("TMPDIR", scratch)
        running = start_gateway(config, log, ["benchmarks.synthetic"])
        try:
            with running.client() as client, client.stream([1], "red", max_tokens=1000) as answer:
                next(answer)
                assert list(Path(scratch).glob("manylora-g-*/adapters/*"))
                running.process.terminate()
                assert wait_until(lambda: "draining" in log.read_text(), within_s=60)
                running.process.terminate()
                assert running.process.wait(60) == 1
            assert not list(Path(scratch).glob("manylora-g-*"))
        finally:
            stop(running.process)
