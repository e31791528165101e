"""What the scripts do while the registry cannot be reached: nobody is left with a version alone."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manylora_registry import BaseModelIdentity
from tests.integration.deploy.conftest import GATES, World, two_stages


@pytest.fixture
def world(tmp_path: Path, base_directory: Path, base: BaseModelIdentity) -> Iterator[World]:
    """Stages whose registry can be taken away; a canary that looks once and then sleeps."""
    with two_stages(tmp_path, base_directory, base) as world:
        yield world


def in_its_canary(world: World, name: str) -> None:
    """Waits until a promotion has looked at the registry and sends its probes, or is behind them.

    It reads the registry no more then before it looks again, which it does in a minute.
    """
    metrics = world.gateways["production"].metrics
    new = world.registry.resolve(f"{name}@2").digest
    while not metrics.figures.of(new).requests:
        time.sleep(0.005)


def test_who_interrupts_a_canary_sends_everybody_back(world: World, tmp_path: Path) -> None:
    name = world.adapter()
    canary = {**GATES["canary"], "window_s": 60, "look_s": 60}
    world.gates(suites=[], smoke=None, canary=canary)
    world.scripts.good("candidate", f"{name}@2")
    holder = world.stages / f"production/state/promotions/{name}.holder"
    with ThreadPoolExecutor() as pool:
        promotion = pool.submit(world.scripts.run, "promote", name)
        in_its_canary(world, name)
        away = (tmp_path / "registry").rename(tmp_path / "away")
        os.kill(json.loads(holder.read_text())["pid"], signal.SIGINT)
        ended = promotion.result()
    away.rename(tmp_path / "registry")

    assert ended.status == 1
    said = ended.err.strip().splitlines()
    assert "the history does not tell of this: " in said[-2]
    assert said[-1] == (
        "promote: interrupted; everybody is back on version 1. Run it again to go on"
    )
    assert (world.serving(name), world.division(name)) == (1, {})
    world.gates(canary=GATES["canary"])
    assert world.scripts.good("promote", name) == f"production serves {name}@2\n"
