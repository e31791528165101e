"""Deleting, leases and garbage collection: nothing that is needed goes, nothing else stays."""

import contextlib
import hashlib
from datetime import timedelta
from typing import cast

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from manylora_registry import Registry, schema
from manylora_registry.blobs import BlobStore
from manylora_registry.database import Database
from manylora_registry.errors import (
    DeletedError,
    LeaseExpiredError,
    VersionInUseError,
    VersionNotFoundError,
)
from manylora_registry.stores import open_blob_store

NOW = timedelta(0)


@pytest.fixture
def blobs(place):
    return open_blob_store(place.blobs)


def test_a_deleted_version_gives_up_its_own_bytes_and_keeps_its_record(
    registry, publish, blobs, tmp_path
):
    first, second = publish(1, metrics={"loss": 0.1}), publish(2)
    registry.set_alias("spelling", "production", 1)
    registry.set_alias("spelling", "production", 2)
    registry.yank("spelling@1")
    before = set(blobs.digests())

    assert registry.delete("spelling@1").deleted
    with pytest.raises(DeletedError):
        registry.resolve("spelling@1")
    assert registry.collect_garbage(grace=timedelta(hours=1)).deleted == ()
    report = registry.collect_garbage(grace=NOW)

    # Both adapters have the same config, which the second still needs.
    assert report.collected == ("spelling@1",)
    assert len(report.deleted) == 2
    assert report.freed > 0
    assert set(blobs.digests()) == before - set(report.deleted)
    gone = registry.find("spelling@1")
    assert (gone.collected, gone.metrics) == (True, {"loss": 0.1})
    assert [version.number for version in registry.versions("spelling")] == [1, 2]
    assert len(registry.history("spelling")) == 2
    with pytest.raises(DeletedError):
        registry.materialize(first, tmp_path / "cache")
    registry.materialize(second, tmp_path / "cache")
    assert registry.verify().problems == ()
    kinds = [event.kind for event in registry.events() if event.version == 1]
    assert kinds == ["published", "alias_moved", "yanked", "deleted", "collected"]


def test_publishing_the_same_files_restores_a_deleted_version(registry, publish, tmp_path):
    first = publish(1)
    for collected in (False, True):
        registry.delete("spelling@1")
        if collected:
            registry.collect_garbage(grace=NOW)
        assert publish(1) == first
    registry.materialize(registry.resolve("spelling@1"), tmp_path / "cache")
    assert registry.verify().ok
    assert [event.kind for event in registry.events()].count("restored") == 2


def test_an_alias_keeps_its_version_from_being_deleted(registry, publish):
    publish(1)
    publish(2)
    registry.set_alias("spelling", "production", 1)

    with pytest.raises(VersionInUseError, match="production"):
        registry.delete("spelling@1")
    registry.delete("spelling@2")
    with pytest.raises(DeletedError):
        registry.set_alias("spelling", "production", 2)
    registry.collect_garbage(grace=NOW)
    assert registry.resolve("spelling").number == 1


def test_a_version_that_a_rollback_goes_to_is_deleted_only_once_it_was_yanked(registry, publish):
    for number in (1, 2, 3):
        publish(number)
        registry.set_alias("spelling", "production", number)

    with pytest.raises(VersionInUseError, match=r"a rollback of production goes.* registry yank"):
        registry.delete("spelling@2")
    assert registry.delete("spelling@1").deleted
    assert registry.rollback("spelling", "production").version == 2
    # Where it was rolled back to there is no further way back.
    registry.delete("spelling@3")
    publish(4)
    registry.set_alias("spelling", "production", 4)
    registry.yank("spelling@2")
    assert registry.delete("spelling@2").deleted


def test_a_child_keeps_its_parent(registry, publish):
    publish(1)
    child = publish(2, name="other", parent="spelling@1")
    assert child.parent == "spelling@1"
    with pytest.raises(VersionNotFoundError):
        publish(3, parent="spelling@9")
    assert registry.verify().unreferenced == ()

    registry.delete("spelling@1")
    report = registry.collect_garbage(grace=NOW)
    assert report.collected == ()
    assert "other@1" in str(report.kept[0])
    registry.delete("other@1")
    assert registry.collect_garbage(grace=NOW).collected == ("spelling@1", "other@1")


def test_a_lease_keeps_a_version_until_it_is_released_or_runs_out(registry, publish, tmp_path):
    version = publish(1)
    with registry.lease(version, holder="replica 7") as lease:
        registry.delete(version)
        report = registry.collect_garbage(grace=NOW)
        assert "replica 7" in str(report.kept)
        registry.materialize(version, tmp_path / "cache")
        taken = lease.expires_at
        lease.renew(seconds=2 * 3600)
        assert lease.expires_at - taken >= timedelta(hours=1)
    registry.collect_garbage(grace=NOW)
    with pytest.raises(DeletedError):
        registry.lease(version)

    publish(1)
    lease = registry.lease(version, seconds=0)
    with pytest.raises(LeaseExpiredError):
        lease.renew()
    registry.delete(version)
    assert registry.collect_garbage(grace=NOW).collected == ("spelling@1",)
    with pytest.raises(LeaseExpiredError):
        lease.renew()
    lease.release()


def test_blobs_nobody_needs_wait_out_their_grace(registry, publish, blobs, base, make_adapter):
    publish(1)
    with blobs.staging() as staging:
        file = staging.directory / "file"
        file.write_bytes(b"left over")
        digest = "sha256:" + hashlib.sha256(b"left over").hexdigest()
        staging.put({digest: file})

    assert registry.verify().unreferenced == (digest,)
    report = registry.collect_garbage(grace=timedelta(hours=1))
    assert (report.waiting, report.deleted) == (1, ())
    dry = registry.collect_garbage(grace=NOW, dry_run=True)
    assert dry.deleted == (digest,)
    assert digest in set(blobs.digests())
    assert registry.collect_garbage(grace=NOW) == dry
    assert registry.collect_garbage(grace=NOW).deleted == ()
    assert registry.verify().unreferenced == ()


def test_a_dry_run_changes_nothing(registry, publish, blobs):
    publish(1)
    registry.delete("spelling@1")
    before, events = set(blobs.digests()), registry.events()

    report = registry.collect_garbage(grace=NOW, dry_run=True)

    assert report.collected == ("spelling@1",)
    assert set(report.deleted) == before == set(blobs.digests())
    assert registry.events() == events
    assert not registry.find("spelling@1").collected


class _CollectedMeanwhile:
    """A store of blobs, or its staging, whose registry is collected after each blob."""

    def __init__(self, real, collect):
        self._real = real
        self._collect = collect

    def __getattr__(self, name):
        return getattr(self._real, name)

    @contextlib.contextmanager
    def staging(self):
        with self._real.staging() as staging:
            yield _CollectedMeanwhile(staging, self._collect)

    def put(self, files):
        for digest, file in files.items():
            self._real.put({digest: file})
            self._collect()


def collected_meanwhile(store, collect) -> BlobStore:
    return cast("BlobStore", _CollectedMeanwhile(store, collect))


def test_an_upload_under_way_is_not_collected(registry, place, blobs, base, make_adapter, tmp_path):
    def collect():
        registry.collect_garbage(grace=NOW)

    database = Database(make_url(place.database))
    with Registry(collected_meanwhile(blobs, collect), database) as publisher:
        adapter = make_adapter(1)
        for _ in range(2):
            version = publisher.publish("spelling", adapter, base=base)
            registry.materialize(registry.resolve("spelling@1"), tmp_path / "cache")
            assert registry.verify().problems == ()
            registry.delete(version)


def test_an_upload_whose_lease_was_collected_publishes_nothing(
    registry, place, blobs, base, make_adapter
):
    def a_day_later():
        engine = sa.create_engine(place.database)
        with engine.begin() as raw:
            raw.execute(sa.update(schema.leases).values(expires_at=0))
        engine.dispose()
        registry.collect_garbage(grace=NOW)

    database = Database(make_url(place.database))
    adapter = make_adapter(1)
    with (
        Registry(collected_meanwhile(blobs, a_day_later), database) as publisher,
        pytest.raises(LeaseExpiredError),
    ):
        publisher.publish("spelling", adapter, base=base)
    assert registry.adapters() == []
    registry.publish("spelling", adapter, base=base)
    assert registry.verify().problems == ()


@pytest.mark.parametrize("place", ["local"], indirect=True)
def test_staging_that_was_left_over_goes_and_staging_in_use_stays(registry, blobs):
    with blobs.staging() as used:
        (used.directory / "file").write_bytes(b"")
        left = used.directory.parent / "dead"
        left.mkdir()
        registry.collect_garbage(grace=timedelta(hours=1))
        assert left.exists()
        registry.collect_garbage(grace=NOW)
        assert (used.directory / "file").exists()
        assert not left.exists()


def test_a_damaged_blob_is_set_aside_and_publishing_again_heals_it(registry, publish, place, blobs):
    version = publish(1)
    publish(2)
    with blobs.staging() as staging:
        file = staging.directory / "file"
        file.write_bytes(b"something else")
        staging.put({version.digest: file})

    found = registry.verify()
    assert (found.affected, found.set_aside) == (("spelling@1",), ())
    repaired = registry.verify(repair=True)
    assert (repaired.affected, repaired.set_aside) == (("spelling@1",), (version.digest,))
    assert version.digest not in set(blobs.digests())
    assert "missing" in str(registry.verify().problems)
    publish(1)
    assert registry.verify().ok
