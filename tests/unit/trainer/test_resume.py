"""Promise 4: killed at any moment and resumed, the adapters are the same bytes."""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

import manylora_trainer
from manylora_trainer import memory
from manylora_trainer.errors import (
    CheckpointError,
    RecipeChangedError,
    RunDirectoryError,
    RunExistsError,
    RunInterruptedError,
    SourceError,
    StorageError,
)
from manylora_trainer.progress import Progress
from manylora_trainer.recipe import load_recipe
from manylora_trainer.recipe_changes import accept_changes
from manylora_trainer.saved_runs import read_run
from tests.unit.trainer.conftest import StopAt

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
def tasks(make_task):
    # Batches that divide neither the rows nor the shuffle buffer: epochs and windows end within a
    # batch, and resumes fall in the middle of both.
    return [
        make_task("brief", steps=3, batch_size=9, shuffle_buffer=11),
        make_task("long", steps=7, batch_size=None, batch_tokens=1000, shuffle_buffer=11),
    ]


@pytest.fixture
def recipe(tasks, write_recipe):
    return write_recipe(*tasks)


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(
    tasks, make_task, write_recipe, tmp_path
):
    # What is saved are the weights of its first validation.
    best = make_task("best", steps=5, early_stopping={"patience": 9, "min_delta": 100.0})
    recipe = write_recipe(*tasks, best)
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


# Kills its own process at a random file operation or instant, is resumed by the next one, and so
# on until one comes through.
CHAINS = """
import os, random, signal, sys, time
import manylora_trainer, manylora_trainer.loop  # Once: each victim is a fork.
recipe, directory, chains, kills, seed = sys.argv[1:]
chance = random.Random(seed)
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"}
def victim(run, operations, seconds):
    left = operations
    def watch(event, arguments):
        nonlocal left
        if event in EVENTS and run in str(arguments[0]):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
    if operations:
        sys.addaudithook(watch)
    # Its default action ends the process between any two machine instructions.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    manylora_trainer.train(recipe, run, resume=True)
    print("took", time.monotonic() - started, flush=True)
    os._exit(0)
def spawn(run, operations, seconds):
    child = os.fork() or victim(run, operations, seconds)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
started = time.monotonic()
assert spawn(f"{directory}/whole", 0, 0) == 0
whole = time.monotonic() - started
for chain in range(int(chains)):
    for kill in range(int(kills)):
        operations, seconds = chance.randint(1, 60), 0
        if kill % 2:
            operations, seconds = 0, chance.uniform(0.01, whole)
        if (ended := spawn(f"{directory}/chain-{chain}", operations, seconds)) == 0:
            break
        print("killed", -ended, operations, seconds, flush=True)
"""


def test_killed_again_and_again_at_random_equals_uninterrupted(make_task, write_recipe, tmp_path):
    dropped = {"rank": 2, "alpha": 4, "dropout": 0.2}
    recipe = write_recipe(
        make_task(
            "brief",
            steps=3,
            batch_size=9,
            optimizer={"kind": "sgd", "learning_rate": 0.3},
            lora={"rank": 2, "init_weights": "pissa"},
        ),
        make_task("long", steps=7, batch_size=13, lora=dropped, early_stopping={"patience": 9}),
        checkpoint_every=1,
        validate_every=1,
        pack_tokens=64,
    )
    seed = str(random.randrange(10**6))
    chains = subprocess.run(
        [sys.executable, "-c", CHAINS, recipe, tmp_path, "2", "5", seed],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "killed" in chains.stdout
    for chain in range(2):
        run = tmp_path / f"chain-{chain}"
        manylora_trainer.train(recipe, run, resume=True)
        assert adapters(run) == adapters(tmp_path / "whole"), f"seed {seed}"
        assert losses(run) == losses(tmp_path / "whole"), f"seed {seed}"


@contextmanager
def started_with(number, handler):
    """As a process has a signal from whoever started it."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_a_checkpoint_and_says_how_to_resume(recipe, tmp_path, number):
    manylora_trainer.train(recipe, tmp_path / "whole")
    said = r"after step 3 of 7.*go on with: this"
    with started_with(number, signal.SIG_DFL), pytest.raises(RunInterruptedError, match=said):
        manylora_trainer.train(
            recipe, tmp_path / "run", progress=StopAt(3, number), how_to_resume="this"
        )
    checkpoints = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000003"]
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")


def test_a_signal_during_the_last_step_leaves_the_run_to_its_end(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("only", steps=2))
    stop = StopAt(2, signal.SIGTERM)
    result = manylora_trainer.train(recipe, tmp_path / "run", progress=stop)
    assert result.tasks["only"].adapter is not None
    assert read_run(tmp_path / "run").state == "finished"


def test_a_run_under_nohup_outlives_its_terminal(recipe, tmp_path):
    with started_with(signal.SIGHUP, signal.SIG_IGN):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(3, signal.SIGHUP))
    assert read_run(tmp_path / "run").state == "finished"


def test_a_run_in_the_background_of_a_script_can_be_interrupted(recipe, tmp_path):
    with started_with(signal.SIGINT, signal.SIG_IGN), pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(3, signal.SIGINT))


def test_a_process_without_a_standard_error_trains(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # As Python has it where the caller closed it.
    manylora_trainer.train(recipe, tmp_path / "run")
    assert read_run(tmp_path / "run").state == "finished"


def test_nobody_who_reads_along_costs_a_run_nothing(recipe, tmp_path, monkeypatch):
    # As a terminal that was closed: every write to it is an error.
    with open("/dev/full", "w", buffering=1) as lost:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", lost)
        manylora_trainer.train(recipe, tmp_path / "run")
        monkeypatch.undo()
        # What is left in its buffer must not fail when it is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), lost.fileno())
    assert read_run(tmp_path / "run").state == "finished"


def test_a_plain_file_among_the_checkpoints_is_none_of_them(make_task, write_recipe, tmp_path):
    recipe, run = write_recipe(make_task("a", steps=6)), tmp_path / "run"
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, run, progress=StopAt(3, signal.SIGTERM))
    for step in (4, 99):
        (run / "checkpoints" / f"step-{step:08d}").write_text("mine")
    manylora_trainer.train(recipe, run, resume=True)
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert checkpoints == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_signal_ends_the_reading_of_rows(make_task, write_recipe, tmp_path, resume):
    (tmp_path / "endless.py").write_text(
        "import os, signal\n"
        "def rows():\n"
        "    for i in range(10_000_000):\n"
        "        if i == 30:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield {'wrong': f'a{i}', 'right': f'b{i}'}\n"
    )
    source = {"kind": "python", "file": str(tmp_path / "endless.py"), "function": "rows"}
    recipe = write_recipe(make_task("a", source=source, steps=None, epochs=1))
    for again in (False, True)[: 1 + resume]:
        with pytest.raises(
            RunInterruptedError, match="SIGINT before training began; go on with: this"
        ):
            manylora_trainer.train(recipe, tmp_path / "run", resume=again, how_to_resume="this")
    assert read_run(tmp_path / "run").state == "incomplete"


class Listening(Progress):
    """Keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def say(self, text):
        self._said.append(text)


def flip_a_bit(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(recipe, tmp_path, file):
    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(5, signal.SIGTERM))
    newest = tmp_path / "run" / "checkpoints" / "step-00000005" / file
    # Of the state a digit, with which it is still a state: where a task stands in its rows.
    mark = b'"position": '
    flip_a_bit(newest, newest.read_bytes().find(mark) + len(mark) if "json" in file else -10)
    said: list[str] = []
    manylora_trainer.train(recipe, tmp_path / "run", resume=True, progress=Listening(said))
    assert any("passed over a damaged checkpoint, step-00000005" in line for line in said)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")


def test_a_state_that_was_edited_and_lost_its_hash_is_damaged(recipe, tmp_path):
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(2, signal.SIGTERM))
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        state = json.loads(file.read_bytes())
        del state["digest"]
        file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="its state does not match its hash"):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True)


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
    run = tmp_path / "run"
    changed = load_recipe(recipe, ["training.pack_tokens=64"])

    class Second(Progress):
        def step(self, step, losses, tokens_per_s):
            before = {file: (run / file).read_bytes() for file in FILES}
            with pytest.raises(RunDirectoryError, match="by another process"):
                manylora_trainer.train(changed, run, resume=True, allow_changes=["training"])
            assert {file: (run / file).read_bytes() for file in FILES} == before

    manylora_trainer.train(recipe, run, progress=Second())


@pytest.mark.parametrize("begun", [False, True])
def test_a_process_that_still_reads_rows_has_the_run_to_itself(recipe, tmp_path, begun):
    run = tmp_path / "run"
    if begun:
        with pytest.raises(RunInterruptedError):
            manylora_trainer.train(recipe, run, progress=StopAt(2, signal.SIGTERM))
    changed = load_recipe(recipe, ["training.pack_tokens=64"])
    refused: list[str] = []

    class Second(Progress):
        def say(self, text):
            if "rows" not in text or refused:
                return
            refused.append(text)
            before = {file: file.read_bytes() for file in run.glob("*.*")}
            with pytest.raises(RunDirectoryError, match="by another process"):
                manylora_trainer.train(changed, run, resume=True, allow_changes=["training"])
            assert {file: file.read_bytes() for file in run.glob("*.*")} == before

    manylora_trainer.train(recipe, run, resume=True, progress=Second())
    assert refused


FILES = ("recipe.yaml", "run.json", "environment.json", "metrics.jsonl")


@pytest.fixture
def interrupted(make_task, write_recipe, tmp_path):
    """A run that was stopped after step 2, and a function that writes its recipe with changes."""
    # As many rows as one batch: another number of steps draws the same examples.
    task = make_task("a", rows=ROWS, batch_size=40, steps=4)
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(
            write_recipe(task), tmp_path / "run", progress=StopAt(2, signal.SIGTERM)
        )
    return lambda training=(), **changes: write_recipe({**task, **changes}, **dict(training))


ROWS = [{"wrong": f"wrd{i}", "right": f"word{i}"} for i in range(20)]


@pytest.mark.parametrize("file", ["run.json", "environment.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_one_clear_error_before_it_trains_on(
    interrupted, tmp_path, file
):
    recipe = interrupted()
    whole = (tmp_path / "run" / file).read_bytes()
    for content in (whole[:20], b"\xff\x00", b"[]", b"{}", b'{"tasks": []}\n', b"\0" * len(whole)):
        (tmp_path / "run" / file).write_bytes(content)
        with pytest.raises(
            RunDirectoryError, match=rf"/{file} is damaged .*: put it back from a copy"
        ):
            manylora_trainer.train(recipe, tmp_path / "run", resume=True)


@pytest.mark.parametrize("tokens", ["many", 0, 512.5, None])
def test_a_size_of_packs_that_is_none_is_one_clear_error(interrupted, tmp_path, tokens):
    file = tmp_path / "run/run.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"pack_tokens": tokens}))
    with pytest.raises(RunDirectoryError, match=r"/run.json is damaged .*pack_tokens is "):
        manylora_trainer.train(interrupted(), tmp_path / "run", resume=True)


def test_one_process_removes_what_killed_workers_left_of_ray(interrupted, tmp_path):
    run = tmp_path / "run"
    (run / "ray/run").mkdir(parents=True)
    manylora_trainer.train(interrupted(), run, resume=True)
    assert not (run / "ray").exists()


def test_a_run_goes_on_without_the_files_that_only_tell_of_it(interrupted, tmp_path):
    run = tmp_path / "run"
    for file in ("environment.json", "metrics.jsonl", "base.json"):
        (run / file).unlink()
    (run / "recipe.yaml").write_bytes(b"tasks:")
    result = manylora_trainer.train(interrupted(), run, resume=True)
    assert read_run(run).state == "finished"
    assert set(read_run(run).tasks) == set(result.tasks)
    assert read_run(run).recipe["tasks"][0]["name"] in result.tasks


def test_resume_refuses_a_changed_recipe_and_names_every_change(interrupted, tmp_path):
    changed = interrupted(
        {"checkpoint_every": 3}, steps=5, optimizer={"learning_rate": 0.02}, batch_size=39
    )
    with pytest.raises(RecipeChangedError) as refused:
        manylora_trainer.train(changed, tmp_path / "run", resume=True)
    for field in ("tasks.0.steps", "tasks.0.optimizer.learning_rate", "training.checkpoint_every"):
        assert f"--allow-change {field}" in str(refused.value)
    assert "tasks.0.batch_size cannot change within a run" in str(refused.value)


def test_a_stated_change_is_taken_up_and_recorded(interrupted, tmp_path):
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(
            interrupted({"validate_every": 3}),
            tmp_path / "run",
            resume=True,
            allow_changes=["training.validate_every"],
            progress=StopAt(3, signal.SIGTERM),
        )
    result = manylora_trainer.train(
        interrupted({"validate_every": 3, "checkpoint_every": 3}, steps=5),
        tmp_path / "run",
        resume=True,
        allow_changes=["tasks.0.steps", "training"],
    )
    assert {step for step, _, _ in losses(tmp_path / "run")} == {1, 2, 3, 4, 5}
    assert result.tasks["a"].adapter is not None
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [change["fields"] for change in run["changes"]] == [
        ["training.validate_every"],
        ["training.checkpoint_every", "tasks.0.steps"],
    ]
    assert run["recipe_digest"] == load_recipe(tmp_path / "run" / "recipe.yaml").digest


def test_what_checkpoints_hold_cannot_change_even_if_stated(interrupted, tmp_path):
    changed = interrupted(lora={"rank": 2, "alpha": 8})
    with pytest.raises(RecipeChangedError, match=r"tasks\.0\.lora\.rank cannot change"):
        manylora_trainer.train(
            changed, tmp_path / "run", resume=True, allow_changes=["tasks.0.lora.rank"]
        )


def test_a_machine_with_less_memory_goes_on_with_the_packs_of_the_first(
    make_task, write_recipe, tmp_path, monkeypatch
):
    rows = [{"wrong": f"{i}" + "w" * 100, "right": f"word{i}"} for i in range(40)]
    recipe = write_recipe(make_task("a", rows, batch_size=20, steps=4), pack_tokens=None)
    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "moved", progress=StopAt(2, signal.SIGTERM))
    limit = tmp_path / "memory.max"
    limit.write_text("1000000")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    manylora_trainer.train(recipe, tmp_path / "moved", resume=True)
    assert adapters(tmp_path / "moved") == adapters(tmp_path / "whole")


def test_a_statement_covers_what_is_below_it_and_nothing_that_cannot_change():
    before = {
        "workers": {"count": 1},
        "training": {"threads": 1},
        "tasks": [{"optimizer": {"kind": "adamw", "betas": [0.9, 0.999]}}],
    }
    after = {
        "workers": {"count": 2},
        "training": {"threads": 2},
        "tasks": [{"optimizer": {"kind": "adamw", "betas": [0.8, 0.999]}}],
    }
    stated = ["training", "tasks.0.optimizer"]
    assert accept_changes("run", before, after, stated) == [
        "training.threads",
        "tasks.0.optimizer.betas.0",
    ]
    with pytest.raises(RecipeChangedError, match=r"--allow-change training\.threads"):
        accept_changes("run", before, after, ["training.thread", "tasks.0.optimizer"])
    after["tasks"][0]["optimizer"]["kind"] = "sgd"
    with pytest.raises(RecipeChangedError, match=r"tasks\.0\.optimizer\.kind cannot change"):
        accept_changes("run", before, after, stated)


def test_another_base_in_its_place_is_refused(interrupted, tmp_path):
    file = tmp_path / "run" / "run.json"
    run = json.loads(file.read_text())
    run["base"]["fingerprint"] = "sha256:another"
    file.write_text(json.dumps(run))
    with pytest.raises(RecipeChangedError, match="was started on another base"):
        manylora_trainer.train(interrupted(), tmp_path / "run", resume=True)


def test_a_base_that_has_moved_is_a_stated_change(interrupted, tmp_path, tiny_base):
    recipe, run, moved = interrupted(), tmp_path / "run", tmp_path / "moved"
    shutil.copytree(tiny_base, moved)
    elsewhere = load_recipe(recipe, [f"base={moved}"])
    with pytest.raises(RecipeChangedError, match="--allow-change base"):
        manylora_trainer.train(elsewhere, run, resume=True)
    before = {file: file.read_bytes() for file in run.glob("*.*")}
    template = (moved / "chat_template.jinja").read_text()
    (moved / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(RecipeChangedError, match="was started on another base"):
        manylora_trainer.train(elsewhere, run, resume=True, allow_changes=["base"])
    assert {file: file.read_bytes() for file in run.glob("*.*")} == before
    (moved / "chat_template.jinja").write_text(template)
    manylora_trainer.train(elsewhere, run, resume=True, allow_changes=["base"])
    record = json.loads((run / "run.json").read_bytes())
    assert record["status"] == "finished"
    assert record["base"]["path"] == str(moved)
    assert [change["fields"] for change in record["changes"]] == [["base"]]


def test_an_adapter_that_has_ended_takes_no_more_steps(make_task, write_recipe, tmp_path):
    brief, long = make_task("brief", steps=1), make_task("long", steps=4)
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(
            write_recipe(brief, long), tmp_path / "run", progress=StopAt(2, signal.SIGTERM)
        )
    with pytest.raises(RecipeChangedError, match="brief has ended, so more steps cannot"):
        manylora_trainer.train(
            write_recipe({**brief, "steps": 3}, long),
            tmp_path / "run",
            resume=True,
            allow_changes=["tasks.0.steps"],
        )


def test_an_end_that_is_already_behind_is_refused(interrupted, tmp_path):
    with pytest.raises(RecipeChangedError, match="has done 2 steps, so it cannot end at 1"):
        manylora_trainer.train(
            interrupted(steps=1), tmp_path / "run", resume=True, allow_changes=["tasks.0.steps"]
        )


def test_a_run_that_has_ended_does_not_take_changes(interrupted, tmp_path):
    manylora_trainer.train(interrupted(), tmp_path / "run", resume=True)
    with pytest.raises(RecipeChangedError, match="init_from is its adapter"):
        manylora_trainer.train(
            interrupted(steps=9), tmp_path / "run", resume=True, allow_changes=["tasks.0.steps"]
        )


def test_a_resume_does_not_need_the_adapter_it_went_on_from(make_task, write_recipe, tmp_path):
    manylora_trainer.train(write_recipe(make_task("old", steps=1)), tmp_path / "first")
    old = tmp_path / "first" / "adapters" / "old"
    recipe = write_recipe(
        make_task("new", steps=3, lora={"rank": 4, "alpha": 8, "init_from": str(old)}),
        checkpoint_every=50,
    )
    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(GoneError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=FailAt(2))
    weights = old / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RecipeChangedError, match="holds other weights"):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    shutil.rmtree(old)
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")


class GoneError(Exception):
    """An error that nobody expects."""


class FailAt(Progress):
    """Ends the run without a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def step(self, step, losses, tokens_per_s):
        if step == self._step:
            raise GoneError


class FillDiskAt(Progress):
    """From a step on, the system refuses to make files longer than a few bytes."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def step(self, step, losses, tokens_per_s):
        if step == self._step:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, hard))

    limit = 20_000


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("limit", [10, 20_000])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_after_it(recipe, tmp_path, step, limit):
    manylora_trainer.train(recipe, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    watch = FillDiskAt(step)
    watch.limit = limit
    try:
        with pytest.raises(StorageError, match=r"File too large.*go on with: resume=True"):
            manylora_trainer.train(recipe, tmp_path / "run", progress=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*(tmp_path / "run" / "checkpoints").glob(".*")]
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")


def test_a_directory_that_cannot_be_written_is_one_clear_error(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be used"):
        manylora_trainer.train(recipe, tmp_path / "file" / "run")


class BrokenOff(Progress):
    """Ends the run before its first step."""

    def start(self, steps, done):
        raise KeyboardInterrupt


def test_a_template_that_writes_the_date_writes_that_of_the_runs_start(
    make_task, write_recipe, tiny_base, tmp_path
):
    recipe = load_recipe(write_recipe(make_task("a", steps=2)))

    def over(date: str):
        base = tmp_path / f"base-{len(date)}"
        shutil.copytree(tiny_base, base)
        template = base / "chat_template.jinja"
        template.write_text(template.read_text().replace("You answer with one word.", date))
        return recipe.model_copy(update={"base": base})

    dated = over("It is {{ strftime_now('%d %b %Y') }}.")
    with pytest.raises(KeyboardInterrupt):
        manylora_trainer.train(dated, tmp_path / "dated", progress=BrokenOff())
    # As if that had been on another day.
    file = tmp_path / "dated" / "run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, "started_at": "2020-02-29T23:59:59+00:00"}))
    heard = io.StringIO()
    manylora_trainer.train(
        dated, tmp_path / "dated", resume=True, progress=Progress(Console(file=heard))
    )
    assert "in this run's prompts 2020-02-29 (UTC)" in heard.getvalue()
    manylora_trainer.train(over("It is 29 Feb 2020."), tmp_path / "written")
    weights = "adapters/a/adapter_model.safetensors"
    assert (tmp_path / "dated" / weights).read_bytes() == (
        tmp_path / "written" / weights
    ).read_bytes()


def test_resume_refuses_other_rows(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("a"))
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(1, signal.SIGTERM))
    with (tmp_path / "a.jsonl").open("a") as rows:
        rows.write('{"wrong": "nwe", "right": "new"}\n' * 30)
    with pytest.raises(RecipeChangedError, match="rows of a have changed"):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True)


def test_resume_tells_of_files_with_other_rows_behind_those_looked_through(
    make_task, write_recipe, tmp_path, capsys
):
    task = make_task("a", split={"validation": 0.1, "held_out": 0.1, "scan_rows": 20})
    recipe = write_recipe(task)
    for again in range(2):
        with pytest.raises(RunInterruptedError):
            manylora_trainer.train(
                recipe, tmp_path / "run", True, progress=StopAt(2 + again, signal.SIGTERM)
            )
    assert "changed since" not in capsys.readouterr().err
    with (tmp_path / "a.jsonl").open("a") as rows:
        rows.write('{"wrong": "nwe", "right": "new"}\n')
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert "a: its files have changed since the run began. The first 20 " in capsys.readouterr().err


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_run_never_goes_on_within_a_line(make_task, write_recipe, tmp_path, on_bad_row):
    split = {"validation": 0.1, "held_out": 0.1, "scan_rows": 10}
    task = make_task("a", split=split, shuffle_buffer=5, steps=9, on_bad_row=on_bad_row)
    recipe = write_recipe(task)
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(6, signal.SIGTERM))
    rows = tmp_path / "a.jsonl"
    whole = rows.read_bytes()
    seen, behind = whole.split(b"\n")[:14], whole.split(b"\n")[14:]
    rows.write_bytes(b"\n".join([*seen, b'{"wrong": "one that is longer", "right": "r"}', *behind]))

    with pytest.raises(SourceError, match=r"a\.jsonl is not as it was: behind row \d+, where"):
        manylora_trainer.train(recipe, tmp_path / "run", resume=True)

    rows.write_bytes(whole)
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)


def test_a_directory_that_is_no_run_is_not_touched(recipe, tmp_path):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        manylora_trainer.train(recipe, other, resume=True)
    assert [entry.name for entry in other.iterdir()] == ["cat.jpg"]
