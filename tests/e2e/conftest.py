"""One real gateway for the whole run: real base, real vLLM, real Ray, a real registry."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_registry import Registry
from manylora_registry.base import BaseModelIdentity, identify_base
from tests.e2e.harness import ADAPTERS, SLOTS, Gateway, start_gateway, stop, write_adapter

BASE = Path(__file__).parents[2] / "bases/smollm2-135m"

CONFIG = """
base: {base}
registry: {registry}
listen: {{inference: "127.0.0.1:0", admin: "127.0.0.1:0"}}
engine: {{slots: {slots}, max_rank: 16, max_context: 512, max_concurrent: 16, kv_cache_gib: 1}}
drain_s: 60
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stopping the shared gateway comes after everything that needs it."""
    items.sort(key=lambda item: item.path.name == "test_shutdown.py")


@pytest.fixture(scope="session")
def base() -> Path:
    if not (BASE / "config.json").is_file():
        pytest.fail(f"{BASE} is missing: run `make test`, which fetches it")
    return BASE


@pytest.fixture(scope="session")
def identity(base: Path) -> BaseModelIdentity:
    return identify_base(base)


@pytest.fixture(scope="session")
def registry_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e") / "registry"


@pytest.fixture(scope="session")
def registry(
    tmp_path_factory: pytest.TempPathFactory, identity: BaseModelIdentity, registry_directory: Path
) -> Iterator[Registry]:
    """Holds one random adapter of each name, at `production`."""
    with Registry.open(registry_directory) as opened:
        for seed, (name, rank) in enumerate(ADAPTERS.items()):
            adapter = tmp_path_factory.mktemp("adapter")
            write_adapter(adapter, identity, rank, seed)
            version = opened.publish(name, adapter, base=identity)
            opened.set_alias(name, "production", version.number, why="first")
        yield opened


@pytest.fixture(scope="session")
def gateway(
    tmp_path_factory: pytest.TempPathFactory,
    base: Path,
    registry: Registry,
    registry_directory: Path,
) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("gateway")
    config = directory / "gateway.yaml"
    config.write_text(CONFIG.format(base=base, registry=registry_directory, slots=SLOTS))
    running = start_gateway(config, directory / "gateway.log")
    yield running
    if running.process.poll() is None:
        stop(running.process)
