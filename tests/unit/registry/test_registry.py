"""Versions, aliases, events: what one process sees."""

import dataclasses
import threading
from datetime import UTC, datetime, timedelta

import pytest

from manylora_registry import Alias, Registry
from manylora_registry.errors import (
    AdapterNotFoundError,
    AliasConflictError,
    AliasNotFoundError,
    InvalidNameError,
    InvalidReferenceError,
    RegistryLocationError,
    VersionNotFoundError,
    WrongBaseError,
    YankedError,
)


@pytest.fixture
def publish(registry, base, make_adapter):
    def published(name="spelling", seed=0, **description):
        return registry.publish(name, make_adapter(seed), base=base, **description)

    return published


def test_a_version_says_what_it_is(registry, publish, base):
    before = datetime.now(UTC)
    version = publish(
        metrics={"loss": 0.25, "steps": 60}, tags={"lang": "en"}, lineage={"run": "r1"}
    )

    assert (version.name, version.number, version.rank) == ("spelling", 1, 2)
    assert version.base_fingerprint == base.fingerprint
    assert version.metrics == {"loss": 0.25, "steps": 60}
    assert version.tags == {"lang": "en"}
    assert version.lineage == {"run": "r1"}
    assert before - timedelta(seconds=1) < version.created_at < before + timedelta(minutes=1)
    assert version.engine_name == f"spelling@1-{version.digest[7:19]}"
    assert registry.resolve("spelling@1") == version


def test_numbers_count_up_per_adapter(registry, publish):
    assert [publish("a", seed).number for seed in (1, 2, 3)] == [1, 2, 3]
    assert publish("b", 4).number == 1
    assert [version.number for version in registry.versions("a")] == [1, 2, 3]


def test_the_same_files_are_the_same_version(registry, publish):
    first = publish(metrics={"loss": 0.1})

    assert publish(metrics={"loss": 0.9}) == first
    assert len(registry.versions("spelling")) == 1
    assert len(registry.events()) == 1


def test_the_same_files_have_the_same_digest_under_every_name(publish):
    assert publish("a").digest == publish("b").digest


def test_every_selector_finds_its_version(registry, publish):
    first, second = publish(seed=1), publish(seed=2)
    registry.set_alias("spelling", "production", 1)

    assert registry.resolve("spelling") == first
    assert registry.resolve("spelling@production") == first
    assert registry.resolve("spelling@2") == second
    assert registry.resolve(f"spelling@{second.digest}") == second
    assert registry.resolve(f"spelling@{second.digest[:19]}") == second


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("grammar", AdapterNotFoundError),
        ("spelling", AliasNotFoundError),
        ("spelling@staging", AliasNotFoundError),
        ("spelling@2", VersionNotFoundError),
        ("spelling@999999999999999999", VersionNotFoundError),
        ("spelling@sha256:000000000000", VersionNotFoundError),
        ("", InvalidReferenceError),
        ("../spelling", InvalidReferenceError),
    ],
)
def test_what_is_not_there_is_named(registry, publish, reference, error):
    publish()

    with pytest.raises(error):
        registry.resolve(reference)


def test_a_name_alone_without_its_alias_tells_what_to_do(registry, publish):
    publish()

    with pytest.raises(AliasNotFoundError) as failed:
        registry.resolve("spelling")

    command = str(failed.value).partition("`manylora registry ")[2].rstrip("`").split()
    assert command == ["alias", "spelling", "production", "1"]
    registry.set_alias(*command[1:3], command[3])
    assert registry.resolve("spelling").number == 1


def test_a_version_for_another_base_is_refused(registry, publish, base):
    version = publish()

    assert registry.resolve("spelling@1", base=base.fingerprint) == version
    with pytest.raises(WrongBaseError):
        registry.resolve("spelling@1", base="sha256:" + "c" * 64)


def test_an_alias_moves_and_remembers(registry, publish):
    publish(seed=1)
    publish(seed=2)
    registry.set_alias("spelling", "production", 1, actor="ann", why="first")
    registry.set_alias("spelling", "staging", 2, actor="bob")
    registry.set_alias("spelling", "production", "staging", actor="ann", why="better\nby far")

    assert registry.resolve("spelling").number == 2
    assert [
        (move.alias, move.generation, move.previous, move.version, move.actor, move.why)
        for move in registry.history("spelling")
    ] == [
        ("production", 1, None, 1, "ann", "first"),
        ("staging", 1, None, 2, "bob", ""),
        ("production", 2, 1, 2, "ann", "better by far"),
    ]
    (adapter,) = registry.adapters()
    assert adapter.aliases == {"production": Alias(2, 2), "staging": Alias(2, 1)}
    assert adapter.latest.number == 2


def test_a_move_from_another_generation_is_refused_and_changes_nothing(registry, publish):
    publish(seed=1)
    publish(seed=2)
    registry.set_alias("spelling", "production", 1, expect=0)
    events = registry.events()

    for stale in (0, 2):
        with pytest.raises(AliasConflictError) as failed:
            registry.set_alias("spelling", "production", 2, expect=stale)
        assert (failed.value.expected, failed.value.generation) == (stale, 1)
    assert registry.resolve("spelling").number == 1
    assert len(registry.history("spelling")) == 1
    assert registry.events() == events
    assert registry.set_alias("spelling", "production", 2, expect=1).generation == 2


def test_an_alias_needs_a_version_and_a_name(registry, publish):
    publish()

    with pytest.raises(VersionNotFoundError):
        registry.set_alias("spelling", "production", 2)
    with pytest.raises(AdapterNotFoundError):
        registry.set_alias("grammar", "production", 1)
    with pytest.raises(InvalidNameError):
        registry.set_alias("spelling", "../production", 1)
    with pytest.raises(InvalidReferenceError):
        registry.set_alias("spelling", "production", 0)
    assert registry.history("spelling") == []


def test_a_withdrawn_version_is_kept_but_not_served(registry, publish, tmp_path):
    publish(seed=1)
    good = publish(seed=2)
    registry.set_alias("spelling", "production", 1)
    assert registry.resolve("spelling").number == 1

    withdrawn = registry.yank("spelling@1")

    assert withdrawn.yanked
    for reference in ("spelling", "spelling@1", f"spelling@{withdrawn.digest}"):
        with pytest.raises(YankedError):
            registry.resolve(reference)
    with pytest.raises(YankedError):
        registry.set_alias("spelling", "staging", 1)
    assert registry.find("spelling@1") == withdrawn
    assert [version.yanked for version in registry.versions("spelling")] == [True, False]
    assert registry.materialize(withdrawn, tmp_path / "cache").is_dir()
    registry.set_alias("spelling", "production", 2)
    assert registry.resolve("spelling") == good


def test_a_version_is_withdrawn_once(registry, publish):
    version = publish()

    assert registry.yank("spelling@1") == registry.yank(version)
    assert [event.kind for event in registry.events()] == ["published", "yanked"]


def test_another_registry_object_sees_a_withdrawal_at_once(registry, publish, tmp_path):
    publish()
    with Registry.open(tmp_path / "registry") as other:
        other.resolve("spelling@1")
        registry.yank("spelling@1")

        with pytest.raises(YankedError):
            other.resolve("spelling@1")


def test_events_come_in_order_and_in_pieces(registry, publish):
    publish(seed=1)
    registry.set_alias("spelling", "production", 1)
    publish(seed=2)
    registry.yank("spelling@2")

    events = registry.events()

    assert [(e.kind, e.name, e.alias, e.version) for e in events] == [
        ("published", "spelling", None, 1),
        ("alias_moved", "spelling", "production", 1),
        ("published", "spelling", None, 2),
        ("yanked", "spelling", None, 2),
    ]
    assert registry.events(events[1].sequence, limit=1) == [events[2]]
    assert registry.events(events[-1].sequence) == []


def test_watch_tells_what_was_and_what_comes_until_it_is_stopped(registry, publish):
    publish(seed=1)
    stop = threading.Event()
    watched = registry.watch(0, stop=stop, poll_seconds=0.001)

    assert next(watched).version == 1
    publish(seed=2)
    assert next(watched).version == 2
    stop.set()
    assert list(watched) == []


def test_threads_share_a_registry(registry, publish):
    publish()
    failures = []

    def move():
        try:
            for _ in range(20):
                registry.set_alias("spelling", "production", 1)
                registry.resolve("spelling")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=move) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    generations = [move.generation for move in registry.history("spelling")]
    assert generations == list(range(1, 161))


def test_versions_are_immutable_and_can_be_keys(publish):
    version = publish()

    assert {version: 1}[dataclasses.replace(version)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        version.number = 2


def test_the_location_comes_from_the_environment(tmp_path, monkeypatch, registry, publish):
    publish()
    monkeypatch.setenv("MANYLORA_REGISTRY", str(tmp_path / "registry"))
    with Registry.open() as found:
        assert found.resolve("spelling@1").number == 1

    monkeypatch.delenv("MANYLORA_REGISTRY")
    with pytest.raises(RegistryLocationError, match="MANYLORA_REGISTRY"):
        Registry.open()


def test_a_directory_with_other_things_does_not_become_a_registry(tmp_path):
    (tmp_path / "novel.txt").touch()

    with pytest.raises(RegistryLocationError, match=r"novel\.txt"):
        Registry.open(tmp_path)
    with pytest.raises(RegistryLocationError):
        Registry.open(tmp_path / "novel.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["novel.txt"]


def test_reading_makes_no_registry(tmp_path):
    with pytest.raises(RegistryLocationError):
        Registry.open(tmp_path / "typo", create=False)
    assert list(tmp_path.iterdir()) == []


def test_the_latest_version_was_not_deleted(registry, publish):
    publish(seed=1)
    publish(seed=2)
    registry.delete("spelling@2")
    (adapter,) = registry.adapters()
    assert adapter.latest.number == 1
    registry.delete("spelling@1")
    assert registry.adapters() == []
