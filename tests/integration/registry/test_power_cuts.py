"""Promise 5, for machines: whatever was not synced is lost, and what was acknowledged is not."""

from datetime import timedelta

import pytest

from manylora_registry import Registry
from tests.integration.registry.power import Disk, read_trace, write_tree
from tests.integration.registry.test_crashes import check_whole, content


@pytest.fixture
def cut(crash, tmp_path):
    """Lets an action run once and gives every different state a power cut may leave, in order.

    Each with whether the action had come to its end before.
    """

    def states(action, adapter, hows=("names only", "nothing more")):
        crash(action, adapter, "unkilled")
        calls = [*read_trace(tmp_path / "survivor.calls.trace")]
        for how in hows:
            yield from states_of(calls, how)

    def states_of(calls, how):
        prepared = tmp_path / "prepared"
        # The survivor was renamed after its run; its trace has the name it ran under.
        disk = Disk(str(tmp_path / "1000000"), prepared if prepared.is_dir() else None)
        before = None
        place = tmp_path / "after"
        for number, call in enumerate([None, *calls]):
            if call is not None:
                disk.do(call)
            left = disk.left(how)
            ended = number == len(calls)
            if left != before or ended:
                before = left
                write_tree(left, place)
                yield place, ended

    return states


def test_a_publication_survives_or_leaves_nothing(cut, prepared, make_adapter):
    adapter = make_adapter(2)
    left = []
    for place, ended in cut("publish", adapter):
        with Registry.open(place / "registry") as registry:
            left.append(len(check_whole(registry, [prepared, adapter], place / "cache")))
        assert not ended or left[-1] == 2
    assert set(left) == {1, 2}


def test_the_first_publication_survives_or_leaves_nothing(cut, make_adapter):
    adapter = make_adapter(1)
    left = []
    for place, ended in cut("first publish", adapter, hows=["nothing more"]):
        with Registry.open(place / "registry") as registry:
            left.append(len(check_whole(registry, [adapter], place / "cache")))
        assert not ended or left[-1] == 1
    assert set(left) == {0, 1}


def test_an_alias_move_survives_or_did_not_happen(cut, prepared, base, make_adapter, tmp_path):
    with Registry.open(tmp_path / "prepared" / "registry") as registry:
        registry.publish("spelling", make_adapter(2), base=base)
        registry.set_alias("spelling", "production", 1)
    left = []
    for place, ended in cut("alias", prepared):
        with Registry.open(place / "registry") as registry:
            history = registry.history("spelling")
            left.append(len(history))
            assert registry.resolve("spelling").number == len(history)
            assert registry.verify().ok
        assert not ended or left[-1] == 2
    assert set(left) == {1, 2}


def test_a_collection_loses_nothing_that_is_needed(cut, garbage):
    for place, ended in cut("gc", garbage):
        with Registry.open(place / "registry") as registry:
            assert registry.verify().problems == ()
            assert not ended or registry.find("spelling@1").collected
            registry.collect_garbage(grace=timedelta(0))
            assert registry.verify().unreferenced == ()


def test_a_materialized_directory_is_right_or_made_again(cut, prepared):
    for place, _ in cut("materialize", prepared):
        with Registry.open(place / "registry") as registry:
            version = registry.find("spelling@1")
            assert content(registry.materialize(version, place / "cache")) == content(prepared)
