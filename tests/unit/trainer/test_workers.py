"""Several workers under Ray Train make the adapters that one worker makes, whatever befalls."""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray
from safetensors.numpy import load_file

import manylora_trainer
from manylora_trainer import Recipe
from manylora_trainer.errors import RowError, RunInterruptedError, WorkersLostError
from manylora_trainer.progress import Progress
from tests.unit.trainer.conftest import StopAt

ENDLESS = 100_000
"""Steps of a run that somebody ends: who does may be slow to hear of it."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all runs, as starting one takes longer than they do."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_gcs_server_port_wait_time_s", "120")
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
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


class SeesSteps(Progress):
    """Notes which steps are done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
        self.seen.append(step)


class SeenError(Exception):
    """Ends a run of which nothing more is wanted."""


class SeesOneStep(SeesSteps):
    """Ends the run with it."""

    def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
        super().step(step, losses, tokens_per_s)
        raise SeenError


# Every start of workers imports torch in each of them, so each test is one start, or two.


# The end of the second worker, without warning, where it reads the rows of about the tenth step.
ROWS_THAT_KILL = """
import os, pathlib, signal
from torch import distributed

def rows():
    kills = pathlib.Path(__file__).with_name("kills")
    for number in range(400):
        second = number == 90 and distributed.is_initialized() and distributed.get_rank() == 1
        if second and kills.read_text():
            kills.write_text(kills.read_text()[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        yield {"wrong": f"word{number}", "right": str(number)}
"""


@pytest.fixture
def recipe(make_task, write_recipe, tmp_path):
    (tmp_path / "rows.py").write_text(ROWS_THAT_KILL)
    (tmp_path / "kills").write_text("x")
    source = {"kind": "python", "file": str(tmp_path / "rows.py"), "function": "rows"}
    split = {"validation": 0.1, "held_out": 0.1, "scan_rows": 20}
    one = make_task("one", source=source, split=split, shuffle_buffer=8, steps=20, batch_size=9)
    return write_recipe(one, make_task("two", steps=4))


@pytest.fixture
def alone(recipe, tmp_path):
    manylora_trainer.train(recipe, tmp_path / "alone")
    return tmp_path / "alone"


def test_sharded_workers_of_which_one_is_killed_make_the_adapters_of_one(recipe, alone, tmp_path):
    together, watch = tmp_path / "together", SeesSteps()
    result = manylora_trainer.train(with_workers(recipe, sharding="fsdp"), together, progress=watch)
    assert (tmp_path / "kills").read_text() == ""
    assert watch.seen.count(4) == 1, "it did not go on from a checkpoint"
    assert result.tasks.keys() == {"one", "two"}
    for task in result.tasks:
        assert_equal_to_rounding(together, alone, task)


def test_workers_lost_too_often_say_how_to_go_on_and_one_worker_does(recipe, alone, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(WorkersLostError, match="go on with: resume=True"):
        manylora_trainer.train(with_workers(recipe, max_restarts=0), run)
    assert not (run / "adapters" / "one").exists()
    manylora_trainer.train(recipe, run, resume=True)
    for task in ("one", "two"):
        assert_equal_to_rounding(run, alone, task)


def test_a_workers_own_error_arrives_as_it_is(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("one", rows=[{"wrong": "a"}]))
    with pytest.raises(RowError, match="right"):
        manylora_trainer.train(with_workers(recipe), tmp_path / "run")


def test_interrupted_workers_leave_a_checkpoint_that_one_worker_goes_on_from(
    make_task, write_recipe, tmp_path
):
    recipe = write_recipe(make_task("one", steps=ENDLESS), checkpoint_every=10_000)
    stopping = StopAt(3, signal.SIGINT)
    with pytest.raises(RunInterruptedError, match="SIGINT"):
        manylora_trainer.train(with_workers(recipe), tmp_path / "run", progress=stopping)
    going_on = SeesOneStep()
    with pytest.raises(SeenError):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True, progress=going_on)
    assert going_on.seen > [3]


TELL_THE_GROUP = """
import os, pathlib, signal, sys
import manylora_trainer
from manylora_trainer.progress import Progress

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests.
number = signal.Signals[sys.argv[3]]

class Tells(Progress):
    def step(self, step, losses, tokens_per_s):
        if step == 3:
            os.killpg(0, number)

recipe, run = map(pathlib.Path, sys.argv[1:3])
recipe = manylora_trainer.load_recipe(recipe, ["workers.count=2"])
manylora_trainer.train(recipe, run, progress=Tells())
"""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_what_tells_the_whole_group_leaves_a_checkpoint(make_task, write_recipe, tmp_path, name):
    recipe = write_recipe(make_task("one", steps=ENDLESS), checkpoint_every=10_000)
    # As a terminal that closes does, and `timeout`: the processes of the run's own Ray hear it too.
    done = subprocess.run(
        [sys.executable, "-c", TELL_THE_GROUP, recipe, tmp_path / "run", name],
        start_new_session=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"RunInterruptedError: stopped by {name}" in done.stderr
    assert any((tmp_path / "run" / "checkpoints").iterdir())


GIVE_UP = """
import pathlib, sys
import manylora_trainer
from manylora_trainer.progress import Progress

class GivesUp(Progress):
    def start(self, steps, done):
        raise KeyboardInterrupt  # As a second Ctrl-C does.

recipe, run = map(pathlib.Path, sys.argv[1:])
recipe = manylora_trainer.load_recipe(recipe, ["workers.count=2"])
manylora_trainer.train(recipe, run, progress=GivesUp())
"""


def test_a_run_that_is_broken_off_leaves_nothing_of_ray(make_task, write_recipe, tmp_path):
    recipe, run = write_recipe(make_task("one", steps=ENDLESS)), tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", GIVE_UP, recipe, run],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert (run / "run.json").exists()
    assert not (run / "ray").exists()
