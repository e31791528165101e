"""Records of what was done to stages: kept once, in order, on every kind of registry."""

import pytest
import sqlalchemy as sa

from manylora_registry import Registry
from manylora_registry.errors import AdapterNotFoundError, DescriptionError, InvalidNameError
from manylora_registry.transfer import copy_registry


def test_records_say_who_did_what_why_and_what_came_of_it(registry, publish):
    version = publish(1)
    registry.record_deployment("production", "up", "done", actor="ann", why="monday\nmorning")
    kept = registry.record_deployment(
        "production", "promote", "refused", step="gates", version=version, detail={"p95": 0.5}
    )
    registry.record_deployment("staging", "candidate", "done", version=version)

    first, second, third = registry.deployments()
    assert (first.action, first.name, first.actor, first.why) == (
        "up",
        None,
        "ann",
        "monday morning",
    )
    assert second == kept
    assert (second.name, second.version, second.digest) == ("spelling", 1, version.digest)
    assert second.detail == {"p95": 0.5}
    assert registry.deployments("spelling") == [second, third]
    assert registry.deployments("spelling", stage="staging") == [third]
    assert registry.deployments(limit=1) == [third]
    assert registry.verify().problems == ()


def test_a_key_is_kept_once(registry, publish):
    version = publish(1)
    first = registry.record_deployment("p", "promote", "done", version=version, key="a/1", why="x")
    again = registry.record_deployment("p", "promote", "failed", version=version, key="a/1")
    assert again == first
    assert registry.deployments() == [first]


def test_what_cannot_be_kept_is_refused(registry):
    with pytest.raises(InvalidNameError, match="stage"):
        registry.record_deployment("no such/stage", "up", "done")
    with pytest.raises(DescriptionError, match="JSON"):
        registry.record_deployment("p", "up", "done", detail={"x": object()})
    with pytest.raises(DescriptionError, match="larger"):
        registry.record_deployment("p", "up", "done", detail={"x": "x" * (1 << 16)})
    with pytest.raises(AdapterNotFoundError):
        registry.deployments("spelling")
    assert registry.deployments() == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE deployments SET actor = 'bob' WHERE id = 2",
        "UPDATE deployments SET version = 2 WHERE id = 2",
        "DELETE FROM deployments WHERE id = 2",
    ],
)
def test_a_changed_record_is_noticed(registry, publish, place, change):
    version = publish(1)
    for outcome in ("begun", "refused", "done"):
        registry.record_deployment("production", "promote", outcome, version=version, actor="ann")
    assert registry.verify().problems == ()
    engine = sa.create_engine(place.database)
    with engine.begin() as connection:
        connection.exec_driver_sql(change)
    engine.dispose()
    (problem, *_) = registry.verify().problems
    assert "changed" in problem.message


def test_a_copy_has_them_too(registry, publish, tmp_path):
    registry.record_deployment("production", "promote", "done", version=publish(1))
    with Registry.open(tmp_path / "copy") as target:
        assert copy_registry(registry, target).problems == ()
        assert target.deployments() == registry.deployments()
