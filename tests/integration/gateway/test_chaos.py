"""Promises 1, 5, 6 and 7 with everything going wrong at once.

Half a minute here, as long as `SOAK_MINUTES` says with `make soak`.
"""

import asyncio
import hashlib
import os
from pathlib import Path

import psutil

from manylora_registry import Registry
from manylora_registry.base import BaseModelIdentity
from tests.e2e.harness import Gateway, wait_until
from tests.integration.gateway.chaos import Chaos
from tests.integration.gateway.conftest import ADAPTERS
from tests.unit.gateway.in_process import OTHER_BASE, publish

SECONDS = 60 * float(os.environ.get("SOAK_MINUTES", "0.4"))
LOOKS = max(1, round(SECONDS / 180))
"""At the front's memory."""


def damage(location: Path, weights: Path) -> None:
    """Flips a bit of a stored blob."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (blob,) = location.glob(f"blobs/sha256/*/*{digest[2:]}")
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)


async def test_nothing_wrong_nothing_leaked_every_error_typed(
    gateway: Gateway,
    registry: Registry,
    location: Path,
    base: BaseModelIdentity,
    tmp_path: Path,
) -> None:
    publish(registry, tmp_path, "spoilt", 50, base=base)
    damage(location, tmp_path / "spoilt-50/adapter_model.safetensors")
    publish(registry, tmp_path, "foreign", 51, base=OTHER_BASE)
    chaos = Chaos(
        gateway,
        registry,
        location,
        ADAPTERS,
        "spoilt@1",
        "foreign@1",
        kill_every_s=min(SECONDS / 3, 90),
    )
    front = psutil.Process(gateway.process.pid)
    await chaos.run(SECONDS / 4)
    sizes = [front.memory_info().rss >> 20]
    for _ in range(LOOKS):
        await chaos.run(SECONDS / LOOKS)
        sizes.append(front.memory_info().rss >> 20)
    print(dict(chaos.outcomes), "front's MiB:", *sizes)
    print(f"slowest successor of a killed replica: {chaos.slowest_successor_s:.0f} s")
    assert chaos.wrong == []
    for what in ("right", "vanished", "moves", "registry away", "killed", "refused DataLossError"):
        assert chaos.outcomes[what] > 0, what
    idle = await asyncio.to_thread(wait_until, lambda: gateway.requests() == 0, within_s=20)
    assert idle, "a request is still held"
    assert all(entry.requests == 0 for replica in gateway.replicas() for entry in replica.adapters)
    assert sizes[-1] - sizes[0] < 64
    whole = await asyncio.to_thread(wait_until, lambda: len(gateway.replicas()) == 2, within_s=120)
    assert whole, "a killed replica was not replaced"
