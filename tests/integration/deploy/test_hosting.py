"""deploy/up and deploy/down with a gateway of their own, killed at each effect and run again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks.synthetic import expected_tokens
from deploy.stages.hosting import Hosting
from deploy.stages.settings import load_stage
from manylora_client import Client
from manylora_registry import Registry
from tests.integration.deploy.scripts import Scripts
from tests.integration.deploy.stage_files import write_stage
from tests.integration.gateway.conftest import base, base_directory

__all__ = ["base", "base_directory"]

STAGE = "staging"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def scripts(
    tmp_path: Path,
    base_directory: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scripts]:
    stages = tmp_path / "stages"
    write_stage(
        stages / STAGE,
        base=base_directory,
        registry=tmp_path / "registry",
        gateway={"engine": {"max_rank": 8}, "drain_s": 5},
        engine="benchmarks.synthetic:make_engine",
    )
    monkeypatch.setenv("MANYLORA_STAGES", str(stages))
    scripts = Scripts(stages)
    try:
        yield scripts
    finally:
        scripts.run("down", STAGE)
        scripts.close()


def processes() -> set[int]:
    """Gateways of the stage that live."""
    record = str(load_stage(STAGE).state / "gateway.json")
    found = psutil.process_iter(["cmdline"])
    return {process.pid for process in found if record in (process.info["cmdline"] or ())}


def kept(registry: Registry, action: str) -> int:
    """How often the registry keeps that something was done."""
    found = registry.deployments(stage=STAGE)
    return len([one for one in found if (one.action, one.outcome) == (action, "done")])


def killed(scripts: Scripts, action: str, moments: Sequence[int]) -> int:
    """Runs a script again and again, each killed at one moment, and once more to its end."""
    for moment in moments:
        assert scripts.run(action, STAGE, kill=moment).killed
    ended = scripts.run(action, STAGE)
    assert ended.status == 0, ended.err
    return ended.moments


def test_killed_at_each_effect_and_run_again(scripts: Scripts, registry: Registry) -> None:
    # The gateway begins, is waited for, is kept; the last is done again, and changes nothing.
    assert killed(scripts, "up", (0, 1, 0, 1, 0, 1)) == 2
    hosting = Hosting(load_stage(STAGE))
    gateway = hosting.require()
    assert processes() == {gateway.pid}
    with Client(gateway.inference) as client:
        answer = client.generate([7], max_tokens=3)
    assert list(answer.token_ids) == expected_tokens(None, [7], 3)

    # It has ended, that is kept, and nothing more is to be told of it.
    assert killed(scripts, "down", (0, 1, 0, 1, 2, 3)) == 0
    assert (hosting.find(), hosting.last(), processes()) == (None, None, set())
    assert (kept(registry, "up"), kept(registry, "down")) == (1, 1)
