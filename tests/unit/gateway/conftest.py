"""A registry with two served adapters, and gateways over it."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from manylora_registry import Registry, Version
from tests.unit.gateway.in_process import RunningGateway, publish, running_gateway

Publish = Callable[..., Version]
Start = Callable[..., AbstractAsyncContextManager[RunningGateway]]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def published(registry: Registry, tmp_path: Path) -> Publish:
    """Publishes a tiny version: `published(name, seed, rank=…, base=…)`."""
    return partial(publish, registry, tmp_path)


@pytest.fixture
def served(registry: Registry, published: Publish) -> dict[str, Version]:
    """`red` and `green`, version 1 at `production`."""
    versions = {name: published(name, seed) for seed, name in enumerate(("red", "green"))}
    for name in versions:
        registry.set_alias(name, "production", 1)
    return versions


@pytest.fixture
def start(registry: Registry, tmp_path: Path) -> Start:
    """Starts a gateway: `async with start(engine=…) as gateway`."""
    return partial(running_gateway, registry, tmp_path)


@pytest.fixture
async def gateway(served: dict[str, Version], start: Start) -> AsyncGenerator[RunningGateway, None]:
    """One replica with two slots, serving `red` and `green`."""
    async with start() as running:
        yield running
