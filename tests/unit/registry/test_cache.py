"""The cache of materialized versions: bounded, and never emptied under who uses it."""

import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from manylora_registry import Cache
from manylora_registry.errors import CorruptBlobError, RegistryLocationError


@pytest.fixture
def versions(registry, base, make_adapter):
    return [registry.publish("spelling", make_adapter(seed), base=base) for seed in range(4)]


@pytest.fixture
def cache(tmp_path, versions):
    """Room for two versions of four."""
    return Cache(tmp_path / "cache", limit=2 * versions[0].size + 100)


def take(registry, cache, version):
    """Uses it for a moment."""
    with registry.hold(version, cache) as directory:
        assert {path.name for path in directory.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    return directory


def kept(cache, versions):
    return [
        version.number
        for version in versions
        if (cache.directory / version.digest.removeprefix("sha256:")).exists()
    ]


def test_the_longest_unused_goes_first(registry, cache, versions):
    for number in (0, 1, 0, 2):
        take(registry, cache, versions[number])

    assert kept(cache, versions) == [1, 3]
    assert cache.size() <= cache.limit
    take(registry, cache, versions[3])
    assert kept(cache, versions) == [3, 4]
    assert not [path for path in cache.directory.iterdir() if path.suffix == ".wrong"]


def test_a_disk_that_is_full_below_the_limit_takes_the_longest_unused(
    registry, cache, versions, monkeypatch
):
    """Other files may fill the disk that the copies are on."""
    take(registry, cache, versions[0])
    free = versions[0].size // 2

    def disk_usage(path):
        return SimpleNamespace(free=free if kept(cache, versions) else 2 * versions[0].size)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    take(registry, cache, versions[1])
    assert kept(cache, versions) == [2]


def test_what_is_held_stays_even_over_the_limit(registry, cache, versions):
    with registry.hold(versions[0], cache), registry.hold(versions[1], cache):
        with registry.hold(versions[2], cache):
            assert kept(cache, versions) == [1, 2, 3]
        take(registry, cache, versions[3])
        assert {1, 2} <= {*kept(cache, versions)}
    assert cache.size() <= cache.limit


def test_what_was_over_the_limit_goes_when_it_is_let_go(registry, cache, versions):
    take(registry, cache, versions[0])
    with ExitStack() as later:
        with registry.hold(versions[0], cache):
            for version in versions[1:3]:
                later.enter_context(registry.hold(version, cache))
            assert kept(cache, versions) == [1, 2, 3]
        assert kept(cache, versions) == [2, 3]


def test_to_take_what_is_there_the_others_are_not_looked_at(registry, cache, versions):
    """To look at thousands takes longer than to load one. A look would see what is written here."""
    directories = [take(registry, cache, version) for version in versions[:2]]
    (directories[1] / "more").write_bytes(bytes(cache.limit))

    take(registry, cache, versions[0])
    assert kept(cache, versions) == [1, 2]
    take(registry, cache, versions[2])
    assert kept(cache, versions) == [1, 3]


def test_a_limit_that_was_lowered_counts(registry, cache, versions):
    for version in versions[:2]:
        take(registry, cache, version)

    take(registry, Cache(cache.directory, limit=versions[0].size + 100), versions[1])
    assert kept(cache, versions) == [2]


def test_what_is_there_is_not_made_again(registry, cache, versions):
    first = take(registry, cache, versions[0])
    inodes = {path.name: path.stat().st_ino for path in first.iterdir()}

    assert take(registry, cache, versions[0]) == first
    assert {path.name: path.stat().st_ino for path in first.iterdir()} == inodes


def test_another_living_process_holds_it_and_a_dead_one_does_not(registry, cache, versions):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = registry.hold(versions[0], cache)
        held.__enter__()
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    try:
        for number in (1, 2, 3, 1, 2, 3):
            take(registry, cache, versions[number])
        assert 1 in kept(cache, versions)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    for number in (1, 2, 3):
        take(registry, cache, versions[number])

    assert kept(cache, versions) == [3, 4]


def test_what_the_dead_left_is_removed(registry, cache, versions):
    take(registry, cache, versions[0])
    wrong, old, new = (cache.directory / name for name in (".a.wrong", ".b.partial", ".c.partial"))
    for path in (wrong, old, new):
        path.mkdir()
    long_ago = time.time() - 90_000
    os.utime(old, (long_ago, long_ago))

    take(registry, cache, versions[1])

    assert (wrong.exists(), old.exists(), new.exists()) == (False, False, True)


def test_processes_and_threads_that_take_turns_never_miss_a_file(registry, cache, versions):
    """Room for two of four and eight takers: each finds all files for as long as it holds them."""

    def use(seed, rounds):
        for turn in range(rounds):
            version = versions[(seed * 7 + turn * (seed + 1)) % 4]
            with registry.hold(version, cache) as directory:
                sizes = [path.stat().st_size for path in directory.iterdir()]
                assert sum(sizes) == version.size
                with (directory / "adapter_model.safetensors").open("rb") as file:
                    assert len(file.read()) > 100

    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            try:
                use(seed, 40)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    threads = [threading.Thread(target=use, args=(seed, 20)) for seed in range(4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4

    take(registry, cache, versions[0])
    assert cache.size() <= cache.limit
    hidden = {path.suffix for path in cache.directory.iterdir() if path.is_dir()}
    assert hidden == {""}


def test_a_damaged_version_takes_no_room(registry, cache, versions, tmp_path):
    for blob in (tmp_path / "registry" / "blobs").rglob(versions[0].digest[7:]):
        blob.unlink()

    with pytest.raises(CorruptBlobError), registry.hold(versions[0], cache):
        pass

    assert kept(cache, versions) == []


def test_without_a_directory_the_cache_of_the_environment_is_used(
    registry, versions, tmp_path, monkeypatch
):
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("MANYLORA_CACHE_SIZE", "1B")

    made = [registry.materialize(version) for version in versions]

    assert [path.parent for path in made] == [tmp_path / "elsewhere"] * 4
    assert all(path.is_dir() for path in made)  # Held until the registry is closed.
    assert registry.materialize(versions[0]) == made[0]
    registry.close()
    assert Cache.from_environment().size() == 0


def test_what_is_held_for_a_registry_is_whole_whenever_it_is_asked_for(
    registry, versions, tmp_path, monkeypatch
):
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    config = registry.materialize(versions[0]) / "adapter_config.json"
    written = config.read_text()

    config.chmod(0o644)
    config.write_text("{}")
    registry.materialize(versions[0])
    assert config.read_text() == written

    shutil.rmtree(tmp_path / "cache")
    registry.materialize(versions[0])
    assert config.read_text() == written
    assert Cache.from_environment().size() > 0  # It knows of it, or it would never let it go.
    take(registry, Cache(tmp_path / "cache", limit=1), versions[1])
    assert config.is_file()  # As it is held again.


def test_a_cache_that_was_cleared_under_its_users_is_let_go(
    registry, cache, versions, tmp_path, monkeypatch
):
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "elsewhere"))
    registry.materialize(versions[0])
    shutil.rmtree(tmp_path / "elsewhere")
    with registry.hold(versions[1], cache):
        shutil.rmtree(cache.directory)

    registry.close()

    assert not cache.directory.exists()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("size", ["much", "-1GB", "5 parsecs"])
def test_a_size_that_is_none_is_refused(monkeypatch, size):
    monkeypatch.setenv("MANYLORA_CACHE_SIZE", size)

    with pytest.raises(RegistryLocationError, match="5GB"):
        Cache.from_environment()
