"""Which registry is meant, and that nothing secret is said about it."""

from pathlib import Path
from typing import Any

import pytest

from manylora_registry import Registry
from manylora_registry.errors import DatabaseUnavailableError, RegistryLocationError

SECRET = "hunter2"
URL = f"postgresql+psycopg://ann:{SECRET}@127.0.0.1:1/registry?password={SECRET}"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for variable in ("MANYLORA_REGISTRY", "MANYLORA_REGISTRY_DATABASE", "MANYLORA_REGISTRY_BLOBS"):
        monkeypatch.delenv(variable, raising=False)


def test_a_shared_registry_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYLORA_REGISTRY_DATABASE", f"sqlite:///{tmp_path / 'r.sqlite'}")
    monkeypatch.setenv("MANYLORA_REGISTRY_BLOBS", (tmp_path / "bytes").as_uri())

    with Registry.open() as registry:
        assert registry.adapters() == []
    assert (tmp_path / "r.sqlite").is_file()


def test_a_directory_that_is_given_overrides_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYLORA_REGISTRY_DATABASE", URL)
    monkeypatch.setenv("MANYLORA_REGISTRY_BLOBS", "file:///nowhere")

    Registry.open(tmp_path / "here").close()
    assert (tmp_path / "here" / "registry.sqlite").is_file()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "MANYLORA_REGISTRY=DIR"),
        ({"DATABASE": URL}, "MANYLORA_REGISTRY_BLOBS"),
        ({"BLOBS": "file:///x"}, "MANYLORA_REGISTRY_DATABASE"),
        ({"DATABASE": URL, "BLOBS": "file:///x", "": "here"}, "two registries"),
    ],
)
def test_none_half_or_two_registries_are_refused(monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(f"MANYLORA_REGISTRY_{name}".rstrip("_"), value)

    with pytest.raises(RegistryLocationError, match=said):
        Registry.open()


@pytest.mark.parametrize(
    "database",
    [
        f"mysql://ann:{SECRET}@host/registry",
        f"postgresql://ann:{SECRET}@host",
        f"postgres ql://ann:{SECRET}@host",
        f"postgresql://ann:{SECRET}@host:port/registry",
        SECRET,
    ],
)
def test_a_wrong_database_is_refused_without_repeating_its_password(database):
    with pytest.raises(RegistryLocationError) as refused:
        Registry.open(database=database, blobs="file:///x")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("blobs", ["ftp://x", f"https://ann:{SECRET}@host/x", "file:", "/dir"])
def test_wrong_blobs_are_refused(tmp_path, blobs):
    with pytest.raises(RegistryLocationError) as refused:
        Registry.open(database=f"sqlite:///{tmp_path / 'r.sqlite'}", blobs=blobs)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("part", ["location", "database", "blobs"])
def test_a_nul_is_refused(tmp_path, part):
    shared = {"database": f"sqlite:///{tmp_path}/a", "blobs": tmp_path.as_uri()}
    named: dict[str, Any] = (
        {part: "a\0b"} if part == "location" else {**shared, part: f"{shared[part]}\0"}
    )

    with pytest.raises(RegistryLocationError, match="NUL"):
        Registry.open(**named)


def test_an_unreachable_database_is_one_line_without_its_password():
    with pytest.raises(DatabaseUnavailableError) as refused:
        Registry.open(database=URL, blobs="file:///x")
    assert SECRET not in str(refused.value)
    assert "127.0.0.1" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_registry_is_made_where_none_should_be(tmp_path):
    file = tmp_path / "r.sqlite"
    with pytest.raises(RegistryLocationError, match="no registry"):
        Registry.open(database=f"sqlite:///{file}", blobs=tmp_path.as_uri(), create=False)
    assert not file.exists()
    with pytest.raises(RegistryLocationError):
        Registry.open(database=f"sqlite:///{tmp_path / 'no' / 'r'}", blobs=tmp_path.as_uri())


@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_directory_and_is_not_repeated(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(RegistryLocationError, match="MANYLORA_REGISTRY_DATABASE") as caught:
        Registry.open(kind(URL))
    assert SECRET not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_credentials_in_the_url_of_a_bucket_are_refused_and_not_repeated(tmp_path):
    with pytest.raises(RegistryLocationError, match="s3://BUCKET/PREFIX") as caught:
        Registry.open(
            database=f"sqlite:///{tmp_path / 'r.sqlite'}", blobs=f"s3://ann:{SECRET}@bucket/prefix"
        )
    assert SECRET not in str(caught.value)


def test_an_option_of_a_database_url_that_is_wrong_is_one_error_without_its_value(tmp_path):
    pytest.importorskip("psycopg")
    for url in (
        f"postgresql://ann@127.0.0.1:1/registry?nonsense={SECRET}",
        f"sqlite:///{tmp_path / 'r.sqlite'}?timeout={SECRET}",
    ):
        with pytest.raises(RegistryLocationError, match="option") as caught:
            Registry.open(database=url, blobs=tmp_path.as_uri())
        assert SECRET not in str(caught.value)
