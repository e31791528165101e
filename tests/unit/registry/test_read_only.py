"""A registry that its reader may not write to can be read, and only read."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_registry import Registry
from manylora_registry.errors import DatabaseUnavailableError
from manylora_registry.transfer import export_version

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A registry's directory that everybody may enter, unlike what is below pytest's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory / "registry"
    shutil.rmtree(directory)


@pytest.fixture
def registry(place):
    with Registry.open(place) as opened:
        yield opened


@contextlib.contextmanager
def reader(place: Path) -> Iterator[None]:
    """As somebody who may not write to the registry; root may write to all."""
    place.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        place.chmod(0o755)


def test_what_nobody_writes_to_is_read(registry, place, make_adapter, base):
    version = registry.publish("spelling", make_adapter(), base=base)
    registry.set_alias("spelling", "production", 1)
    registry.close()
    out = place.parent / "out"
    out.mkdir()
    out.chmod(0o777)

    with reader(place), Registry.open(place, create=False) as read:
        assert read.resolve("spelling") == version
        assert [adapter.latest for adapter in read.adapters()] == [version]
        assert [move.version for move in read.history("spelling")] == [1]
        assert read.verify().ok
        export_version(read, version, out / "spelling")
        assert [change.change for change in read.diff(version, version).modules] == [0, 0]
        with pytest.raises(DatabaseUnavailableError, match="must be writable"):
            read.set_alias("spelling", "production", 1)
    assert {path.name for path in (out / "spelling").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_what_others_write_meanwhile_is_seen(registry, place, make_adapter, base):
    registry.publish("spelling", make_adapter(), base=base)
    registry.close()
    with reader(place):
        read = Registry.open(place, create=False)
        assert read.aliases("spelling") == {}

    with Registry.open(place) as writer:
        writer.set_alias("spelling", "production", 1)
        with reader(place):
            # It lies in the log and not in the file yet.
            assert read.resolve("spelling").number == 1
        writer.set_alias("spelling", "canary", 1)
    with reader(place), read:
        assert set(read.aliases("spelling")) == {"production", "canary"}


def test_it_stays_where_it_was_named_from(registry, place, make_adapter, base, monkeypatch):
    registry.publish("spelling", make_adapter(), base=base)
    registry.close()

    monkeypatch.chdir(place.parent)
    with reader(place), Registry.open(place.name, create=False) as read:
        monkeypatch.chdir("/")
        assert read.verify().ok
