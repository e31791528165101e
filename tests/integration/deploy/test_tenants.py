"""Stages whose gateways let in only who shows a token."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_registry import BaseModelIdentity
from tests.integration.deploy.conftest import World, two_stages

TENANTS = """
tenants:
  - {{name: operators, tokens: ["sha256:{operators}"], adapters: ["*", ""], roles: [infer, admin]}}
  - {{name: search, tokens: ["sha256:{search}"], adapters: ["*"]}}
"""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return tmp_path / "token"


@pytest.fixture
def closed(
    tmp_path: Path, token_file: Path, base_directory: Path, base: BaseModelIdentity
) -> Iterator[World]:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("operators", "search")}
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(TENANTS.format(**digests))
    with two_stages(tmp_path, base_directory, base, tenants, token_file) as world:
        world.token = "search"
        yield world


def test_a_version_goes_all_the_way_by_the_token_of_operators(
    closed: World, token_file: Path
) -> None:
    name = closed.adapter()
    line = closed.scripts.refused("candidate", f"{name}@2")
    assert f"{token_file}: the token of staging cannot be read" in line
    token_file.write_text("nobody")
    assert "token" in closed.scripts.refused("candidate", f"{name}@2")
    assert "staging" not in closed.registry.aliases(name)

    token_file.write_text("operators\n")
    with closed.client(name):
        closed.scripts.good("candidate", f"{name}@2")
        token_file.write_text("search\n")
        assert "admin" in closed.scripts.refused("promote", name)
        assert closed.outcomes(name, "promote") == []
        token_file.write_text("operators\n")
        closed.scripts.good("promote", name)
        assert closed.serving(name) == 2
        closed.scripts.good("rollback", name, "--stage", "production")
    assert closed.serving(name) == 1
    assert "operators" not in closed.scripts.good("history", "--json")
