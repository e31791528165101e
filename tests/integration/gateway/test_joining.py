"""A gateway in a Ray cluster that others run, as on Kubernetes: it joins, and leaves all as it is.

The cluster is Ray's own command, and the engines are deployed by a Serve config, as by KubeRay.
"""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.synthetic import expected_tokens
from manylora_client import AsyncClient
from manylora_registry import Registry
from tests.e2e.harness import ROOT, replica_processes, start_gateway, stop, wait_until

PROMPT = [2, 7, 1]
SCRIPTS = Path(sys.executable).parent

CONFIG = """
base: {base}
registry: {registry}
listen: {{inference: "127.0.0.1:0", admin: "127.0.0.1:0"}}
engine: {{slots: 2, max_rank: 8, max_concurrent: 4, gpus: 0}}
ray_address: {address}
ray_application: manylora
"""


@dataclass
class Cluster:
    """A head node of one's own."""

    address: str
    head: psutil.Process

    def deploy(self, config: Path) -> None:
        command = [SCRIPTS / "serve", "run", config, "--address", self.address, "--non-blocking"]
        # The module that the config imports is found by the workers too, which the head started.
        subprocess.run(command, check=True, timeout=300, cwd=ROOT, env=environment())

    def replicas(self) -> int:
        """Engine replicas that live."""
        return len(replica_processes(self.head.pid))


def environment() -> dict[str, str]:
    return dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        RAY_AUTH_MODE="disabled",
        HF_HUB_OFFLINE="1",
        RAY_gcs_server_port_wait_time_s="150",
        RAY_raylet_start_wait_time_s="150",
        # So slow that the load lasts until it has been seen.
        SYNTHETIC_TOKENS_PER_S="20",
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("ray")
    options = {
        "port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-agent-listen-port": 0,
        "include-dashboard": "false",
        "temp-dir": directory,
        "num-cpus": 4,
        "object-store-memory": 100 << 20,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    log = directory / "start.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [SCRIPTS / "ray", "start", "--head", "--block", "--disable-usage-stats", *words],
            env=environment(),
            stdout=output,
            stderr=output,
        )
    head = psutil.Process(process.pid)
    try:
        address = re.compile(r"ray start --address='\S+:([0-9]+)'")
        assert wait_until(lambda: bool(address.search(log.read_text())), 300), log.read_text()
        (port,) = address.findall(log.read_text())
        yield Cluster(f"127.0.0.1:{port}", head)
    finally:
        # Asked to end, the head would drain for half a minute.
        for started in (head, *head.children(recursive=True)):
            # Some end with the head.
            with suppress(psutil.NoSuchProcess):
                started.kill()
        process.wait()


async def test_a_gateway_comes_and_goes_while_the_engines_stay(
    cluster: Cluster,
    tmp_path: Path,
    base_directory: Path,
    location: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    config = tmp_path / "gateway.yaml"
    config.write_text(
        CONFIG.format(base=base_directory, registry=location, address=cluster.address)
    )
    serve = tmp_path / "serve.yaml"
    bounds = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1,
    }
    application = {
        "name": "manylora",
        "route_prefix": None,
        "import_path": "benchmarks.synthetic:engines",
        "args": {"config": str(config)},
        "deployments": [{"name": "engine", "autoscaling_config": bounds}],
    }
    serve.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
    served = registry.resolve("red@production")

    await asyncio.to_thread(cluster.deploy, serve)
    gateway = await asyncio.to_thread(
        start_gateway, config, tmp_path / "gateway.log", ["benchmarks.synthetic"]
    )
    async with AsyncClient(gateway.inference, timeout=300) as client:
        answer = await client.generate(PROMPT, "red", max_tokens=5)
        assert tuple(answer.token_ids) == tuple(expected_tokens(served.engine_name, PROMPT, 5))
        assert cluster.replicas() == 1

        # Load brings a second replica, and the gateway finds it.
        crowd = [
            asyncio.create_task(client.generate(PROMPT, "red", max_tokens=2000)) for _ in range(8)
        ]
        assert await asyncio.to_thread(wait_until, lambda: len(gateway.replicas()) == 2, 240)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)

    assert stop(gateway.process) == []
    assert gateway.process.returncode == 0
    assert cluster.replicas() >= 1
