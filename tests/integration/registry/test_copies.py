"""A registry moves to Postgres and a bucket and back, and stays what it was."""

import itertools

import pytest

from manylora_registry import Registry
from manylora_registry.errors import DestinationError
from manylora_registry.transfer import copy_registry
from tests.integration.registry.conftest import Place


@pytest.fixture
def shared(new_postgres, bucket, tmp_path) -> Place:
    return Place(new_postgres(), f"s3://{bucket}/{tmp_path.name}")


def everything(registry):
    names = [adapter.name for adapter in registry.adapters()]
    return (
        registry.adapters(),
        [registry.versions(name) for name in names],
        [registry.history(name) for name in names],
        [registry.protections(name) for name in names],
        [registry.evaluations(f"{name}@1") for name in names],
        registry.events(),
    )


def test_to_postgres_and_a_bucket_and_back(shared, tmp_path, make_adapter, base):
    adapters = itertools.count(1)
    with Registry.open(tmp_path / "from") as source:
        for number in (1, 2):
            adapter = make_adapter(next(adapters))
            source.publish("spelling", adapter, base=base, metrics={"f1": number / 4})
            source.set_alias("spelling", "production", number, expect=number - 1, why="better")
        source.publish("other", make_adapter(next(adapters)), base=base, parent="spelling@1")
        source.record_evaluation("other@1", "nightly", {"f1": 0.5}, True)
        source.protect("other", "production", suite="nightly")
        source.yank("spelling@1")
        source.lease("spelling@2")

        with shared.open() as target:
            report = copy_registry(source, target)
            assert report.ok
            assert (report.versions, report.moves) == (3, 2)
            assert everything(target) == everything(source)
            # Postgres counts on behind the ids that were copied.
            adapter = make_adapter(next(adapters))
            assert target.publish("spelling", adapter, base=base).number == 3
            assert target.set_alias("spelling", "production", 3, expect=2).generation == 3
            with pytest.raises(DestinationError, match="something else"):
                copy_registry(source, target)

            with Registry.open(tmp_path / "back") as back:
                assert copy_registry(target, back).ok
                assert everything(back) == everything(target)
                version = back.resolve("spelling")
                assert back.materialize(version, tmp_path / "cache").is_dir()
