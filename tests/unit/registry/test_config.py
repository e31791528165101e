from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

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


def test_a_file_that_is_not_there_or_no_text_is_one_problem(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"base: \xe9")
    for file, said in (
        ("gone.yaml", f"{tmp_path}/gone.yaml: cannot be read: No such file or directory"),
        ("latin.yaml", f"{tmp_path}/latin.yaml: is no UTF-8: "),
    ):
        with pytest.raises(ConfigError) as failed:
            load_config(tmp_path / file, Recipe)

        assert str(failed.value).startswith(said)
        assert "Errno" not in str(failed.value)


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


@pytest.mark.parametrize("key", ["7", "a"])
@pytest.mark.parametrize("below", ["", ".rank"])
def test_who_overrides_an_entry_that_is_not_there_learns_how_entries_are_named(write, key, below):
    with pytest.raises(ConfigError, match="a list go by their number, here 0 to 1"):
        load_config(write(GOOD), Recipe, [f"tasks.{key}{below}=1"])


class Text(ConfigModel):
    kind: Literal["text"]
    limit: int = 1


class Table(ConfigModel):
    kind: Literal["table"]
    limit: int = 1


class Sources(ConfigModel):
    sources: tuple[Annotated[Text | Table, Field(discriminator="kind")], ...]


def test_a_mistake_of_an_override_is_not_laid_to_a_line_of_the_file(write):
    file = write("sources:\n  - kind: text\n    limit: 3\n  - kind: table\n    limit: x\n")

    with pytest.raises(ConfigError) as failed:
        load_config(file, Sources, ["sources.0.limit=on", "sources.1.lim=4"])

    number = "Input should be a valid integer, unable to parse string as an integer"
    told = {(p.path, p.line): p.message for p in failed.value.problems}
    assert told == {
        ("sources.1.table.limit", 5): number,
        ("sources.1.table.lim", None): "unknown key (as overridden)",
    }
    with pytest.raises(ConfigError, match=r"limit: must be a number.*as overridden"):
        load_config(file, Sources, ["sources.0.limit=on", "sources.1.limit=4"])
    with pytest.raises(ConfigError, match=r"sources\.0\.text\.limit: Input .*as overridden"):
        load_config(file, Sources, ["sources.0={kind: text, limit: x}", "sources.1.limit=4"])


def test_a_key_that_stands_twice_is_told_beside_every_other_mistake(write):
    text = "base: b\ntasks:\n  - name: a\n    rank: 4\n    rank: 8\nbase: c\nbse: d\n"
    with pytest.raises(ConfigError) as failed:
        load_config(write(text), Recipe)

    assert {(p.path, p.line) for p in failed.value.problems} == {
        ("tasks.0.rank", 5), ("base", 6), ("bse", 7),
    }  # fmt: skip


def test_keys_may_replace_those_that_are_merged_in(write):
    text = "base: b\ntasks:\n  - &a {name: a, rank: 4}\n  - {<<: *a, name: b}\n"

    assert [(t.name, t.rank) for t in load_config(write(text), Recipe).tasks] == [
        ("a", 4), ("b", 4),
    ]  # fmt: skip


class Several(ConfigModel):
    tasks: tuple[Task, ...] = Field(min_length=1)


def test_a_list_is_not_too_short_for_the_mistakes_in_it(write):
    with pytest.raises(ConfigError) as failed:
        load_config(write("tasks:\n  - {name: a, rnk: 3}\n"), Several)
    assert [p.path for p in failed.value.problems] == ["tasks.0.rnk"]

    with pytest.raises(ConfigError, match="at least 1"):
        load_config(write("tasks: []\n"), Several)


@pytest.mark.parametrize(
    "value",
    [
        "2026-13-45",
        "!!int many",
        "!!bool maybe",
        "!!timestamp x",
        "!!float ''",
        "9" * 5000,
        "[}",
        "[" * 3000,
        "'\0'",
    ],
)
def test_what_yaml_cannot_read_is_one_line(value, write):
    for text, overrides in ((f"base: {value}\n", ()), (GOOD, [f"tasks.0.rank={value}"])):
        with pytest.raises(ConfigError, match="is not YAML: ") as failed:
            load_config(write(text), Recipe, overrides)

        (problem,) = failed.value.problems
        assert "\n" not in str(failed.value)
        assert overrides or value[0] in "'[" or problem.line == 1


def test_an_override_of_no_number_is_a_problem(write):
    with pytest.raises(ConfigError, match="nothing can be set below '²'"):
        load_config(write(GOOD), Recipe, ["tasks.².rank=3"])


class Numbers(ConfigModel):
    steps: int = 1
    share: float = 0.5
    pair: tuple[float, float] = (0.0, 0.0)
    weights: dict[str, float] | None = None
    below: Task | None = None
    flag: bool = False
    word: str | bool = "on"


def test_a_key_that_is_a_number_is_one_mistake_and_no_traceback(write):
    with pytest.raises(ConfigError) as failed:
        load_config(write("weights: {1: 2}"), Numbers)

    (problem,) = failed.value.problems
    assert problem.path.startswith("weights.1")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("steps: yes", "steps"),
        ("share: off", "share"),
        ("pair: [0.1, true]", "pair.1"),
        ("weights: {a: 1, b: no}", "weights.b"),
        ("below:\n  name: a\n  rank: on", "below.rank"),
    ],
)
def test_a_truth_value_is_no_number(write, text, where):
    with pytest.raises(ConfigError) as failed:
        load_config(write(f"flag: no\nword: off\n{text}\n"), Numbers)

    (problem,) = failed.value.problems
    assert (problem.path, problem.message) == (where, "must be a number, not a truth value")
    assert problem.line == 2 + len(text.splitlines())
    with pytest.raises(ConfigError, match=r"steps: must be a number"):
        load_config(write(""" {"steps": 3} """), Numbers, ["steps=true"])


def test_what_is_taken_as_it_is_may_hold_itself(write):
    class Free(ConfigModel):
        body: dict[str, Any]

    body = load_config(write("body: &a {flag: yes, again: *a}"), Free).body
    assert body["again"]["again"]["flag"] is True


@pytest.mark.parametrize("text", ["share: .inf", "share: .nan", "pair: [0, -.inf]"])
def test_numbers_are_finite(write, text):
    with pytest.raises(ConfigError, match=r"(share|pair\.1): Input should be a finite number"):
        load_config(write(text), Numbers)


def test_a_directory_whose_name_is_no_utf8_is_told(tmp_path):
    directory = tmp_path / "caf\udce9"
    directory.mkdir()
    (directory / "recipe.yaml").write_text("base: b\ntasks: []")
    with pytest.raises(ConfigError, match=r"name is no UTF-8: rename it"):
        load_config(directory / "recipe.yaml", Recipe)
