"""Several workers under Ray Train make the adapters that one worker makes, whatever befalls."""

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray
from safetensors.numpy import load_file

import manylora_trainer
from manylora_trainer import Recipe
from manylora_trainer.errors import RowError, RunInterruptedError, WorkersLostError
from manylora_trainer.progress import Progress
from tests.unit.trainer.conftest import StopAt


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all runs, as starting one takes longer than they do."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def with_workers(recipe: Path, **settings: object) -> Recipe:
    loaded = manylora_trainer.load_recipe(recipe)
    workers = loaded.workers.model_copy(update={"count": 2, **settings})
    return loaded.model_copy(update={"workers": workers})


def assert_equal_to_rounding(run: Path, other: Path, task: str) -> None:
    ours, theirs = (
        load_file(each / "adapters" / task / "adapter_model.safetensors") for each in (run, other)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


class KillsWorkers(Progress):
    """Kills one training process without warning whenever one of the given steps is done."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.left = list(steps)
        self.seen: list[int] = []

    def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
        self.seen.append(step)
        if self.left and step >= self.left[0]:
            self.left.pop(0)
            workers = [
                p
                for p in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in "".join(p.cmdline())
            ]
            os.kill(workers[-1].pid, signal.SIGKILL)


@pytest.fixture
def recipe(make_task, write_recipe):
    return write_recipe(make_task("one", steps=40, batch_size=9), make_task("two", steps=4))


@pytest.fixture
def alone(recipe, tmp_path):
    manylora_trainer.train(recipe, tmp_path / "alone")
    return tmp_path / "alone"


def test_sharded_workers_equal_one(recipe, alone, tmp_path):
    together = tmp_path / "together"
    result = manylora_trainer.train(with_workers(recipe, sharding="fsdp"), together)
    assert result.tasks.keys() == {"one", "two"}
    for task in result.tasks:
        assert_equal_to_rounding(together, alone, task)


def test_a_killed_worker_is_replaced_and_the_adapters_are_the_same(recipe, alone, tmp_path):
    together, watch = tmp_path / "together", KillsWorkers(7)
    manylora_trainer.train(with_workers(recipe), together, progress=watch)
    assert not watch.left
    assert watch.seen.count(4) == 1, "it did not go on from a checkpoint"
    for task in ("one", "two"):
        assert_equal_to_rounding(together, alone, task)


def test_workers_lost_too_often_say_how_to_go_on(recipe, tmp_path):
    with pytest.raises(WorkersLostError, match="go on with: resume=True"):
        manylora_trainer.train(
            with_workers(recipe, max_restarts=0), tmp_path / "run", progress=KillsWorkers(5)
        )


def test_a_workers_own_error_arrives_as_it_is(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("one", rows=[{"wrong": "a"}]))
    with pytest.raises(RowError, match="right"):
        manylora_trainer.train(with_workers(recipe), tmp_path / "run")


def test_interrupted_workers_leave_a_checkpoint_that_one_worker_goes_on_from(
    make_task, write_recipe, tmp_path
):
    recipe = write_recipe(make_task("one", steps=300, optimizer={"learning_rate": 1e-4}))
    manylora_trainer.train(recipe, tmp_path / "alone")
    stopping = StopAt(3, signal.SIGINT)
    with pytest.raises(RunInterruptedError, match="SIGINT"):
        manylora_trainer.train(with_workers(recipe), tmp_path / "run", progress=stopping)
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert_equal_to_rounding(tmp_path / "run", tmp_path / "alone", "one")
