"""A copy is the same registry: numbers, digests, aliases, history, events."""

import contextlib
import os
import signal
import sqlite3
from datetime import timedelta

import pytest

from manylora_registry import Registry
from manylora_registry.errors import CorruptBlobError, DatabaseDamagedError, DestinationError
from manylora_registry.transfer import copy_registry


@pytest.fixture
def filled(registry, base, make_adapter):
    for seed in range(3):
        registry.publish(
            "spelling", make_adapter(seed), base=base, metrics={"f1": seed / 10}, tags={"a": "b"}
        )
    registry.publish("other", make_adapter(0, card="# card"), base=base, lineage={"run": "r"})
    registry.set_alias("spelling", "production", 1, why="first")
    registry.set_alias("other", "production", 1)
    registry.set_alias("spelling", "production", 3, expect=1, why="better")
    registry.yank("spelling@2")
    return registry


@pytest.fixture
def target(tmp_path):
    with Registry.open(tmp_path / "target") as opened:
        yield opened


def everything(registry):
    names = [adapter.name for adapter in registry.adapters()]
    return (
        registry.adapters(),
        [registry.versions(name) for name in names],
        [registry.history(name) for name in names],
        registry.events(),
    )


def test_the_copy_is_the_same_and_goes_on_alike(filled, target, base, make_adapter, tmp_path):
    told = []

    report = copy_registry(filled, target, lambda *progress: told.append(progress))

    assert report.ok
    assert (report.versions, report.moves) == (4, 3)
    assert everything(target) == everything(filled)
    steps = [("copying", done) for done in range(report.blobs + 1)]
    again = [("copying", report.blobs)]  # under the lock, for what was published meanwhile
    steps += again + [("hashing", done + 1) for done in range(report.blobs)]
    assert told == [(what, done, report.blobs) for what, done in steps]
    # New rows continue the ids, the numbers and the hash chain.
    for registry in (filled, target):
        assert registry.publish("spelling", make_adapter(9), base=base).number == 4
        assert registry.set_alias("spelling", "production", 4, expect=2).generation == 3
        assert registry.verify().ok
    assert [event.sequence for event in target.events()] == [
        event.sequence for event in filled.events()
    ]


def test_what_is_copied_already_is_not_copied_again(filled, target):
    copy_registry(filled, target)
    told = []

    assert copy_registry(filled, target, lambda *progress: told.append(progress)).ok

    assert {done == total for what, done, total in told if what == "copying"} == {True}
    assert everything(target) == everything(filled)


def test_a_copy_killed_anywhere_goes_on(filled, target, tmp_path):
    blobs = filled.verify().blobs
    for killed_at in range(blobs + 1):
        child = os.fork()
        if child == 0:

            def die(what, arrived, _total, killed_at=killed_at):
                if what == "copying" and arrived >= killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            # Connections of the parent are not for the child.
            with (
                Registry.open(tmp_path / "registry") as source,
                Registry.open(tmp_path / "target") as into,
            ):
                copy_registry(source, into, die)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL
        assert target.adapters() == []
        assert len(target.verify().unreferenced) == killed_at

    assert copy_registry(filled, target).ok
    assert everything(target) == everything(filled)
    assert target.verify().unreferenced == ()


def test_another_registry_is_not_written_over(filled, target, base, make_adapter):
    target.publish("mine", make_adapter(5), base=base)
    before = everything(target)

    with pytest.raises(DestinationError, match="something else"):
        copy_registry(filled, target)

    assert everything(target) == before
    assert target.verify().ok


def test_a_damaged_blob_is_not_copied(filled, target, tmp_path):
    digest = filled.find("spelling@3").digest
    for blob in (tmp_path / "registry" / "blobs").rglob(digest[7:]):
        blob.chmod(0o644)
        blob.write_bytes(b"{}")

    with pytest.raises(CorruptBlobError):
        copy_registry(filled, target)

    assert target.adapters() == []


def test_damage_is_told_of_the_database_that_has_it(filled, target, tmp_path):
    file = tmp_path / "registry" / "registry.sqlite"
    filled.close()
    with contextlib.closing(sqlite3.connect(file)) as database:
        many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
        database.execute(
            "INSERT INTO events (kind, adapter_id, alias, version, at) "
            f"{many} SELECT 'moved', 1, 'damaged', 1, 1 FROM n"
        )
        database.commit()
    pages = file.read_bytes()
    # Where the last of them lie, so that the first rows can be read.
    page = pages.rindex(b"damaged") // 4096 * 4096
    file.write_bytes(pages[:page] + bytes(4096) + pages[page + 4096 :])

    with pytest.raises(DatabaseDamagedError, match=f"{file} is damaged"):
        copy_registry(filled, target)


def test_what_is_collected_meanwhile_is_left_out(filled, target):
    filled.delete("spelling@2")
    steps = iter([lambda: filled.collect_garbage(grace=timedelta(0))])

    copy_registry(filled, target, lambda *_: next(steps, lambda: None)())

    assert target.find("spelling@2").collected
    assert everything(target) == everything(filled)


def test_whoever_has_a_registry_open_reads_the_copy_that_takes_its_place(
    tmp_path, base, make_adapter
):
    with Registry.open(tmp_path / "registry") as opened:
        opened.publish("spelling", make_adapter(0), base=base)
        with Registry.open(tmp_path / "backup") as backup:
            copy_registry(opened, backup)
        lost = opened.publish("spelling", make_adapter(1), base=base)
        assert opened.find("spelling@2").digest == lost.digest

        (tmp_path / "registry").rename(tmp_path / "lost")
        (tmp_path / "backup").rename(tmp_path / "registry")

        assert [version.number for version in opened.versions("spelling")] == [1]
        again = opened.publish("spelling", make_adapter(2), base=base)
        assert again.number == lost.number
        assert opened.find("spelling@2").digest == again.digest
