"""Two stages over one registry: real gateways in this process with an engine that is none.

The scripts run as processes of their own and reach the gateways over real gRPC.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from manylora_client import Client
from manylora_gateway.config import EngineConfig, LimitsConfig
from manylora_registry import BaseModelIdentity, Registry
from tests.integration.deploy.scripts import Scripts
from tests.integration.deploy.stage_files import write_stage
from tests.integration.gateway.conftest import base, base_directory
from tests.unit.gateway.in_process import RunningGateway, publish, running_gateway

__all__ = ["base", "base_directory"]

SUITE = """
name: names
tasks:
  - name: {name}
    adapter: {name}
    rows: rows.jsonl
    max_tokens: 2
    scorers: [{{kind: regex, pattern: "^{name}@[1249]-"}}]
    thresholds: [{{score: regex, at_least: 0.9}}]
"""
"""The engine says its version's name: numbers 3 and 5 to 8 are bad ones."""

GATES = {
    "decision": {"difference": 0.9, "rows": 4},
    "prompts": "rows.jsonl",
    "max_tokens": 4,
    "smoke": {"requests": 4, "concurrency": 4, "answer_p95_s": 60},
    "canary": {
        "steps": [10, 50, 100],
        "window_s": 0.05,
        "look_s": 0.02,
        "requests": 3,
        "bounds": {"errors": 0.0, "tokens_ratio": 2},
    },
}

PACE_S = 0.02
"""Between an answer and the next request: without it the client takes a core from the scripts."""


@dataclass
class World:
    """Stages, their gateways, and who asks them."""

    registry: Registry
    stages: Path
    gateways: dict[str, RunningGateway]
    base: BaseModelIdentity
    scripts: Scripts
    loop: asyncio.AbstractEventLoop
    counter: int = 0
    failures: list[str] = field(default_factory=list)
    token: str | None = None
    """What its client shows the gateways."""

    def adapter(self, versions: int = 2) -> str:
        """A new adapter with versions of which `production` is the first."""
        self.counter += 1
        name = f"red{self.counter}"
        directory = self.stages / "adapters"
        directory.mkdir(exist_ok=True)
        for number in range(versions):
            publish(self.registry, directory, name, 100 * self.counter + number, base=self.base)
        self.registry.set_alias(name, "production", 1)
        suite = self.stages / "production/suites" / f"{name}.yaml"
        suite.parent.mkdir(exist_ok=True)
        rows = [{"messages": [{"role": "user", "content": "?" * i}]} for i in range(1, 13)]
        (suite.parent / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        suite.write_text(SUITE.format(name=name))
        self.gates(suites=[{"path": f"suites/{name}.yaml"}])
        return name

    def gates(self, **changes: object) -> None:
        """Rewrites production's gates.yaml."""
        file = self.stages / "production/gates.yaml"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def serving(self, name: str, alias: str = "production") -> int:
        """The version the registry's alias means."""
        return self.registry.aliases(name)[alias].version

    def division(self, name: str) -> dict[int, int]:
        """What the production gateway gives each version, where it divides at all."""
        rollouts = self.gateways["production"].routes.rollouts
        serving = self.registry.resolve(name)
        rollout = rollouts.get((name, "production"), serving)
        return {} if rollout is None else {s.version.number: s.percent for s in rollout.shares}

    def outcomes(self, name: str, action: str) -> list[tuple[str, str]]:
        """Step and outcome of what the registry keeps of an adapter."""
        kept = self.registry.deployments(name)
        return [(one.step, one.outcome) for one in kept if one.action == action]

    @contextmanager
    def client(self, name: str) -> Iterator[Callable[[], int]]:
        """Asks production for an adapter again and again; none of it may fail."""
        stop, seen = threading.Event(), 0

        def ask() -> None:
            nonlocal seen
            target = self.gateways["production"].front.inference_address
            with Client(target, token=self.token, timeout=60) as client:
                while True:
                    try:
                        answer = client.generate([1, 2, seen], name, max_tokens=3)
                        assert answer.adapter is not None
                        words = {*answer.text.split()}
                        if len(words) != 1:
                            self.failures.append(f"mixed: {answer.text}")
                    except Exception as error:
                        self.failures.append(str(error))
                    seen += 1
                    # Behind the first answer, however soon it is over.
                    if stop.wait(PACE_S):
                        break

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield lambda: seen
        finally:
            stop.set()
            thread.join()
        assert self.failures == []
        assert seen > 0


@contextmanager
def two_stages(
    directory: Path,
    base_directory: Path,
    base: BaseModelIdentity,
    tenants: Path | None = None,
    token_file: Path | None = None,
) -> Iterator[World]:
    """Staging and production; whom they let in, and where their token lies."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()
    location, stages = directory / "registry", directory / "stages"

    def here(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    with Registry.open(location) as registry:
        gateways: dict[str, RunningGateway] = {}
        for name in ("staging", "production"):
            (directory / name).mkdir()
            gateway = running_gateway(
                registry,
                directory / name,
                engine=EngineConfig(slots=3, host_adapters=8, max_concurrent=16, turn_s=0),
                limits=LimitsConfig(default_max_tokens=4),
                tenants=tenants,
                base=base,
                aliases=(name,),
            )
            gateways[name] = here(stack.enter_async_context(gateway))
            front = gateways[name].front
            write_stage(
                stages / name,
                base=base_directory,
                # As stages are written that lie beside each other.
                registry=Path("../../registry"),
                gateway={"engine": {"max_rank": 8}},
                connect={"inference": front.inference_address, "admin": front.admin_address},
                start_timeout_s=120,
                token_file=None if token_file is None else str(token_file),
            )
        (stages / "production/gates.yaml").write_text(json.dumps(GATES))
        prompts = [{"messages": [{"role": "user", "content": "!" * i}]} for i in range(1, 20)]
        (stages / "production/rows.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        scripts = Scripts(stages)
        try:
            yield World(registry, stages, gateways, base, scripts, loop)
        finally:
            scripts.close()
            here(stack.aclose())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, base_directory: Path, base: BaseModelIdentity
) -> Iterator[World]:
    with two_stages(tmp_path_factory.mktemp("deploy"), base_directory, base) as world:
        yield world
