"""Disks and databases that fail, and questions no registry can answer: one typed error each."""

import json
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from manylora_registry import BaseModelIdentity, Registry
from manylora_registry.errors import (
    BlobStoreError,
    CorruptBlobError,
    DatabaseDamagedError,
    DatabaseUnavailableError,
    DescriptionError,
    DestinationError,
    InvalidAdapterError,
    InvalidNameError,
    LeaseError,
    QueryError,
)

BASE = BaseModelIdentity("sha256:" + "b" * 64, {"model.q_proj.weight": (1 << 16, 1 << 16)})


@pytest.fixture
def version(registry, base, make_adapter):
    return registry.publish("spelling", make_adapter(), base=base)


@pytest.fixture
def large(tmp_path):
    """An adapter of 1 MiB."""
    directory = tmp_path / "large"
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": np.ones((2, 1 << 16), np.float32),
        f"{prefix}.lora_B.weight": np.ones((1 << 16, 2), np.float32),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@contextmanager
def no_file_longer_than(count):
    """A disk as good as full, for files that are written meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=[750_000, 1], ids=["much", "one byte"])
def full_disk(request, large):
    """A disk on which there is not enough room for the weights."""
    size = (large / "adapter_model.safetensors").stat().st_size
    return lambda: no_file_longer_than(size - request.param)


def blob_of(tmp_path, digest):
    (path,) = (tmp_path / "registry" / "blobs").rglob(digest.removeprefix("sha256:"))
    return path


@pytest.mark.parametrize("damage", ["another file", "cut in half"])
def test_a_damaged_database_is_told(registry, version, tmp_path, damage):
    registry.close()
    copy = shutil.copytree(tmp_path / "registry", tmp_path / "copy")
    file = copy / "registry.sqlite"
    content = file.read_bytes()
    file.write_bytes(
        b"garbage" * 1000 if damage == "another file" else content[: -len(content) // 2]
    )

    with pytest.raises(DatabaseDamagedError, match=r"registry.sqlite is damaged: .* from a backup"):
        Registry.open(copy).adapters()


def test_a_blob_the_disk_cannot_read_is_damaged_and_the_check_goes_on(registry, version, tmp_path):
    path = blob_of(tmp_path, version.digest)
    path.unlink()
    # Its first byte belongs to no page: reading it fails as a bad sector does.
    path.symlink_to("/proc/self/mem")

    with pytest.raises(CorruptBlobError, match="cannot be read"):
        registry.materialize(version, tmp_path / "cache")
    report = registry.verify()

    assert report.affected == ("spelling@1",)
    assert report.blobs == 3


def _full_directory(path):
    path.mkdir()
    (path / "of somebody").touch()


def _link_to_a_device(path):
    path.symlink_to("/dev/zero")


def _link_to_itself(path):
    path.symlink_to(path)


@pytest.fixture(params=[_full_directory, os.mkfifo, _link_to_a_device, _link_to_itself])
def no_file(request, version, tmp_path):
    """Puts what is no file in the place of a blob; can do it again."""

    def put():
        path = blob_of(tmp_path, version.digest)
        path.unlink()
        request.param(path)

    put()
    return put


def test_what_is_no_file_in_the_place_of_a_blob_is_damage_and_can_be_repaired(
    registry, version, base, make_adapter, tmp_path, no_file
):
    with pytest.raises(CorruptBlobError, match="is no file"):
        registry.materialize(version, tmp_path / "cache")
    for _ in range(2):
        report = registry.verify(repair=True)

        assert (report.affected, report.blobs) == (("spelling@1",), 3)
        assert report.set_aside == (version.digest,)
        registry.publish("spelling", make_adapter(), base=base)
        assert registry.verify().ok
        no_file()


def test_a_directory_in_the_place_of_a_new_blob_is_named(
    registry, version, base, make_adapter, tmp_path
):
    path = blob_of(tmp_path, version.digest)
    path.unlink()
    path.mkdir()

    with pytest.raises(BlobStoreError, match=f"{path.name} is a directory where a blob belongs"):
        registry.publish("spelling", make_adapter(), base=base)


def test_blobs_on_another_file_system_than_what_arrives_say_so(
    registry, base, make_adapter, tmp_path
):
    blobs = tmp_path / "registry" / "blobs"
    here = tmp_path.stat().st_dev
    others = (Path("/dev/shm"), Path.home(), Path("/tmp"))
    elsewhere = next(place for place in others if place.stat().st_dev != here)
    with tempfile.TemporaryDirectory(dir=elsewhere) as directory:
        blobs.symlink_to(directory)

        with pytest.raises(BlobStoreError, match="incoming and blobs must lie on one file system"):
            registry.publish("spelling", make_adapter(), base=base)
    assert registry.adapters() == []


def test_what_is_no_file_in_the_place_of_a_blob_is_collected(registry, version, no_file):
    registry.delete(version)

    registry.collect_garbage(grace=timedelta())
    registry.collect_garbage(grace=timedelta())

    assert registry.verify().ok
    assert list(registry.blobs.digests()) == []


@pytest.mark.parametrize("put", [Path.touch, os.mkfifo])
def test_what_somebody_put_among_arriving_files_stays(registry, version, tmp_path, put):
    stray = tmp_path / "registry" / "incoming" / ".nfs0001"
    put(stray)

    registry.collect_garbage(grace=timedelta())

    assert stray.exists()


def test_blobs_that_cannot_be_opened_or_written_are_told(
    registry, version, base, make_adapter, tmp_path
):
    blobs = tmp_path / "registry" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.touch()

    for action in (
        lambda: registry.materialize(version, tmp_path / "cache"),
        lambda: registry.publish("spelling", make_adapter(1), base=base),
    ):
        with pytest.raises(BlobStoreError, match="Not a directory"):
            action()
    assert len(registry.versions("spelling")) == 1


def test_a_store_that_is_gone_as_a_whole_is_away_and_not_damaged(registry, version, tmp_path):
    blobs = tmp_path / "registry" / "blobs"
    away = blobs.rename(tmp_path / "away")
    with pytest.raises(BlobStoreError, match="cannot be read: No such file"):
        registry.materialize(version, tmp_path / "cache")
    away.rename(blobs)
    assert registry.materialize(version, tmp_path / "cache").is_dir()


def test_a_disk_that_fills_up_publishes_nothing(registry, large, full_disk):
    with full_disk(), pytest.raises(BlobStoreError, match="make room"):
        registry.publish("spelling", large, base=BASE)

    assert registry.adapters() == []
    assert registry.verify().unreferenced == ()
    assert registry.publish("spelling", large, base=BASE).number == 1


def test_a_disk_that_fills_up_materializes_nothing(registry, large, full_disk, tmp_path):
    version = registry.publish("spelling", large, base=BASE)

    with full_disk(), pytest.raises(DestinationError, match="make room"):
        registry.materialize(version, tmp_path / "cache")

    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert registry.materialize(version, tmp_path / "cache").is_dir()


def test_a_place_that_is_no_directory_is_told(registry, version, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(DestinationError, match=r"spelling@1 cannot be written to .*file"):
        registry.materialize(version, tmp_path / "file")


def test_a_sparse_file_is_refused_before_it_is_copied(registry, large):
    with (large / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)

    with no_file_longer_than(1 << 20), pytest.raises(InvalidAdapterError, match="is larger than"):
        registry.publish("spelling", large, base=BASE)


@pytest.mark.parametrize("text", ["\udcff", 'name="\0"'])
def test_what_no_database_can_be_asked_is_refused(registry, version, text):
    for query in ({"where": f"name={text}"}, {"sort": f"tag.{text}"}):
        with pytest.raises(QueryError, match="no character"):
            registry.find_versions(**query)
    with pytest.raises(InvalidNameError):
        registry.adapters(after=text)


def test_numbers_beyond_every_database_are_answered(registry, version):
    assert registry.events(10**30) == []
    assert [event.version for event in registry.events(-(10**30))] == [1]


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1.0, 1e300])
def test_a_lease_has_an_end(registry, version, seconds):
    with pytest.raises(LeaseError, match="a lease lasts from 0 to"):
        registry.lease(version, seconds=seconds)


def test_a_record_that_is_nested_without_end_is_refused(registry, version):
    nested: dict[str, object] = {}
    for _ in range(100_000):
        nested = {"more": nested}

    with pytest.raises(DescriptionError, match="is not JSON"):
        registry.record_evaluation(version, "nightly", nested, True)


def test_a_disk_too_full_for_a_new_registry_is_one_error(tmp_path):
    with no_file_longer_than(100), pytest.raises(DatabaseUnavailableError):
        Registry.open(tmp_path / "registry")

    Registry.open(tmp_path / "registry").close()


def test_a_disk_too_full_to_read_a_registry_says_so(registry, version, tmp_path):
    registry.close()

    with (
        no_file_longer_than(100),
        pytest.raises(DatabaseUnavailableError, match="disk I/O error; make room, then repeat"),
    ):
        Registry.open(tmp_path / "registry")

    with Registry.open(tmp_path / "registry") as opened:
        assert opened.find("spelling@1") == version


def test_a_database_sqlite_cannot_write_beside_says_what_it_needs(registry, tmp_path):
    registry.close()
    (tmp_path / "registry" / "registry.sqlite-wal").mkdir()

    with pytest.raises(DatabaseUnavailableError, match="must be writable"):
        Registry.open(tmp_path / "registry")
