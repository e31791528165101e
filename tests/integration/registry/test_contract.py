"""What a registry promises, on every kind of database and blob store."""

import pytest
import sqlalchemy as sa

from manylora_registry import Alias, Registry
from manylora_registry.errors import (
    AdapterNotFoundError,
    AliasConflictError,
    AliasNotFoundError,
    VersionNotFoundError,
    YankedError,
)
from manylora_registry.transfer import export_version


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_version_comes_out_as_it_went_in(registry, make_adapter, base, tmp_path):
    adapter = make_adapter(1)
    version = registry.publish(
        "spelling",
        adapter,
        base=base,
        metrics={"loss": 0.1, "steps": 60},
        tags={"lang": "en"},
        lineage={"run": "r1"},
    )

    assert (version.number, version.metrics["loss"], version.metrics["steps"]) == (1, 0.1, 60)
    assert (version.tags, version.lineage) == ({"lang": "en"}, {"run": "r1"})
    assert content(registry.materialize(version, tmp_path / "cache")) == content(adapter)
    export_version(registry, version, tmp_path / "out")
    assert registry.publish("again", tmp_path / "out", base=base).digest == version.digest


def test_every_selector_finds_its_version_and_what_is_missing_is_named(registry, publish):
    first, second = publish(1), publish(2)
    registry.set_alias("spelling", "production", 1)

    assert registry.resolve("spelling") == first
    assert registry.resolve("spelling@2") == second
    assert registry.resolve(f"spelling@{second.digest[:19]}") == second
    assert registry.versions("spelling") == [first, second]
    for reference, error in (
        ("grammar", AdapterNotFoundError),
        ("spelling@staging", AliasNotFoundError),
        ("spelling@999999999999999999", VersionNotFoundError),
        ("spelling@sha256:000000000000", VersionNotFoundError),
    ):
        with pytest.raises(error):
            registry.resolve(reference)


def test_the_same_files_are_the_same_version(registry, base, make_adapter):
    adapter = make_adapter(1)
    first = registry.publish("spelling", adapter, base=base)

    assert registry.publish("spelling", adapter, base=base) == first
    assert len(registry.events()) == 1


def test_an_alias_moves_by_compare_and_set_and_remembers(registry, publish):
    publish(1)
    publish(2)
    registry.set_alias("spelling", "production", 1, expect=0, actor="ann", why="first")
    registry.set_alias("spelling", "production", 2, expect=1, actor="bob")
    for stale in (0, 1, 3):
        with pytest.raises(AliasConflictError) as failed:
            registry.set_alias("spelling", "production", 1, expect=stale)
        assert failed.value.generation == 2

    assert [
        (move.alias, move.generation, move.previous, move.version, move.actor, move.why)
        for move in registry.history("spelling")
    ] == [("production", 1, None, 1, "ann", "first"), ("production", 2, 1, 2, "bob", "")]
    (adapter,) = registry.adapters()
    assert adapter.aliases == {"production": Alias(2, 2)}
    assert adapter.targets == {"production": registry.find("spelling@2")}
    assert registry.verify().moves == 2


def test_a_changed_history_is_noticed(registry, publish, database):
    publish(1)
    changes = {
        1: "why = 'no'",
        3: "actor = 'nobody'",
        5: "at = at + 1",
        7: "digest = 'sha256:0'",
        9: "previous = 7",
        11: "override = NOT override",
    }
    for _ in range(12):
        registry.set_alias("spelling", "production", 1, why="because")
    engine = sa.create_engine(database)
    with engine.begin() as raw:
        for generation, change in changes.items():
            raw.execute(sa.text(f"UPDATE alias_moves SET {change} WHERE generation = {generation}"))
    engine.dispose()

    found = [str(problem) for problem in registry.verify().problems]
    assert len(found) == len(changes)
    for generation, problem in zip(changes, found, strict=True):
        assert problem.endswith(f"at or before generation {generation}")


class _YankedMeanwhile(Registry):
    """Somebody withdraws each version as soon as it was found."""

    def resolve(self, reference, *, base=None):
        found = super().resolve(reference, base=base)
        self.yank(f"{found.name}@{found.number}")
        return found


def test_an_alias_never_moves_to_what_was_withdrawn_meanwhile(publish, place):
    publish(1)
    with _YankedMeanwhile.open(database=place.database, blobs=place.blobs) as registry:
        with pytest.raises(YankedError):
            registry.set_alias("spelling", "production", 1)
        assert registry.aliases("spelling") == {}


def test_a_withdrawn_version_is_kept_but_not_served(registry, publish, place, tmp_path):
    publish(1)
    registry.set_alias("spelling", "production", 1)
    with place.open() as other:
        other.resolve("spelling")
        withdrawn = registry.yank("spelling@1")
        for reference in ("spelling", "spelling@1"):
            with pytest.raises(YankedError):
                other.resolve(reference)

    assert registry.materialize(withdrawn, tmp_path / "cache").is_dir()
    assert registry.verify().ok


def test_events_are_ordered_and_can_be_resumed(registry, publish):
    publish(1)
    registry.set_alias("spelling", "production", 1)
    registry.yank("spelling@1")

    events = registry.events()

    assert [event.kind for event in events] == ["published", "alias_moved", "yanked"]
    assert registry.events(events[0].sequence, limit=1) == [events[1]]
    assert registry.events(events[-1].sequence) == []
