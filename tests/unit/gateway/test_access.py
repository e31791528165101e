"""The tenants' file: who it lets in, and what becomes of a change."""

import logging
import os
from pathlib import Path

import pytest

from manylora_gateway.access import Access, bearer_token, token_digest
from manylora_gateway.errors import PermissionDeniedError, UnauthenticatedError
from manylora_gateway.tenants import TenantLimits
from manylora_registry.errors import ConfigError

SEARCH = f"""
  - name: search
    tokens: ["{token_digest("first")}", "{token_digest("second")}"]
    certificates: [search.example.org]
    adapters: [spelling, "user-*"]
    limits: {{concurrent_requests: 3, tokens_per_second: 100, weight: 2}}
"""
OPERATOR = f"""
  - name: operator
    tokens: ["{token_digest("operator")}"]
    adapters: ["*"]
    roles: [infer, admin]
"""


def write(path: Path, *entries: str) -> Path:
    path.write_text("tenants:" + "".join(entries))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "tenants.yaml", SEARCH, OPERATOR)


def test_each_token_and_certificate_names_its_tenant(path: Path) -> None:
    access = Access(path)
    for token, name in {"first": "search", "second": "search", "operator": "operator"}.items():
        assert access.identify(token, ()).name == name
    search = access.identify(None, ["other.example.org", "search.example.org"])
    assert search.limits == TenantLimits(3, 100.0, 2.0)
    assert search.roles == {"infer"}


@pytest.mark.parametrize("token", ["", "firs", "first ", token_digest("first"), "schlüssel"])
def test_any_other_token_is_nobodys(path: Path, token: str) -> None:
    with pytest.raises(UnauthenticatedError):
        Access(path).identify(token, ())


def test_a_wrong_token_is_not_made_good_by_a_certificate(path: Path) -> None:
    with pytest.raises(UnauthenticatedError):
        Access(path).identify("wrong", ["search.example.org"])


def test_without_anything_it_is_nobody(path: Path) -> None:
    with pytest.raises(UnauthenticatedError):
        Access(path).identify(None, ())


def test_globs_say_which_adapters(path: Path) -> None:
    search, operator = (Access(path).identify(token, ()) for token in ("first", "operator"))
    allowed = {name: search.may_use(name) for name in ("spelling", "user-agent", "speller", "")}
    assert allowed == {"spelling": True, "user-agent": True, "speller": False, "": False}
    assert operator.may_use("")
    with pytest.raises(PermissionDeniedError):
        search.require_adapter("tales@production")
    search.require_adapter("spelling@3")


def test_a_change_counts_from_the_next_call(path: Path) -> None:
    access = Access(path)
    access.identify("first", ())
    write(path, OPERATOR)
    with pytest.raises(UnauthenticatedError):
        access.identify("first", ())
    assert access.identify("operator", ()).name == "operator"


def test_a_change_counts_whatever_time_the_copy_bears(path: Path) -> None:
    access = Access(path)
    times = path.stat()
    # As `cp -p` or `rsync --inplace -t` do with files of equal length out of one archive.
    path.write_text(path.read_text().replace(token_digest("first"), token_digest("third")))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert access.identify("third", ()).name == "search"
    with pytest.raises(UnauthenticatedError):
        access.identify("first", ())


def test_a_change_for_the_worse_changes_nothing_and_is_said_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    access = Access(path)
    for spoil in (lambda: path.write_text("tenants: [{name: 3}]"), path.unlink):
        spoil()
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert access.identify("first", ()).name == "search"
        assert len(caplog.records) == 1
    write(path, OPERATOR)
    with pytest.raises(UnauthenticatedError):
        access.identify("first", ())


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ((SEARCH, SEARCH), "the same name is there twice: search"),
        ((SEARCH, SEARCH.replace("search", "other", 1)), "the same token is there twice"),
        (("\n  - {name: idle, adapters: []}",), "neither tokens nor certificates"),
        ((SEARCH.replace("sha256:", ""),), "tokens.0"),
        (("\n  - {name: idle, certificates: [x]}",), "adapters"),
        ((SEARCH + "    rolls: [admin]\n",), "rolls"),
        ((SEARCH.replace("_second: 100", "_second: 1e-300"),), "tokens_per_second: .* 0.001"),
        ((SEARCH.replace("weight: 2", "weight: 1e-300"),), "weight: .* 0.001"),
        ((SEARCH.replace("_second: 100", "_second: .inf"),), "tokens_per_second: .* finite"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, entries: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Access(write(tmp_path / "tenants.yaml", *entries))


def test_an_authorization_is_a_bearer_token() -> None:
    assert bearer_token(None) is None
    assert bearer_token("bearer  x ") == "x"
    for header in ("", "Bearer", "Bearer ", "Basic abc"):
        with pytest.raises(UnauthenticatedError):
            bearer_token(header)
