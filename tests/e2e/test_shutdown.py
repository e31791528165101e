"""SIGTERM, the last thing asked of the shared gateway."""

import signal

import psutil

from tests.e2e.harness import Gateway


def test_sigterm_drains_and_leaves_no_process(gateway: Gateway) -> None:
    below = psutil.Process(gateway.process.pid).children(recursive=True)
    assert below
    with gateway.client() as client:
        stream = client.stream("Once upon a time", "green", max_tokens=40, ignore_eos=True)
        next(stream)
        gateway.process.send_signal(signal.SIGTERM)
        answer = stream.result()
    assert answer.usage.completion_tokens == 40
    assert gateway.process.wait(timeout=120) == 0
    assert psutil.wait_procs(below, timeout=0)[1] == []
