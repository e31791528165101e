"""A real gateway process, real Ray Serve with two replicas, and an engine that makes up tokens."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from manylora_registry import Registry
from manylora_registry.base import BaseModelIdentity, identify_base
from tests.e2e.harness import Gateway, start_gateway, stop
from tests.unit.gateway.in_process import MODULE, publish

ADAPTERS = ("red", "green", "blue", "grey")

CONFIG = """
base: {base}
registry: {registry}
listen: {{inference: "127.0.0.1:0", admin: "127.0.0.1:0"}}
engine: {{replicas: 2, slots: 2, host_adapters: 4, max_rank: 8, max_concurrent: 16}}
follow: {{poll_s: 0.1}}
drain_s: 20
"""


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer_config.json").write_text("{}")
    weights = {f"{MODULE}.weight": np.zeros((4, 4), np.float32)}
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def base(base_directory: Path) -> BaseModelIdentity:
    return identify_base(base_directory)


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the registry."""
    return tmp_path_factory.mktemp("synthetic") / "registry"


@pytest.fixture(scope="module")
def registry(location: Path, base: BaseModelIdentity) -> Iterator[Registry]:
    """Every adapter has two versions, of which `production` is the first.

    Of one module alone, as the gateway: what is loaded where depends on what was asked before.
    """
    with Registry.open(location) as opened:
        for index, name in enumerate(ADAPTERS):
            for number in (1, 2):
                publish(opened, location.parent, name, 10 * index + number, base=base)
            opened.set_alias(name, "production", 1)
        yield opened


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file here that is named by a replica's process kills the engine in it."""
    directory = tmp_path_factory.mktemp("deaths")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYNTHETIC_DEATHS", str(directory))
        yield directory


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory,
    base_directory: Path,
    location: Path,
    registry: Registry,
    deaths: Path,
) -> Iterator[Gateway]:
    config = tmp_path_factory.mktemp("gateway") / "gateway.yaml"
    config.write_text(CONFIG.format(base=base_directory, registry=location))
    running = start_gateway(config, config.with_suffix(".log"), ["benchmarks.synthetic"])
    yield running
    if running.process.poll() is None:
        assert stop(running.process) == []
