"""Promise 5: a version is whole or absent, whenever the process is killed."""

from datetime import timedelta
from pathlib import Path

import pytest

from manylora_registry import Registry


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check_whole(registry, adapters, cache):
    """Every version verifies, is known by one event, and comes out as its directory went in."""
    assert registry.verify().problems == ()
    versions = registry.versions("spelling") if registry.adapters() else []
    assert [version.number for version in versions] == list(range(1, len(versions) + 1))
    published = [event for event in registry.events() if event.kind == "published"]
    assert [event.version for event in published] == [version.number for version in versions]
    for version, adapter in zip(versions, adapters, strict=False):
        assert content(registry.materialize(version, cache)) == content(adapter)
    return versions


@pytest.mark.parametrize("writes", ["whole", "torn"])
def test_a_publish_killed_anywhere_leaves_nothing_or_a_whole_version(
    crash, prepared, make_adapter, base, tmp_path, writes
):
    adapter = make_adapter(2)
    places = crash("publish", adapter, writes)

    left = []
    for place in places:
        with Registry.open(place / "registry") as registry:
            left.append(len(check_whole(registry, [prepared, adapter], place / "cache")))
            again = registry.publish("spelling", adapter, base=base)
            assert again.number == 2
            assert len(check_whole(registry, [prepared, adapter], place / "cache")) == 2
    assert sorted(left) == left
    assert set(left) == {1, 2}


def test_the_first_publish_killed_anywhere_leaves_a_usable_registry(
    crash, make_adapter, base, tmp_path
):
    adapter = make_adapter(1)
    places = crash("first publish", adapter, "torn")

    left = []
    for place in places:
        with Registry.open(place / "registry") as registry:
            left.append(len(check_whole(registry, [adapter], place / "cache")))
            registry.publish("spelling", adapter, base=base)
            assert len(check_whole(registry, [adapter], place / "cache")) == 1
    assert set(left) == {0, 1}


@pytest.mark.parametrize("writes", ["whole", "torn"])
def test_an_alias_move_killed_anywhere_happened_or_did_not(
    crash, prepared, make_adapter, base, tmp_path, writes
):
    adapter = make_adapter(2)
    with Registry.open(tmp_path / "prepared" / "registry") as registry:
        registry.publish("spelling", adapter, base=base)
        registry.set_alias("spelling", "production", 1)
    places = crash("alias", adapter, writes)

    left = []
    for place in places:
        with Registry.open(place / "registry") as registry:
            check_whole(registry, [prepared, adapter], place / "cache")
            history = registry.history("spelling")
            left.append(len(history))
            assert registry.resolve("spelling").number == history[-1].version == len(history)
            moves = [event for event in registry.events() if event.kind == "alias_moved"]
            assert len(moves) == len(history)
            registry.set_alias("spelling", "production", 1, expect=len(history))
            assert registry.verify().ok
    assert set(left) == {1, 2}


def test_a_directory_is_materialized_whole_or_not_at_all(crash, prepared):
    places = crash("materialize", prepared, "torn")

    left = []
    for place in places:
        with Registry.open(place / "registry") as registry:
            version = registry.find("spelling@1")
            target = place / "cache" / version.digest.removeprefix("sha256:")
            left.append(target.exists())
            if target.exists():
                assert content(target) == content(prepared)
            assert content(registry.materialize(version, place / "cache")) == content(prepared)
    assert set(left) == {False, True}


def test_bytes_are_on_disk_before_the_name_and_names_before_the_commit(
    crash, prepared, make_adapter, tmp_path
):
    crash("publish", make_adapter(2), "unkilled")
    calls = (tmp_path / "survivor.calls").read_text().splitlines()
    # The survivor was renamed after its run; its log has the name it ran under.
    place = calls[0].split()[1].split("/registry/")[0]
    blobs = f"{place}/registry/blobs/sha256"
    renamed = [
        (n, *call.removeprefix("rename ").split(" -> "))
        for n, call in enumerate(calls)
        if call.startswith("rename") and blobs in call
    ]

    assert len(renamed) == 3
    stored = renamed[-1][0]
    # The lease is taken before the first blob is stored, the version is added after the last.
    wal = [n for n, call in enumerate(calls) if call.startswith("write") and "-wal" in call]
    assert wal[0] < renamed[0][0]
    commit = next(n for n in wal if n > stored)
    for n, source, target in renamed:
        assert f"fsync {source}" in calls[:n]
        last_write = max(i for i, call in enumerate(calls) if call == f"write {source}")
        assert last_write < calls.index(f"fsync {source}")
        above = (blobs, f"{place}/registry/blobs", f"{place}/registry")
        for directory in (str(Path(target).parent), *above):
            assert f"fsync {directory}" in calls[n:commit]
    after_commit = [call for call in calls[commit:] if "-wal" in call]
    assert f"fsync {place}/registry/registry.sqlite-wal" in after_commit


@pytest.mark.parametrize("writes", ["whole", "torn"])
def test_a_collection_killed_anywhere_loses_nothing_that_is_needed(crash, garbage, writes):
    places = crash("gc", garbage, writes)

    left = []
    for place in places:
        with Registry.open(place / "registry") as registry:
            assert registry.verify().problems == ()
            assert registry.resolve("spelling").number == 2
            left.append(registry.find("spelling@1").collected)
            registry.collect_garbage(grace=timedelta(0))
            assert registry.find("spelling@1").collected
            report = registry.verify()
            assert (report.problems, report.unreferenced) == ((), ())
    assert sorted(left) == left
    assert set(left) == {False, True}
