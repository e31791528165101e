import sqlite3

import pytest


@pytest.fixture
def moved(registry, base, make_adapter):
    for seed in (1, 2):
        registry.publish("spelling", make_adapter(seed), base=base)
    for version in (1, 2, 1):
        registry.set_alias("spelling", "production", version, actor="ann", why="because")
    registry.set_alias("spelling", "staging", 2)
    return registry


def test_an_untouched_history_holds(moved):
    report = moved.verify()

    assert report.ok
    assert report.moves == 4


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE alias_moves SET why = 'no' WHERE id = 1",
        "UPDATE alias_moves SET actor = 'bob' WHERE id = 4",
        "UPDATE alias_moves SET at = at + 1 WHERE id = 2",
        "UPDATE alias_moves SET version = 1, digest = (SELECT min(digest) FROM versions"
        " WHERE number = 1) WHERE id = 2",
        "DELETE FROM alias_moves WHERE id = 1",
        "DELETE FROM alias_moves WHERE id = 3",
        "DELETE FROM alias_moves WHERE id = 4",
        "UPDATE aliases SET version_id = 2 WHERE alias = 'production'",
        "DELETE FROM aliases WHERE alias = 'staging'",
    ],
)
def test_rewritten_history_is_noticed(moved, tmp_path, tampering):
    with sqlite3.connect(tmp_path / "registry" / "registry.sqlite") as database:
        assert database.execute(tampering).rowcount == 1

    assert not moved.verify().ok
