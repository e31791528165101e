from pathlib import Path

import pytest

from manylora_registry.config import ConfigModel, load_config
from manylora_registry.errors import ConfigError


class Task(ConfigModel):
    name: str
    rank: int = 8


class Recipe(ConfigModel):
    base: Path
    tasks: list[Task]


@pytest.fixture
def write(tmp_path):
    def written(text):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return file

    return written


GOOD = "base: b\ntasks:\n  - name: a\n  - {name: b, rank: 4}\n"


def test_a_file_becomes_a_frozen_model(write):
    recipe = load_config(write(GOOD), Recipe)

    assert [(task.name, task.rank) for task in recipe.tasks] == [("a", 8), ("b", 4)]
    with pytest.raises(ValueError, match="frozen"):
        recipe.base = Path("c")


def test_overrides_reach_into_lists(write):
    recipe = load_config(write(GOOD), Recipe, ["tasks.1.rank=16", "base=other"])

    assert (recipe.tasks[1].rank, recipe.base) == (16, Path("other"))


def test_every_mistake_is_told_with_path_and_line(write):
    with pytest.raises(ConfigError) as failed:
        load_config(write("tasks:\n  - name: a\n    rank: many\n    rnk: 3\n  - {}\n"), Recipe)

    assert {(p.path, p.line) for p in failed.value.problems} == {
        ("base", 1), ("tasks.0.rank", 3), ("tasks.0.rnk", 4), ("tasks.1.name", 5),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: b: c", "\0"])
def test_what_is_no_mapping_is_one_problem(write, text):
    with pytest.raises(ConfigError) as failed:
        load_config(write(text), Recipe)

    assert len(failed.value.problems) == 1


@pytest.mark.parametrize(
    "override", ["base", "=1", "tasks.7.rank=1", "base.x=1", "base=[", "tasks.x=1"]
)
def test_overrides_that_lead_nowhere_are_told(write, override):
    with pytest.raises(ConfigError):
        load_config(write(GOOD), Recipe, [override])
