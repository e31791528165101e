import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from manylora_registry.errors import CorruptBlobError, DestinationError
from manylora_registry.manifest import load_manifest
from manylora_registry.transfer import export_version


@pytest.fixture
def published(registry, base, make_adapter):
    directory = make_adapter(card="# a card")
    return directory, registry.publish("spelling", directory, base=base)


@pytest.fixture
def blob_of(tmp_path):
    """The stored file of a blob."""

    def find(digest):
        (path,) = (tmp_path / "registry" / "blobs").rglob(digest.removeprefix("sha256:"))
        return path

    return find


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip(path, at=-1):
    """Changes one bit, keeping size and times."""
    before = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_files_come_out_as_they_went_in(registry, published, tmp_path):
    directory, version = published

    made = registry.materialize(version, tmp_path / "cache")

    assert made == tmp_path / "cache" / version.digest.removeprefix("sha256:")
    assert content(made) == content(directory)


def test_it_is_made_once(registry, published, tmp_path):
    _, version = published
    first = registry.materialize(version, tmp_path / "cache")
    inodes = {path.name: path.stat().st_ino for path in first.iterdir()}

    assert registry.materialize(version, tmp_path / "cache") == first
    assert {path.name: path.stat().st_ino for path in first.iterdir()} == inodes


@pytest.mark.parametrize(
    "title", ["manifest", "adapter_config.json", "adapter_model.safetensors", "README.md"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "gone"])
def test_a_damaged_blob_is_detected_and_leaves_nothing(
    registry, published, tmp_path, blob_of, title, damage
):
    _, version = published
    manifest = load_manifest(registry.blobs, version.digest)
    digests = {"manifest": version.digest, **{file.title: file.digest for file in manifest.files}}
    blob = blob_of(digests[title])
    blob.chmod(0o644)
    if damage == "flipped":
        flip(blob)
    elif damage == "cut":
        blob.write_bytes(blob.read_bytes()[:-1])
    elif damage == "longer":
        blob.write_bytes(blob.read_bytes() + b"x")
    else:
        blob.unlink()

    with pytest.raises(CorruptBlobError) as failed:
        registry.materialize(version, tmp_path / "cache")
    with pytest.raises(CorruptBlobError):
        export_version(registry, version, tmp_path / "out")

    assert failed.value.digest == digests[title]
    assert [path for path in tmp_path.glob("cache/*") if path.is_dir()] == []
    assert not (tmp_path / "out").exists()
    report = registry.verify()
    assert not report.ok
    assert [problem.path for problem in report.problems] == ["spelling@1"]


def test_publishing_again_heals_a_damaged_blob(registry, base, published, tmp_path, blob_of):
    directory, version = published
    flip(blob_of(version.digest))

    assert registry.publish("spelling", directory, base=base) == version
    assert registry.verify().ok
    assert content(registry.materialize(version, tmp_path / "cache")) == content(directory)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "stray", "linked"])
def test_a_damaged_directory_is_noticed_and_replaced(registry, published, tmp_path, damage):
    directory, version = published
    made = registry.materialize(version, tmp_path / "cache")
    weights = made / "adapter_model.safetensors"
    if damage == "flipped":
        flip(weights)
    elif damage == "cut":
        os.truncate(weights, 100)
    elif damage == "gone":
        weights.unlink()
    elif damage == "stray":
        (made / "evil.bin").touch()
    else:
        weights.unlink()
        weights.symlink_to(directory / weights.name)

    assert registry.materialize(version, tmp_path / "cache") == made
    assert content(made) == content(directory)
    assert not weights.is_symlink()


def test_an_export_publishes_to_the_same_digest(registry, base, published, tmp_path):
    _, version = published
    export_version(registry, version, tmp_path / "out")

    assert registry.publish("other", tmp_path / "out", base=base).digest == version.digest


def test_an_export_overwrites_nothing(registry, published, tmp_path):
    _, version = published
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "novel.txt").write_text("mine")

    with pytest.raises(DestinationError):
        export_version(registry, version, tmp_path / "out")

    assert content(tmp_path / "out") == {"novel.txt": b"mine"}


def test_threads_that_want_the_same_version_share_one_copy(registry, published, tmp_path):
    directory, version = published
    for attempt in range(5):
        cache = tmp_path / f"cache-{attempt}"
        together = threading.Barrier(8)

        def make(cache=cache, together=together):
            together.wait()
            return registry.materialize(version, cache)

        with ThreadPoolExecutor(8) as threads:
            made = [work.result() for work in [threads.submit(make) for _ in range(8)]]

        assert len(set(made)) == 1
        assert content(made[0]) == content(directory)
        assert [path for path in cache.iterdir() if path.is_dir()] == [made[0]]
