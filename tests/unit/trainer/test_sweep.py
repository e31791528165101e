"""Sweeps: trials packed into runs equal each alone, losers leave, a killed sweep goes on."""

import json
import shutil
import signal
import subprocess
import sys
from datetime import date

import pytest
import typer
import yaml
from typer.testing import CliRunner

import manylora_trainer
from manylora_cli.publish import publish
from manylora_cli.sweep import sweep as sweep_verb
from manylora_registry import Registry
from manylora_registry.config import load_config
from manylora_registry.errors import ConfigError
from manylora_trainer.errors import NoExamplesError, RunInterruptedError, SweepError
from manylora_trainer.recipe import load_recipe
from manylora_trainer.saved_runs import read_run
from manylora_trainer.search import make_search
from manylora_trainer.sweep import read_sweep, run_sweep
from manylora_trainer.sweep_settings import Sweep, load_sweep
from tests.unit.trainer.conftest import words
from tests.unit.trainer.test_together import weights

app = typer.Typer()
app.command()(sweep_verb)
app.command()(publish)

RATE, RANK = "tasks.0.optimizer.learning_rate", "tasks.0.lora.rank"
STEPS = 8


@pytest.fixture
def recipe(make_task, write_recipe):
    return write_recipe(make_task("words", steps=STEPS, batch_size=3), make_task("other"))


@pytest.fixture
def write_sweep(recipe, tmp_path):
    """Writes a sweep over the recipe; keyword arguments replace keys."""

    def write(name="sweep", **changes):
        settings = {
            "recipe": recipe.name,
            "sweep_directory": f"sweeps/{name}",
            "method": "grid",
            "trials_per_run": 4,
            "space": {RATE: [0.02, 0.0001], RANK: [2, 4]},
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    return write


def test_a_trial_equals_the_recipe_trained_alone_with_its_settings(write_sweep, recipe, tmp_path):
    result = run_sweep(load_sweep(write_sweep()))
    assert [dict(trial.settings) for trial in result.trials] == [
        {RATE: rate, RANK: rank} for rate in (0.02, 0.0001) for rank in (2, 4)
    ]
    for trial in result.trials:
        changes = [f"{path}={value}" for path, value in trial.settings.items()]
        alone = load_recipe(recipe, changes)
        alone = alone.model_copy(update={"tasks": alone.tasks[:1]})
        run = manylora_trainer.train(alone, tmp_path / trial.name)
        ours = weights(result.run_directory(trial), trial.name)
        theirs = weights(run.run_directory, "words")
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        alone_loss = run.tasks["words"].metrics["validation_loss"]
        assert trial.loss == pytest.approx(alone_loss, rel=1e-5)
        assert trial.state == "finished"
    assert result.best == min(result.trials, key=lambda trial: trial.loss or 0)


def test_losers_leave_at_the_rungs_and_the_rest_go_on_unchanged(write_sweep):
    whole = run_sweep(load_sweep(write_sweep("whole")))
    halving = {"first_rung": 2, "factor": 2}
    halved = run_sweep(load_sweep(write_sweep("halved", halving=halving)))
    assert sorted(trial.step for trial in halved.trials) == [2, 2, 4, STEPS]
    assert halved.best is not None
    same = whole.trials[halved.best.number]
    assert halved.best.loss == pytest.approx(same.loss, rel=1e-5)
    run = read_run(halved.run_directory(halved.best))
    at_rung = {t.name: dict(run.curve(t.name, "validation_loss"))[2] for t in halved.trials}
    left = {t.name for t in halved.trials if t.step == 2}
    assert max(loss for name, loss in at_rung.items() if name not in left) <= min(
        loss for name, loss in at_rung.items() if name in left
    )
    assert all("go on" in (t.why or "") for t in halved.trials if t.state == "stopped")


def test_a_trial_that_ends_early_at_a_rung_is_no_loser_there(write_sweep):
    sweep = write_sweep(
        overrides=["tasks.0.early_stopping={patience: 1}"],
        # No gain is large enough for half of them: they end at their second validation.
        space={"tasks.0.early_stopping.min_delta": [0.0, 1000.0], RATE: [0.02, 0.0001]},
        halving={"first_rung": 4, "factor": 2},
    )
    result = run_sweep(load_sweep(sweep))
    ended = [trial for trial in result.trials if trial.step == 4]
    early = [t for t in result.trials if t.settings["tasks.0.early_stopping.min_delta"]]
    assert [trial.step for trial in early] == [4, 4]
    assert [trial.state for trial in early] == ["finished", "finished"]
    assert [trial.state for trial in ended if trial not in early] == ["stopped"]


def test_later_runs_are_held_to_what_earlier_trials_reached(write_sweep):
    sweep = write_sweep(
        trials_per_run=2,
        space={RATE: [0.02, 0.01, 0.0001, 0.0002]},
        halving={"first_rung": 2, "factor": 2},
    )
    result = run_sweep(load_sweep(sweep))
    assert [trial.run for trial in result.trials] == [0, 0, 1, 1]
    # The second run's are both worse than the first run's winner and its loser.
    assert [trial.step for trial in result.trials[2:]] == [2, 2]
    assert result.best is not None
    assert result.best.run == 0


def test_a_trial_that_breaks_at_a_rung_counts_for_nothing_there_resumed_or_not(write_sweep):
    settings = {
        "trials_per_run": 2,
        "space": {RATE: [1e30, 0.02, 0.0001, 0.0002]},
        "overrides": ["tasks.0.optimizer.clip_norm=null", "training.validate_every=1"],
        "halving": {"first_rung": 1, "factor": 2},
    }
    whole = run_sweep(load_sweep(write_sweep("whole", **settings)))
    broken, best, *rest = whole.trials
    assert "step 1: validation loss" in (broken.why or "")
    assert best.state == "finished"
    # One of the three that came to the first rung with a loss goes on: not two of four.
    assert [trial.step for trial in rest] == [1, 1]

    def interrupt(text):
        if text.startswith("trials 2"):
            signal.raise_signal(signal.SIGINT)

    resumed = load_sweep(write_sweep("resumed", **settings))
    with pytest.raises(RunInterruptedError):
        run_sweep(resumed, say=interrupt)
    assert run_sweep(resumed, resume=True).trials == whole.trials


# Runs a sweep and kills its own process just before the wanted file operation, see test_resume.
VICTIM = """
import os, pathlib, signal, sys
from manylora_trainer.sweep import run_sweep
from manylora_trainer.sweep_settings import load_sweep
import manylora_trainer.loop, matplotlib.figure, optuna.samplers  # Once: each victim is a fork.
from transformers import AutoTokenizer, LlamaForCausalLM
path, moments = pathlib.Path(sys.argv[1]), sys.argv[2:]
for moment in moments:
    child = os.fork()
    if not child:
        event_wanted, path_wanted = moment.split("=")
        def watch(event, arguments):
            if event == event_wanted and path_wanted in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        run_sweep(load_sweep(path), resume=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_again_and_again_a_sweep_ends_as_if_it_had_not_been(write_sweep, tmp_path):
    settings = {
        "method": "tpe",
        "trials": 4,
        "trials_per_run": 2,
        "space": {
            RATE: {"low": 1.0e-5, "high": 0.1, "log": True},
            "tasks.0.lora.target_modules": ["all-linear", ["q_proj", "v_proj"]],
        },
        "halving": {"first_rung": 4, "factor": 2},
    }
    whole = run_sweep(load_sweep(write_sweep("whole", **settings)))
    moments = [
        "os.rename=.sweep.json.tmp",
        "os.rename=.step-00000006.tmp",
        "os.mkdir=killed/plots",
        "os.rename=runs/001/.recipe.yaml.tmp",
        "os.mkdir=runs/001/plots",
    ]
    killed = write_sweep("killed", **settings)
    victims = subprocess.run(
        [sys.executable, "-c", VICTIM, killed, *moments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert victims.stdout.split() == [str(-signal.SIGKILL)] * len(moments)
    result = run_sweep(load_sweep(killed), resume=True)
    assert result.trials == whole.trials
    for trial in (t for t in whole.trials if t.state == "finished"):
        ours = result.run_directory(trial) / "adapters" / trial.name
        theirs = whole.run_directory(trial) / "adapters" / trial.name
        for file in theirs.iterdir():
            assert (ours / file.name).read_bytes() == file.read_bytes(), file


def test_an_invalid_combination_and_a_diverging_trial_do_not_stop_the_others(write_sweep):
    sweep = write_sweep(
        space={
            "tasks.0.steps": [2, 4],
            "tasks.0.optimizer.warmup_steps": [0, 3],
            "tasks.0.optimizer.learning_rate": [0.01, 1e30],
        },
        overrides=["tasks.0.optimizer.clip_norm=null"],
        trials_per_run=8,
    )
    result = run_sweep(load_sweep(sweep))
    states = [trial.state for trial in result.trials]
    assert states.count("invalid") == 2
    assert states.count("finished") >= 3
    invalid = next(trial for trial in result.trials if trial.state == "invalid")
    assert "warmup" in (invalid.why or "")
    assert any("loss" in (t.why or "") for t in result.trials if t.state == "stopped")


def test_a_trial_that_rows_or_base_make_impossible_does_not_stop_the_others(
    make_task, write_recipe, write_sweep
):
    write_recipe(make_task("words", steps=None, epochs=0.5, batch_size=3))
    sweep = write_sweep(
        space={
            "tasks.0.optimizer.warmup_steps": [2, 90],
            "tasks.0.lora.target_modules": [["q_proj"], ["query"]],
        },
        trials_per_run=2,
    )
    result = run_sweep(load_sweep(sweep))
    assert [trial.state for trial in result.trials] == ["finished", "invalid", "invalid", "invalid"]
    why = [trial.why or "" for trial in result.trials]
    assert "no linear layer named query" in why[1]
    assert "greater than optimizer.warmup_steps (90)" in why[2]
    assert run_sweep(load_sweep(sweep), resume=True).trials == result.trials


def test_a_date_that_the_chat_template_writes_is_the_same_in_all_runs(
    tiny_base, recipe, write_sweep, tmp_path, capfd
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    template = base / "chat_template.jinja"
    dated = "It is {{ strftime_now('%d %b %Y') }}."
    template.write_text(template.read_text().replace("You answer with one word.", dated))
    recipe.write_text(recipe.read_text().replace(str(tiny_base), str(base)))
    sweep = load_sweep(write_sweep(space={RANK: [2, 3]}, trials_per_run=1))
    result = run_sweep(sweep)
    # As if the first run had begun on another day, and the sweep been ended behind it.
    first, second = (result.run_directory(trial) for trial in result.trials)
    run = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps({**run, "started_at": "2020-02-29T23:59:59+00:00"}))
    shutil.rmtree(second)
    state = sweep.sweep_directory / "sweep.json"
    kept = json.loads(state.read_text())
    state.write_text(json.dumps({**kept, "trials": kept["trials"][:1]}))
    capfd.readouterr()
    run_sweep(sweep, resume=True)
    assert "this run's prompts 2020-02-29" in " ".join(capfd.readouterr().err.split())


def test_a_wrong_range_is_one_mistake(write_sweep):
    with pytest.raises(ConfigError) as caught:
        load_sweep(write_sweep(space={RATE: {"low": 0.2, "high": 0.1}}))
    (problem,) = caught.value.problems
    assert problem.message == "low (0.2) must be below high (0.1)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"training.pack_tokens": [64, 128]}}, "all adapters of a run share it"),
        ({"space": {"base": ["a", "b"]}}, "all adapters of a run share it"),
        ({"space": {"tasks.0.split.validation": [0.1, 0.2]}}, "would not compare"),
        ({"space": {RATE: [1.0], "tasks.1.lora.rank": [1]}}, "one sweep is of one task"),
        ({"space": {"tasks.7.lora.rank": [1, 2]}}, "nothing can be set|no tasks.7"),
        ({"space": {RANK: [date(2026, 1, 1), 4]}}, "space.*JSON"),
        ({"space": {RANK: [4, 9999]}}, "9999 is refused: tasks.0.lora.rank"),
        (
            {"method": "random", "trials": 4, "space": {RANK: {"low": 2.0, "high": 8.0}}},
            r"4\.2\d+ is refused: tasks.0.lora.rank: Input should be a valid integer",
        ),
        ({"space": {RATE: {"low": 1, "high": 1}}}, "must be below"),
        ({"space": {RATE: {"low": 0, "high": 1, "log": True}}}, "must begin above 0"),
        ({"space": {RATE: {"low": 0.1, "high": 1}}}, "a grid needs lists"),
        ({"space": {RATE: 0.1}}, "must be a list of values or a range"),
        ({"method": "tpe"}, "trials is required"),
        ({"halving": {"first_rung": 3}}, r"multiple of the recipe's .*validate_every \(2\)"),
        ({"halving": {"first_rung": STEPS}}, "no trial stops there: it must be below 8 steps"),
        (
            {"halving": {"first_rung": 6}, "space": {"tasks.0.steps": [4, 6]}},
            "no trial stops there: it must be below 6 steps",
        ),
        ({"space": {RATE: [0.1, 1, 1.0]}}, r"learning_rate lists 1\.0 twice"),
        ({"space": {RANK: [2, 4], "tasks.0.lora": [{"rank": 2}]}}, "tasks.0.lora.rank overlap"),
        ({"overrides": ["tasks.0.split.validation=0.0"]}, "keeps no validation rows"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(write_sweep, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(write_sweep(**changes))


def test_a_grid_begins_at_once_however_many_combinations_there_are(write_sweep):
    values = [(number + 1) / 100 for number in range(30)]
    names = ("learning_rate", "weight_decay", "epsilon", "lora_plus_ratio", "clip_norm", "momentum")
    space = {f"tasks.0.optimizer.{name}": values for name in names}
    search = make_search(load_config(write_sweep(space=space, trials=3), Sweep))
    assert [search.ask()[0] for _ in range(3)] == [0, 1, 2]


def test_ctrl_c_between_two_runs_says_how_to_go_on(write_sweep):
    small = {"space": {RATE: [0.01, 0.02]}, "trials_per_run": 1}

    def interrupt(text):
        if text.startswith("trials 1"):
            signal.raise_signal(signal.SIGINT)

    sweep = load_sweep(write_sweep(**small))
    with pytest.raises(RunInterruptedError, match="stopped by SIGINT; go on with: this"):
        run_sweep(sweep, how_to_resume="this", say=interrupt)
    states = [trial.state for trial in read_sweep(sweep.sweep_directory).trials]
    assert states == ["finished", "running"]
    resumed = run_sweep(sweep, resume=True)
    assert [trial.state for trial in resumed.trials] == ["finished", "finished"]


def test_a_sweep_needs_rows_that_fall_to_validation(make_task, write_recipe, write_sweep):
    split = {"validation": 0.01, "held_out": 0}
    write_recipe(make_task("few", rows=words(3, "few"), split=split))
    with pytest.raises(NoExamplesError, match=r"a sweep has no .* split\.validation"):
        run_sweep(load_sweep(write_sweep()))


def test_trials_on_other_rows_are_not_compared(write_sweep, tmp_path):
    path = write_sweep(space={RATE: [0.01, 0.02]}, trials_per_run=1)
    rows = tmp_path / "words.jsonl"
    before = rows.read_text()

    def changes_after_the_first_run(text: str) -> None:
        if "trials 1 to 1" in text:
            rows.write_text(before + '{"wrong": "nwe", "right": "new"}\n')

    with pytest.raises(SweepError, match=r"runs/001: the rows have changed"):
        run_sweep(load_sweep(path), say=changes_after_the_first_run)
    rows.write_text(before)
    shutil.rmtree(tmp_path / "sweeps" / "sweep" / "runs" / "001")
    result = run_sweep(load_sweep(path), resume=True)
    assert [trial.state for trial in result.trials] == ["finished", "finished"]


def test_a_directory_is_taken_up_only_when_asked_and_unchanged(write_sweep, tmp_path):
    small = {"space": {RATE: [0.01]}}
    run_sweep(load_sweep(write_sweep(**small)))
    with pytest.raises(SweepError, match="--resume"):
        run_sweep(load_sweep(write_sweep(**small)))
    with pytest.raises(SweepError, match="another sweep or recipe"):
        run_sweep(load_sweep(write_sweep(space={RATE: [0.02]})), resume=True)
    file = tmp_path / "sweeps" / "sweep" / "sweep.json"
    # As if the search had proposed something else then.
    file.write_text(file.read_text().replace("0.01", "0.03"))
    with pytest.raises(SweepError, match="no longer proposes what it did"):
        run_sweep(load_sweep(write_sweep(**small)), resume=True)
    file.write_text('{"trials": [{}], "task": "a"}')
    with pytest.raises(SweepError, match="not what a sweep writes"):
        read_sweep(tmp_path / "sweeps" / "sweep")
    file.write_text("[" * 100_000)
    with pytest.raises(SweepError, match="cannot be read"):
        read_sweep(tmp_path / "sweeps" / "sweep")


def test_a_run_that_is_gone_is_told_before_anything_is_trained(write_sweep, tmp_path):
    path = write_sweep(space={RATE: [0.01, 0.02]}, trials_per_run=1)
    run_sweep(load_sweep(path))
    shutil.rmtree(tmp_path / "sweeps" / "sweep" / "runs" / "000")
    with pytest.raises(SweepError, match=r"runs/000 is gone.*trial-000.*another --sweep-dir"):
        run_sweep(load_sweep(path), resume=True)


def test_the_verb_shows_the_trials_and_the_best_is_published(write_sweep, tmp_path):
    modules = "tasks.0.lora.target_modules"
    path = write_sweep(space={RATE: [0.02, 0.0001], modules: [["q_proj", "v_proj"]]})
    directory = tmp_path / "out"
    result = CliRunner().invoke(app, ["sweep", str(path), "--sweep-dir", str(directory), "--json"])
    told = json.loads(result.stdout)
    assert told["best"]["settings"] == {RATE: 0.02, modules: ["q_proj", "v_proj"]}
    assert (directory / "plots" / "parallel.png").read_bytes().startswith(b"\x89PNG")
    page = (directory / "report.html").read_text()
    assert page.count('class="trial') == 2
    assert "[&#39;q_proj" not in page
    assert page.count("[&#34;q_proj&#34;, &#34;v_proj&#34;]") == 4, "best, axis, two rows"
    table = (
        CliRunner()
        .invoke(app, ["sweep", str(path), "--sweep-dir", str(directory), "--resume"])
        .stdout
    )
    assert table.splitlines()[0].split("\t")[2] == "optimizer.learning_rate"
    assert table.splitlines()[1].startswith('trial-000\tfinished\t0.02\t["q_proj", "v_proj"]\t')
    registry = str(tmp_path / "registry")
    CliRunner().invoke(
        app, ["publish", str(directory), "--registry", registry, "--alias", "production"]
    )
    with Registry.open(registry) as opened:
        version = opened.resolve("words")
        assert version.metrics["validation_loss"] == told["best"]["loss"]
        assert version.lineage["trial"] == "trial-000"
        assert version.lineage["base"] == version.base_fingerprint
