"""Runs on disk: listed, shown and compared, whatever state they are in."""

import json
import os
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

import manylora_trainer
from manylora_cli.runs import app
from manylora_trainer.errors import RunInterruptedError, UnreadableRunError
from manylora_trainer.progress import Progress
from manylora_trainer.run_report import write_run_report
from manylora_trainer.saved_runs import read_run
from tests.unit.trainer.conftest import StopAt


@pytest.fixture
def recipe(make_task, write_recipe):
    return write_recipe(make_task("first"), make_task("second", steps=4))


@pytest.fixture
def runs(recipe, tmp_path):
    """One run that finished and one that was broken off after step 3."""
    directory = tmp_path / "runs"
    manylora_trainer.train(recipe, directory / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, directory / "cut", progress=StopAt(3, signal.SIGTERM))
    return directory


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def listed(directory):
    return {entry["run"]: entry for entry in json.loads(invoke("list", directory, "--json").stdout)}


def test_every_run_is_listed_in_its_state_and_the_broken_as_such(runs):
    (runs / "cut" / "metrics.jsonl").open("ab").write(b'{"step": 4, "ta')
    shutil.copytree(runs / "whole", runs / "deep" / "damaged")
    (runs / "deep" / "damaged" / "run.json").write_text("{")
    shutil.copytree(runs / "whole", runs / "strange")
    (runs / "strange" / "run.json").write_text('{"status": "finished", "tasks": [1]}')
    shutil.copytree(runs / "cut", runs / "began")
    (runs / "began" / "run.json").unlink()
    (runs / "began" / "metrics.jsonl").unlink()
    found = listed(runs)
    states = {name.removeprefix(f"{runs}/"): entry["state"] for name, entry in found.items()}
    assert states == {
        "whole": "finished",
        "cut": "interrupted",
        "deep/damaged": "broken",
        "strange": "broken",
        "began": "incomplete",
    }
    assert "run.json cannot be read" in found[f"{runs}/deep/damaged"]["problem"]
    assert found[f"{runs}/cut"]["tasks"]["first"]["step"] == 3
    told = json.loads((runs / "whole" / "run.json").read_text())["tasks"]["second"]["metrics"]
    assert found[f"{runs}/whole"]["tasks"]["second"]["metrics"] == told
    header, *lines = invoke("list", runs).stdout.splitlines()
    assert header.split("\t")[:2] == ["run", "state"]
    assert [line.split("\t")[1] for line in lines].count("broken") == 2


def test_no_damage_keeps_other_runs_from_being_listed(runs):
    deep = "[" * 100_000
    damaged = ("run.json", "recipe.yaml", "metrics.jsonl", "environment.json")
    for file in damaged:
        shutil.copytree(runs / "cut", runs / file)
        (runs / file / file).write_text(f"{deep}\n")
    shutil.copytree(runs / "whole", runs / "not a number")
    record = runs / "not a number" / "run.json"
    record.write_text(record.read_text().replace('"steps": 4', '"steps": NaN'))
    found = listed(runs)
    for file in damaged:
        assert found[f"{runs}/{file}"]["state"] == "broken"
    assert found[f"{runs}/not a number"]["tasks"]["second"]["steps"] is None
    assert found[f"{runs}/whole"]["state"] == "finished"


def test_a_run_under_way_is_seen_as_running_and_not_disturbed(recipe, tmp_path):
    class Look(Progress):
        seen: list[tuple[str, int, int]]

        def step(self, step, losses, tokens_per_s):
            run = read_run(tmp_path / "run")
            self.seen.append((run.state, run.tasks["first"].step, run.tasks["first"].tokens))

    look = Look()
    look.seen = []
    manylora_trainer.train(recipe, tmp_path / "run", progress=look)
    states, steps, tokens = zip(*look.seen, strict=True)
    assert set(states) == {"running"}
    # As many as the steps that are told, not those of the last checkpoint.
    assert steps == (1, 2, 3, 4, 5, 6)
    assert tokens[0] > 0
    assert list(tokens) == sorted(set(tokens))
    done = read_run(tmp_path / "run")
    assert (done.state, done.tasks["first"].tokens) == ("finished", tokens[-1])


def test_a_run_is_shown_with_what_it_ran_on(runs):
    shown = invoke("show", runs / "cut").stdout
    assert "interrupted" in shown
    assert "first\t3/6" in shown
    told = json.loads(invoke("show", runs / "cut", "--json").stdout)
    assert told["recipe"]["seed"] == 7
    assert told["starts"][0]["environment"]["threads"] == 1


def test_a_page_is_written_of_a_run_that_has_not_ended_and_of_one_that_never_began(runs, tmp_path):
    shutil.copytree(runs / "cut", runs / "began")
    for file in ("run.json", "metrics.jsonl", "environment.json"):
        (runs / "began" / file).unlink()
    for name, state in (("cut", "interrupted"), ("began", "incomplete")):
        done = invoke("show", runs / name, "--out", tmp_path / "page.html")
        assert done.exit_code == 0, done.exception
        assert state in (tmp_path / "page.html").read_text()


def test_damaged_records_of_a_run_are_said_in_one_line(runs, tmp_path):
    def fails(match):
        error = invoke("show", runs / "cut", "--out", tmp_path / "page.html").exception
        assert isinstance(error, UnreadableRunError)
        assert match in str(error)

    held_out = runs / "cut" / "held_out" / "first.jsonl"
    bare = '{"messages": [{"role": "user"}], "expected": ""}\n'
    for content in ("{", "[]\n", '{"messages": []}\n', bare):
        held_out.write_text(content)
        fails(f"{held_out} cannot be read")
    strange = ({"environment": {"gpus": ["H100"]}}, {"environment": {}, "git": "abc"})
    for starts in (None, "x", [1], {"a": 1}, [{"at": "now"}], strange[:1], strange[1:]):
        (runs / "cut" / "environment.json").write_text(json.dumps({"starts": starts}))
        fails("environment.json is not what a run writes")
    metrics = runs / "cut" / "metrics.jsonl"
    (runs / "cut" / "environment.json").unlink()
    before = metrics.read_text()
    for step in ("null", "1e999"):
        metrics.write_text(before.replace('"step": 1', f'"step": {step}'))
        fails("metrics.jsonl cannot be read")
    metrics.write_text(before)
    recipe = runs / "cut" / "recipe.yaml"
    resolved = recipe.read_text()
    for seed in ("2026-01-01", "&a [*a]", ".inf"):
        recipe.write_text(resolved.replace("seed: 7", f"seed: {seed}"))
        fails("recipe.yaml cannot be read")
    recipe.write_text(resolved.replace("name: first", "name: [first]"))
    fails("recipe.yaml cannot be read: the name of a task is no text")
    assert listed(runs)[f"{runs}/cut"]["state"] == "broken"


def test_what_a_terminal_has_no_letters_for_ends_no_verb(tmp_path):
    run = tmp_path / "röws-日本"
    run.mkdir()
    (run / "recipe.yaml").write_text("{")

    def listed_as(encoding, *options):
        return subprocess.run(
            [sys.executable, "-m", "manylora_cli", "runs", "list", tmp_path, *options],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            check=True,
            capture_output=True,
        ).stdout.decode(encoding)

    assert f"{tmp_path}/röws-\\u65e5\\u672c\tbroken" in listed_as("latin-1")
    assert f"{run}\tbroken" in listed_as("utf-8")
    for encoding in ("ascii", "utf-8"):
        assert json.loads(listed_as(encoding, "--json"))[0]["run"] == str(run)


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_closed_standard_output_ends_no_verb(tmp_path, options):
    def closed(what, directory):
        command = f"'{sys.executable}' -m manylora_cli runs list '{directory}' {options} {what}>&-"
        return subprocess.run(command, shell=True, check=False, capture_output=True, text=True)

    done = closed(1, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = closed(2, tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "")


def test_a_page_is_not_written_in_the_place_of_a_directory(runs, tmp_path):
    assert invoke("show", runs / "whole", "--out", tmp_path).exit_code == 2
    assert [entry.name for entry in tmp_path.parent.glob(".*.tmp")] == []


def test_a_page_is_written_of_records_that_hold_half_a_surrogate(runs, tmp_path):
    run = shutil.copytree(runs / "whole", tmp_path / "run")
    environment = run / "environment.json"
    environment.write_text(environment.read_text().replace('"cpu": "', '"cpu": "\\ud800'))
    write_run_report(read_run(run), tmp_path / "page.html")
    assert "\\ud800" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_said_in_one_line(tmp_path):
    for verb in (("show", tmp_path), ("compare", tmp_path, tmp_path), ("list", tmp_path / "no")):
        assert isinstance(invoke(*verb).exception, UnreadableRunError)


class Page(HTMLParser):
    """What a page holds, and everything it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.loads = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_the_page_of_a_run_stands_alone_and_escapes_what_data_holds(
    make_task, write_recipe, tmp_path
):
    hostile = [
        {"wrong": f"w{i}", "right": f"<script>alert({i})</script>", "i": i} for i in range(40)
    ]
    manylora_trainer.train(write_recipe(make_task("a", hostile, steps=2)), tmp_path / "run")
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "script" not in page.tags
    assert page.loads == []
    assert "polyline" in page.tags
    assert "<script>alert(" in page.text
    assert "tasks.0.lora.rank" in page.text


@pytest.mark.filterwarnings("error:constrained_layout")
def test_runs_are_compared_by_result_recipe_and_curve(make_task, write_recipe, tmp_path):
    task = make_task("first")
    low, high = tmp_path / ("low-" * 30) / "run", tmp_path / ("high-" * 30) / "run"
    for run, changes in ((low, {}), (high, {"optimizer": {"learning_rate": 0.05}})):
        run.parent.mkdir()
        manylora_trainer.train(write_recipe({**task, **changes}), run)
    result = invoke("compare", low, high, "--out", tmp_path / "out", "--json")
    told = json.loads(result.stdout)
    assert told["differences"] == {"tasks.first.optimizer.learning_rate": ["0.01", "0.05"]}
    losses = {row["metric"]: row["values"] for row in told["results"]}["validation_loss"]
    assert losses == [run["tasks"]["first"]["metrics"]["validation_loss"] for run in told["runs"]]
    page = Page((tmp_path / "out" / "comparison.html").read_text())
    assert page.loads == []
    assert page.tags.count("polyline") == 4
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = invoke("compare", low, high).stdout
    named = f"adapter\tmetric\t{low.parent.name}/run\t{high.parent.name}/run\n"
    assert table.startswith(named), "as much of the paths as tells them apart"
    assert "tasks.first.optimizer.learning_rate\t0.01\t0.05" in table
    assert invoke("compare", low).exit_code == 2


def test_a_task_that_a_run_does_without_is_one_difference(make_task, write_recipe, tmp_path):
    first, second = make_task("first", steps=1), make_task("second", steps=1)
    other = {**second, "batch_size": 3}
    for name, tasks in (("one", [first]), ("two", [second, first]), ("three", [first, other])):
        manylora_trainer.train(write_recipe(*tasks, name=name), tmp_path / name)
    runs = [tmp_path / name for name in ("one", "two", "three")]
    compared = json.loads(invoke("compare", *runs[:2], "--json").stdout)
    assert compared["differences"] == {"tasks.second.name": ["", "second"]}
    compared = json.loads(invoke("compare", *runs, "--json").stdout)
    assert compared["differences"] == {
        "tasks.second.name": ["", "second", "second"],
        "tasks.second.batch_size": ["", "4", "3"],
    }
