"""A gateway's file: every mistake at once, nothing heavy imported, paths relative to it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from manylora_gateway.access import AccessConfig
from manylora_gateway.config import EngineConfig, GatewayConfig
from manylora_registry.config import load_config
from manylora_registry.errors import ConfigError


def write(directory: Path, text: str) -> Path:
    path = directory / "gateway.yaml"
    path.write_text(text)
    return path


def test_a_base_is_all_that_must_be_said(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "base: model"), GatewayConfig)
    assert config.listen.inference == "127.0.0.1:50051"
    assert config.engine.replicas == 1


def test_every_mistake_comes_at_once_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\n".join(
            (
                "base: model",
                "listen: {inference: nowhere}",
                "engine:",
                "  max_rank: 17",
                "  slotz: 3",
                "follow: {poll_s: 0}",
            )
        ),
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, GatewayConfig)
    assert {(problem.path, problem.line) for problem in caught.value.problems} == {
        ("listen.inference", 2),
        ("engine.max_rank", 4),
        ("engine.slotz", 5),
        ("follow.poll_s", 6),
    }


def test_a_port_has_sixteen_bits(tmp_path: Path) -> None:
    path = write(tmp_path, '{base: model, listen: {admin: "[::1]:65535", http: "a:65536"}}')
    with pytest.raises(ConfigError, match="at most 65535") as caught:
        load_config(path, GatewayConfig)
    assert [problem.path for problem in caught.value.problems] == ["listen.http"]


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":50051", "::1:50051", "a b:1"])
def test_what_is_no_address_is_told_what_one_looks_like(tmp_path: Path, address: str) -> None:
    path = write(tmp_path, f'{{base: model, listen: {{inference: "{address}"}}}}')
    with pytest.raises(ConfigError, match="is no HOST:PORT, such as") as caught:
        load_config(path, GatewayConfig)
    assert [problem.path for problem in caught.value.problems] == ["listen.inference"]


def test_an_application_needs_the_cluster_it_is_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ray_address"):
        load_config(write(tmp_path, "{base: model, ray_application: manylora}"), GatewayConfig)


def test_paths_are_read_from_the_files_place(tmp_path: Path) -> None:
    text = (
        "{base: ../bases/small, registry: registry, cache: /var/cache/adapters, tenants: who.yaml,"
        " tls: {certificate: cert.pem, key: /etc/key.pem}}"
    )
    config = load_config(write(tmp_path, text), GatewayConfig).relative_to(tmp_path)
    assert config.base == tmp_path / "../bases/small"
    assert config.registry == tmp_path / "registry"
    assert config.cache == Path("/var/cache/adapters")
    assert config.tenants == tmp_path / "who.yaml"
    assert config.tls is not None
    assert config.tls.certificate == tmp_path / "cert.pem"
    assert config.tls.key == Path("/etc/key.pem")


@pytest.mark.parametrize(
    ("base", "name"),
    [("model", "model"), ("link", "link"), ("model/", "model"), ("model/../link/.", "link")],
)
def test_the_base_is_called_as_the_file_calls_it(tmp_path: Path, base: str, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    config = load_config(write(tmp_path, f"base: {base}"), GatewayConfig).relative_to(tmp_path)
    assert config.base_name == name


def test_reading_a_config_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'grpc'}"
    code = f"import sys, manylora_gateway.config; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("file", [GatewayConfig, AccessConfig])
def test_every_setting_is_described(file: type[BaseModel]) -> None:
    assert list(undescribed(file)) == []


def undescribed(section: type[BaseModel]) -> Iterator[str]:
    """Settings of `section`, and of those in it, without a docstring."""
    for name, field in section.model_fields.items():
        if not field.description:
            yield f"{section.__name__}.{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from undescribed(kind)


def test_a_step_of_a_cpu_is_short_and_has_room_for_all_seats() -> None:
    assert EngineConfig().on(gpus=1).max_batched_tokens is None
    assert EngineConfig().on(gpus=0).max_batched_tokens == 256
    many = EngineConfig(max_concurrent=1000)
    assert many.on(gpus=0).max_batched_tokens == 1000 + many.express_seats
    assert EngineConfig(max_batched_tokens=90).on(gpus=0).max_batched_tokens == 90
