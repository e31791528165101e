"""Promise 4: killed at any moment and resumed, the adapters are the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import manylora_trainer
from manylora_trainer.errors import (
    CheckpointError,
    RecipeChangedError,
    RunDirectoryError,
    RunExistsError,
    RunInterruptedError,
)
from manylora_trainer.progress import Progress

# Kills its own process, without a chance to tidy up, just before the first file operation of the
# kind and path that are asked for: audit events are raised by the interpreter itself.
VICTIMS = """
import json, os, signal, sys
import manylora_trainer, manylora_trainer.loop  # Once: each victim is a fork.
recipe, directory, moments = sys.argv[1:]
def victim(number, wanted_event, wanted_path):
    def watch(event, arguments):
        if event == wanted_event and wanted_path in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    manylora_trainer.train(recipe, f"{directory}/killed-{number}")
    os._exit(0)
for number, moment in enumerate(json.loads(moments)):
    child = os.fork() or victim(number, *moment)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

MOMENTS = {
    "before the run is described": ("os.rename", ".run.json.tmp"),
    "before the first checkpoint has its name": ("os.rename", ".step-00000002.tmp"),
    "in the middle of writing a checkpoint": ("open", ".step-00000004.tmp/state.json"),
    "while an old checkpoint is removed": ("shutil.rmtree", "checkpoints/step-00000002"),
    "between an adapter's end and its checkpoint": ("os.rename", ".brief.tmp"),
    "while the last adapter is written": ("open", ".long.tmp/adapter_config.json"),
    "after the last step": ("os.mkdir", "/plots"),
}


def adapters(run: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted((run / "adapters").rglob("*"))
        if file.is_file()
    }


def losses(run: Path) -> list[tuple[int, str, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], e["task"], e.get("loss", e.get("validation_loss"))) for e in entries]


@pytest.fixture
def recipe(make_task, write_recipe):
    # Batches that divide neither the rows nor the shuffle buffer: epochs and windows end within a
    # batch, and resumes fall in the middle of both.
    return write_recipe(
        make_task("brief", steps=3, batch_size=9, shuffle_buffer=11),
        make_task("long", steps=7, batch_size=None, batch_tokens=1000, shuffle_buffer=11),
    )


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(recipe, tmp_path):
    moments = json.dumps(list(MOMENTS.values()))
    victims = subprocess.run(
        [sys.executable, "-c", VICTIMS, recipe, tmp_path, moments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert victims.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS)
    manylora_trainer.train(recipe, tmp_path / "whole")
    for number, what in enumerate(MOMENTS):
        run = tmp_path / f"killed-{number}"
        manylora_trainer.train(recipe, run, resume=True)
        assert adapters(run) == adapters(tmp_path / "whole"), what
        assert losses(run) == losses(tmp_path / "whole"), what


class StopAt(Progress):
    """Sends this process a signal during a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__()
        self._step = step
        self._number = number

    def step(self, step, losses, tokens_per_s):
        if step == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_says_how_to_resume(recipe, tmp_path, number):
    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError, match=r"after step 3 of 7.*go on with: this"):
        manylora_trainer.train(
            recipe, tmp_path / "run", progress=StopAt(3, number), how_to_resume="this"
        )
    checkpoints = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000003"]
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(recipe, tmp_path):
    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(5, signal.SIGTERM))
    newest = tmp_path / "run" / "checkpoints" / "step-00000005" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[-10] ^= 1
    newest.write_bytes(content)
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")


def test_only_damaged_checkpoints_are_an_error(recipe, tmp_path):
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(2, signal.SIGTERM))
    for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        state.write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True)


def test_a_run_directory_in_use_is_refused_without_resume(recipe, tmp_path):
    manylora_trainer.train(recipe, tmp_path / "run")
    with pytest.raises(RunExistsError, match="--resume"):
        manylora_trainer.train(recipe, tmp_path / "run")


def test_a_run_that_has_ended_is_left_as_it_is(recipe, tmp_path):
    first = manylora_trainer.train(recipe, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    assert manylora_trainer.train(recipe, tmp_path / "run", resume=True) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_two_processes_do_not_train_one_run(recipe, tmp_path):
    class Second(Progress):
        def step(self, step, losses, tokens_per_s):
            with pytest.raises(RunDirectoryError, match="by another process"):
                manylora_trainer.train(recipe, tmp_path / "run", resume=True)

    manylora_trainer.train(recipe, tmp_path / "run", progress=Second())


def test_resume_refuses_another_recipe_and_names_the_change(make_task, write_recipe, tmp_path):
    manylora_trainer.train(write_recipe(make_task("a", steps=1)), tmp_path / "run")
    changed = write_recipe(make_task("a", steps=2))
    with pytest.raises(RecipeChangedError, match=r"tasks\.0\.steps"):
        manylora_trainer.train(changed, tmp_path / "run", resume=True)


def test_resume_refuses_other_rows(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("a"))
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(1, signal.SIGTERM))
    with (tmp_path / "a.jsonl").open("a") as rows:
        rows.write('{"wrong": "nwe", "right": "new"}\n' * 30)
    with pytest.raises(RecipeChangedError, match="rows of a have changed"):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True)


def test_a_directory_that_is_no_run_is_not_touched(recipe, tmp_path):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        manylora_trainer.train(recipe, other, resume=True)
    assert [entry.name for entry in other.iterdir()] == ["cat.jpg"]
