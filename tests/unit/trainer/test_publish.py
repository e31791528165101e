"""What a run directory has to hold to be published, and that nothing is published by half."""

import json
from pathlib import Path

import pytest

import manylora_trainer
from manylora_registry import Registry
from manylora_registry.errors import AliasConflictError, InvalidNameError
from manylora_trainer.errors import NotPublishableError
from manylora_trainer.progress import Progress
from manylora_trainer.publish import publish_run


@pytest.fixture
def run(make_task, write_recipe, tmp_path) -> Path:
    manylora_trainer.train(write_recipe(make_task("first", steps=1)), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def registry(tmp_path):
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


def test_an_alias_that_cannot_be_is_refused_before_anything_is_published(run, registry):
    with pytest.raises(InvalidNameError, match="'pro duction'"):
        publish_run(run, registry, alias="pro duction")

    assert registry.adapters() == []


def test_a_task_that_is_named_twice_is_published_once(run, registry):
    versions = publish_run(run, registry, tasks=["first", "first"], alias="production")

    assert [version.number for version in versions] == [1]
    assert registry.aliases("first")["production"].generation == 1


def test_what_is_refused_midway_tells_what_became_of_each(
    make_task, write_recipe, tmp_path, registry
):
    recipe = write_recipe(*(make_task(name, steps=1) for name in ("first", "second", "third")))
    manylora_trainer.train(recipe, tmp_path / "run")
    weights = tmp_path / "run" / "adapters" / "second" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(NotPublishableError) as refused:
        publish_run(tmp_path / "run", registry, alias="production")
    assert str(refused.value).startswith("second cannot be published: ")
    assert str(refused.value).endswith(
        "(published before this, and there to stay: first@1; not tried: third; no alias was moved: "
        "--task first --task third publishes all but second)"
    )
    assert registry.aliases("first") == {}

    weights.write_bytes(whole)
    assert [v.number for v in publish_run(tmp_path / "run", registry)] == [1, 1, 1]


def test_an_alias_that_may_not_move_tells_which_have(make_task, write_recipe, tmp_path, registry):
    recipe = write_recipe(make_task("first", steps=1), make_task("second", steps=1))
    manylora_trainer.train(recipe, tmp_path / "run")
    publish_run(tmp_path / "run", registry)
    registry.protect("second", "production")
    with pytest.raises(NotPublishableError) as refused:
        publish_run(tmp_path / "run", registry, alias="production")
    assert str(refused.value).endswith(
        "(published before this, and there to stay: first@1, second@1; production points at "
        "first@1)"
    )


def test_publishing_again_moves_no_alias(run, registry):
    for _ in range(2):
        publish_run(run, registry, alias="production")
    assert registry.aliases("first")["production"].generation == 1


class Overtaken(Registry):
    """Somebody moves the alias while a version is being published."""

    def publish(self, name, directory, **description):
        self.set_alias(name, "production", 1)
        return super().publish(name, directory, **description)


def test_an_alias_that_somebody_moved_meanwhile_stays(run, registry, tmp_path):
    publish_run(run, registry, alias="production")
    (run / "adapters/first/README.md").write_text("Another.")
    with (
        Overtaken.open(tmp_path / "registry") as overtaken,
        pytest.raises(NotPublishableError) as refused,
    ):
        publish_run(run, overtaken, alias="production")
    assert isinstance(refused.value.__cause__, AliasConflictError)
    assert "first@production is at generation 2, not 1: somebody moved it" in str(refused.value)
    assert "there to stay: first@2; production points at none" in str(refused.value)
    assert registry.aliases("first")["production"].version == 1

    publish_run(run, registry, alias="production")
    assert registry.aliases("first")["production"].version == 2


class Publishing(Progress):
    """Publishes what has ended of a run in its second step, and crashes."""

    def __init__(self, run: Path, registry: Registry) -> None:
        super().__init__()
        self._run, self._registry = run, registry

    def step(self, step, losses, tokens_per_s):
        if step == 2:
            assert (self._run / "adapters/first").is_dir()
            publish_run(self._run, self._registry, tasks=["first"])


def test_a_run_that_has_not_ended_is_not_published(make_task, write_recipe, tmp_path, registry):
    """Nor what has ended of it: its figures are not written yet."""
    run = tmp_path / "run"
    recipe = write_recipe(make_task("first", steps=1), make_task("second", steps=2))
    with pytest.raises(NotPublishableError, match="is still being trained: publish it once"):
        manylora_trainer.train(recipe, run, progress=Publishing(run, registry))
    with pytest.raises(NotPublishableError, match="not trained to its end; resume the run first"):
        publish_run(run, registry, tasks=["first"])
    assert registry.adapters() == []


@pytest.mark.parametrize("file", ["run.json", "base.json", "environment.json"])
def test_files_of_other_tools_make_no_run(run, registry, file):
    for content in ([], {"of": "another tool"}):
        (run / file).write_text(json.dumps(content))

        with pytest.raises(NotPublishableError, match=f"is not a run: its {file} is none"):
            publish_run(run, registry)

    assert registry.adapters() == []
