"""What a person has edited in a run's own records is one clear error of whatever reads them."""

import json

import pytest

import manylora_trainer
from manylora_registry import Registry
from manylora_trainer.errors import NotPublishableError, RunDirectoryError, UnreadableRunError
from manylora_trainer.publish import publish_run
from manylora_trainer.saved_runs import read_run

REMOVED = object()
EDITS = {
    "run.json": [
        (("id",), 7),
        (("base",), None),
        (("seed",), "seven"),
        (("started_at",), "yesterday"),
        (("versions",), None),
        (("tasks",), None),
        (("tasks", "first"), 1),
        (("tasks", "first", "metrics"), "text"),
        (("tasks", "first", "metrics"), REMOVED),
        (("tasks", "first", "metrics", "train_loss"), "0.5"),
        (("tasks", "first", "tokens"), None),
        (("tasks", "first", "tokens"), 10**400),
        (("tasks", "first", "seconds"), "1 s"),
        (("tasks", "first", "stopped"), 3),
    ],
    "environment.json": [
        (("starts",), 1),
        (("starts",), []),
        (("starts", 0, "git"), 1),
        (("starts", 0, "git"), REMOVED),
        (("starts", 0, "git"), {"commit": "0" * 40, "dirty": False}),
        (("starts", 0, "environment", "gpus"), [{"name": 100}]),
        (("starts", 0, "environment", "packages"), ["torch"]),
    ],
}


@pytest.fixture
def recipe(make_task, write_recipe, tmp_path):
    return write_recipe(make_task("first", steps=1))


@pytest.fixture
def run(recipe, tmp_path):
    manylora_trainer.train(recipe, tmp_path / "run")
    return tmp_path / "run"


def edited(text, path, value):
    """The JSON with another value at `path`."""
    content = json.loads(text)
    *way, key = path
    inner = content
    for step in way:
        inner = inner[step]
    if value is REMOVED:
        del inner[key]
    else:
        inner[key] = value
    return json.dumps(content)


def test_records_of_wrong_types_are_one_clear_error(recipe, run, tmp_path):
    with Registry.open(tmp_path / "registry") as registry:
        for file, edits in EDITS.items():
            whole = (run / file).read_text()
            for path, value in edits:
                (run / file).write_text(edited(whole, path, value))
                place = ".".join(map(str, path))
                with pytest.raises(NotPublishableError, match=rf"{file} is none of .* \({place}"):
                    publish_run(run, registry)
                with pytest.raises(UnreadableRunError, match=rf"{file} is not what .* \({place}"):
                    read_run(run)
                if file == "run.json":
                    with pytest.raises(RunDirectoryError, match=rf"{file} is damaged \({place}"):
                        manylora_trainer.train(recipe, run, resume=True)
            (run / file).write_text(whole)
        assert registry.adapters() == []
        assert [version.name for version in publish_run(run, registry)] == ["first"]
