"""Promise 5 again: killed before each SQL statement and each commit, on every database."""

import os
import shutil
import signal
import traceback
from datetime import timedelta

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.integration.registry.conftest import Place


def killed(statement, act):
    """Lets `act` run in a process of its own that dies before its n-th statement; whether it did.

    A fork, as a new interpreter would take most of the time.
    """
    child = os.fork()
    if child == 0:
        left = statement

        def count(*_):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        try:
            event.listen(Engine, "before_cursor_execute", count)
            event.listen(Engine, "commit", count)
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.fixture
def copies(request, database, tmp_path):
    """Copies of a registry: `copies(prepared)` makes one after the other."""

    def make(prepared, number):
        blobs = tmp_path / f"blobs-{number}"
        shutil.copytree(tmp_path / "blobs", blobs)
        if database.startswith("postgresql"):
            url = request.getfixturevalue("new_postgres")(prepared.database)
        else:
            file = tmp_path / f"copy-{number}.sqlite"
            shutil.copy(tmp_path / "registry.sqlite", file)
            url = f"sqlite:///{file}"
        return Place(url, blobs.as_uri())

    return make


@pytest.fixture
def prepared(database, base, make_adapter, tmp_path):
    """A closed registry with two versions, an alias at the second, and the first deleted."""
    place = Place(database, (tmp_path / "blobs").as_uri())
    with place.open() as registry:
        for seed in (1, 2):
            registry.publish("spelling", make_adapter(seed), base=base)
        registry.set_alias("spelling", "production", 2)
        registry.delete("spelling@1")
    return place


def at_every_statement(prepared, copies, act, check):
    """Kills `act` before each of its statements; `check` sees what is left, and what follows."""
    number = 0
    while True:
        place = copies(prepared, number)

        def acts(place=place):
            with place.open() as registry:
                act(registry)

        died = killed(number, acts)
        with place.open() as registry:
            assert registry.verify().problems == ()
            check(registry)
            act(registry)
            check(registry)
            assert registry.verify().problems == ()
        if not died:
            return number
        number += 1


def test_a_publication(prepared, copies, base, make_adapter, tmp_path):
    adapter = make_adapter(3)
    counts = []

    def act(registry):
        registry.publish("spelling", adapter, base=base, tags={"a": "b"}, metrics={"m": 1})

    def check(registry):
        counts.append(len(registry.versions("spelling")))
        published = [e.version for e in registry.events() if e.kind == "published"]
        assert published == list(range(1, counts[-1] + 1))
        if counts[-1] == 3:
            assert registry.resolve("spelling@3").tags == {"a": "b"}

    assert at_every_statement(prepared, copies, act, check) > 15
    assert counts[0] == 2
    assert set(counts[1::2]) == {3}


def test_a_publication_that_restores(prepared, copies, base, tmp_path):
    deleted = []
    adapter = tmp_path / "adapter-1"

    def act(registry):
        registry.publish("spelling", adapter, base=base)

    def check(registry):
        deleted.append(registry.find("spelling@1").deleted)

    assert at_every_statement(prepared, copies, act, check) > 10
    assert deleted[0]
    assert not any(deleted[1::2])


def test_an_alias_move(prepared, copies):
    generations = []

    def act(registry):
        registry.set_alias("spelling", "production", 2)

    def check(registry):
        history = registry.history("spelling")
        generations.append(history[-1].generation)
        assert [move.generation for move in history] == list(range(1, len(history) + 1))
        assert registry.aliases("spelling")["production"].generation == generations[-1]

    assert at_every_statement(prepared, copies, act, check) > 8
    assert generations[:2] == [1, 2]
    assert all(after == before + 1 for before, after in zip(*[iter(generations)] * 2, strict=True))


def test_a_collection(prepared, copies):
    def act(registry):
        registry.collect_garbage(grace=timedelta(0))

    collected = []

    def check(registry):
        collected.append(registry.find("spelling@1").collected)
        assert registry.resolve("spelling").number == 2

    assert at_every_statement(prepared, copies, act, check) > 15
    assert not collected[0]
    assert all(collected[1::2])


def test_a_materialization(prepared, copies, tmp_path):
    def act(registry):
        version = registry.resolve("spelling")
        registry.materialize(version, tmp_path / "cache")

    assert at_every_statement(prepared, copies, act, lambda _: None) > 1
