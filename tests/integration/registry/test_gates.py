"""Evaluations, protected aliases, rollback, tags and metrics, on every kind of registry."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from manylora_registry import Alias
from manylora_registry.errors import (
    AliasConflictError,
    AliasNotFoundError,
    AliasProtectedError,
    DescriptionError,
    InvalidNameError,
    VersionNotFoundError,
)


def test_a_protected_alias_moves_only_to_what_has_passed(registry, publish):
    publish(1)
    publish(2)
    registry.protect("spelling", "production", suite="nightly", why="customers")
    for number, suite, passed in ((1, "other", True), (1, "nightly", False)):
        registry.record_evaluation(f"spelling@{number}", suite, {"f1": 0.5}, passed)
        with pytest.raises(AliasProtectedError, match="nightly"):
            registry.set_alias("spelling", "production", 1)
    assert registry.history("spelling") == []

    registry.record_evaluation("spelling@1", "nightly", {"f1": 0.9}, True)
    assert not registry.set_alias("spelling", "production", 1).override
    registry.set_alias("spelling", "staging", 2)
    (adapter,) = registry.adapters()
    assert adapter.aliases == {
        "production": Alias(1, 1, protected=True),
        "staging": Alias(2, 1),
    }
    registry.record_evaluation("spelling@1", "nightly", {"f1": 0.1}, False)
    with pytest.raises(AliasProtectedError, match="failed nightly"):
        registry.set_alias("spelling", "production", 1)


def test_without_a_suite_every_gate_must_have_passed(registry, publish):
    publish(1)
    registry.protect("spelling", "production")
    with pytest.raises(AliasProtectedError, match="any gate"):
        registry.set_alias("spelling", "production", 1)
    registry.record_evaluation("spelling@1", "a", {}, True)
    registry.record_evaluation("spelling@1", "b", {}, False)
    with pytest.raises(AliasProtectedError, match="failed b"):
        registry.set_alias("spelling", "production", 1)
    registry.record_evaluation("spelling@1", "b", {}, True)
    registry.set_alias("spelling", "production", 1)


def test_a_protection_is_overridden_and_lifted_only_with_a_reason(registry, publish):
    publish(1)
    registry.protect("spelling", "production")
    with pytest.raises(AliasProtectedError, match="why"):
        registry.set_alias("spelling", "production", 1, override=True, why=" \n")
    with pytest.raises(AliasProtectedError, match="--override"):
        registry.set_alias("spelling", "production", 1, why="the disk is on fire")
    move = registry.set_alias("spelling", "production", 1, override=True, why="the disk is on fire")
    assert move.override
    assert registry.history("spelling") == [move]
    assert registry.verify().ok

    with pytest.raises(AliasProtectedError):
        registry.protect("spelling", "production", protected=False, why=" ")
    registry.protect("spelling", "production", protected=False, why="retired")
    assert registry.protections("spelling") == []
    assert not registry.set_alias("spelling", "production", 1).override


def test_a_rollback_overrides_a_protection_only_with_a_reason(registry, publish):
    for number in (1, 2):
        publish(number)
        registry.set_alias("spelling", "production", number)
    registry.protect("spelling", "production")

    with pytest.raises(AliasProtectedError, match="--override and a reason"):
        registry.rollback("spelling", "production", override=True)
    assert registry.rollback("spelling", "production", override=True, why="it lies").override


def test_evaluations_are_kept_in_order(registry, publish):
    version = publish(1)
    found = {"f1": 0.5, "rows": [1, 2]}
    first = registry.record_evaluation(version, "a", found, False, actor="ann")
    second = registry.record_evaluation(version, "a", {"f1": 0.6}, True)

    assert registry.evaluations("spelling@1") == [first, second]
    assert (first.result, first.actor) == (found, "ann")
    for result in ({"f1": float("nan")}, {"f1": object()}, {"f1": "x" * 70_000}):
        with pytest.raises(DescriptionError):
            registry.record_evaluation(version, "a", result, True)
    with pytest.raises(InvalidNameError):
        registry.record_evaluation(version, "no spaces", {}, True)


def test_rollback_goes_to_the_version_before(registry, publish):
    for seed in (1, 2, 3):
        publish(seed)
    with pytest.raises(AliasNotFoundError):
        registry.rollback("spelling", "production")
    registry.set_alias("spelling", "production", 1)
    with pytest.raises(VersionNotFoundError):
        registry.rollback("spelling", "production")
    registry.set_alias("spelling", "production", 3)
    registry.set_alias("spelling", "production", 3)

    with pytest.raises(AliasConflictError):
        registry.rollback("spelling", "production", expect=2)
    move = registry.rollback("spelling", "production", expect=3, why="it was worse")
    assert (move.version, move.previous, move.generation, move.why) == (1, 3, 4, "it was worse")
    assert registry.resolve("spelling").number == 1


def test_a_rollback_never_swings_forward_to_what_was_rolled_back(registry, publish):
    for seed in (1, 2, 3):
        version = publish(seed).number
        registry.set_alias("spelling", "production", version)

    assert registry.rollback("spelling", "production").version == 2
    with pytest.raises(VersionNotFoundError, match="was moved back already"):
        registry.rollback("spelling", "production")
    assert registry.resolve("spelling").number == 2
    assert [version.number for version in registry.way("spelling", "production")] == [1, 2]
    registry.set_alias("spelling", "production", 3)
    assert [version.number for version in registry.way("spelling", "production")] == [1, 2, 3]
    assert registry.rollback("spelling", "production").version == 2
    with pytest.raises(AliasNotFoundError):
        registry.way("spelling", "canary")


@pytest.mark.parametrize(
    ("moves", "yanked", "before"),
    [
        ([1, 2], [], 1),
        ([1, 2, 3], [], 2),
        ([1, 2, 2], [], 1),
        ([1, 2, 1], [], None),
        ([1, 2, 1, 2], [], 1),
        ([1, 2, 3, 2], [], None),
        ([1, 2, 3, 1, 4], [], 1),
        ([1, 2, 3], [2], 1),
        ([1, 2, 3], [3], 2),
        ([1, 2, 3, 2], [2], 1),
        ([1, 2, 3, 2], [1], None),
    ],
)
def test_a_rollback_goes_to_what_was_there_before(registry, publish, moves, yanked, before):
    for number in range(1, max(moves) + 1):
        publish(number)
    for number in moves:
        registry.set_alias("spelling", "production", number)
        registry.set_alias("spelling", "other", 1)
    for number in yanked:
        registry.yank(f"spelling@{number}")

    found = registry.before("spelling", "production")

    assert (found and found.number) == before
    if before is None:
        with pytest.raises(VersionNotFoundError):
            registry.rollback("spelling", "production")
    else:
        assert registry.rollback("spelling", "production").version == before


@pytest.mark.parametrize(("moves", "yanked"), [([1, 2], [1]), ([1, 2], [1, 2]), ([1, 2, 1], [1])])
def test_where_nothing_can_be_served_there_is_nothing_to_go_back_to(
    registry, publish, moves, yanked
):
    for number in moves:
        publish(number)
        registry.set_alias("spelling", "production", number)
    for number in yanked:
        registry.yank(f"spelling@{number}")

    with pytest.raises(VersionNotFoundError, match=f"no version before {moves[-1]} that can be"):
        registry.before("spelling", "production")


def test_tags_and_metrics_change_and_every_reader_sees_it(registry, publish, place):
    publish(1, tags={"lang": "en", "team": "a"}, metrics={"loss": 0.5})
    with place.open() as other:
        assert other.resolve("spelling@1").tags["lang"] == "en"
        changed = registry.describe(
            "spelling@1", tags={"lang": "de", "team": None}, metrics={"f1": 0.25}
        )
        assert (changed.tags, changed.metrics) == ({"lang": "de"}, {"loss": 0.5, "f1": 0.25})
        assert other.resolve("spelling@1") == changed
    for tags, metrics in (({"a b": "c"}, {}), ({"a": "x\ny"}, {}), ({}, {"m": float("inf")})):
        with pytest.raises(DescriptionError):
            registry.describe("spelling@1", tags=tags, metrics=metrics)
    assert registry.resolve("spelling@1") == changed


def test_a_watcher_is_woken_by_the_change_itself(registry, publish, place):
    """It does not wait until it would look by itself, which is an hour away."""
    stop = threading.Event()
    seen = []
    ready = threading.Event()

    def watch():
        with place.open() as other:
            for event in other.watch(0, stop=stop, poll_seconds=3600):
                seen.append(event)
                ready.set()

    publish(1)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in (2, 3):
        assert ready.wait(60)
        ready.clear()
        publish(number)
    assert ready.wait(60)
    stop.set()
    watcher.join(60)
    assert not watcher.is_alive()
    assert [event.version for event in seen] == [1, 2, 3]
    assert list(registry.events(seen[0].sequence)) == seen[1:]


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("place", ["local"], indirect=True)
def test_a_watcher_lives_on_when_its_connection_is_dropped(registry, publish, postgres):
    stop = threading.Event()
    publish(1)
    watched = registry.watch(0, stop=stop, poll_seconds=0.05)
    assert next(watched).version == 1
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(next, watched)
        with postgres.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE query LIKE 'LISTEN %%'"
            )
        publish(2)

        assert second.result(60).version == 2
