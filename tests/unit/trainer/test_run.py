"""What a run leaves behind: adapters that PEFT reads, metrics, a picture, versions."""

import json
import signal
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import manylora_trainer
from manylora_cli.publish import publish
from manylora_cli.train import train
from manylora_registry import Registry
from manylora_trainer.cards import adapter_card
from manylora_trainer.dataset import load_task
from manylora_trainer.dry_run import plan
from manylora_trainer.errors import (
    AdaptersStoppedError,
    NoExamplesError,
    NotPublishableError,
    RunInterruptedError,
    UnfitTaskError,
)
from manylora_trainer.progress import Progress
from manylora_trainer.publish import publish_run
from manylora_trainer.recipe import load_recipe
from manylora_trainer.tokenization import ChatTokenizer
from tests.unit.trainer.conftest import StopAt

app = typer.Typer()
app.command()(train)
app.command()(publish)

PARTIAL = {"rank": 2, "alpha": 6, "target_modules": ["q_proj", "mlp.up_proj"]}


@pytest.fixture
def recipe(make_task, write_recipe):
    return write_recipe(make_task("first"), make_task("second", lora=PARTIAL, steps=4))


@pytest.fixture
def run(recipe, tmp_path):
    return manylora_trainer.train(recipe, tmp_path / "run")


def test_peft_computes_the_same_loss_with_the_saved_adapters(recipe, run, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for task in load_recipe(recipe).tasks:
        data = load_task(task, ChatTokenizer(tiny_base), 7)
        assert data.validation

        def loss(model, examples=data.validation):
            summed, count = 0.0, 0
            for example in examples:
                tokens = torch.from_numpy(example.tokens)[None].long()
                labels = tokens.masked_fill(~torch.from_numpy(example.trained)[None], -100)
                learned = int(example.trained.sum())
                with torch.no_grad():
                    summed += model(input_ids=tokens, labels=labels).loss.item() * learned
                count += learned
            return summed / count

        stock = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        bare = loss(stock)
        adapted = loss(PeftModel.from_pretrained(stock, run.tasks[task.name].adapter).eval())
        ours = run.tasks[task.name].metrics["validation_loss"]
        assert ours == pytest.approx(adapted, rel=1e-5)
        assert ours < bare - 0.1


def test_adapter_directory_is_what_engines_read(run, tmp_path):
    directory = tmp_path / "run" / "adapters" / "second"
    assert sorted(file.name for file in directory.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.up_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 6, "LORA")
    assert config["base_model_name_or_path"].startswith("sha256:")
    first = json.loads((tmp_path / "run/adapters/first/adapter_config.json").read_text())
    assert first["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_the_run_directory_tells_the_run(run, tmp_path):
    directory = tmp_path / "run"
    told = json.loads((directory / "run.json").read_text())
    assert told["status"] == "finished"
    task = told["tasks"]["second"]
    assert task["steps"] == 4
    assert task["metrics"].keys() == {"train_loss", "validation_loss"}
    rows = tmp_path / "second.jsonl"
    assert [(f["path"], f["bytes"]) for f in task["files"]["listed"]] == [
        (str(rows), rows.stat().st_size)
    ]
    held_out = (directory / "held_out" / "second.jsonl").read_text().splitlines()
    assert len(held_out) == task["held_out_rows"] > 0
    assert json.loads(held_out[0]).keys() == {"messages", "expected", "row"}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and line["task"] == "second"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0].keys() == {
        *("step", "task", "loss", "tokens", "trained_tokens", "computed_tokens"),
        *("tokens_per_s", "grad_norm", "lr", "peak_memory_bytes", "time"),
    }
    assert 1e6 < steps[0]["peak_memory_bytes"] < 1e12
    validations = [line["step"] for line in lines if "validation_loss" in line]
    assert validations == [2, 2, 4, 4, 6]
    assert sum(line["tokens"] for line in steps) == task["tokens"]
    assert (directory / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert steps[-1]["loss"] < steps[0]["loss"]
    kept = sorted(entry.name for entry in (directory / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_held_out_rows_keep_columns_that_json_has_no_form_for(make_task, write_recipe, tmp_path):
    task = make_task("odd", steps=1)
    file = tmp_path / "rows.py"
    file.write_text(
        "import datetime\n"
        "def rows():\n"
        "    for number in range(40):\n"
        "        yield {'wrong': f'w{number}', 'right': 'r', 'half': '\\ud800',\n"
        "               'days': [{datetime.date(2026, 1, 2): {(1, 2): True}}], 1: b'x'}\n"
    )
    task["source"] = {"kind": "python", "file": str(file), "function": "rows"}
    manylora_trainer.train(load_recipe(write_recipe(task)))
    (first, *_) = (tmp_path / "runs/recipe/held_out/odd.jsonl").read_text("utf-8").splitlines()
    row = json.loads(first)["row"]
    assert row["half"] == "\ud800"
    assert row["days"] == [{"2026-01-02": {"(1, 2)": True}}]


def test_the_run_tells_what_it_ran_on_and_no_secret(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    monkeypatch.chdir(_repository(tmp_path / "work"))
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=StopAt(2, signal.SIGTERM))
    (tmp_path / "work" / "file").write_text("changed")
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    text = (tmp_path / "run" / "environment.json").read_text()
    begun, resumed = json.loads(text)["starts"]
    assert begun["environment"]["packages"]["torch"] == version("torch")
    assert begun["environment"]["threads"] == 1
    assert (begun["git"]["branch"], begun["git"]["dirty"]) == ("trunk", False)
    assert (resumed["git"]["commit"], resumed["git"]["dirty"]) == (begun["git"]["commit"], True)
    assert "hunter2" not in text
    assert f'"{socket.gethostname()}"' not in text


def _repository(directory: Path) -> Path:
    directory.mkdir()
    (directory / "file").write_text("as committed")
    for command in ("init -q -b trunk", "add file", "commit -q -m first"):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command.split()],
            cwd=directory,
            check=True,
        )
    return directory


def test_the_card_tells_what_the_adapter_is_and_no_place(run, tmp_path):
    card = (tmp_path / "run" / "adapters" / "second" / "README.md").read_text()
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["base"]["fingerprint"] in card
    assert told["tasks"]["second"]["data_fingerprint"] in card
    assert "| lora.rank | 2 |" in card
    assert "| validation_loss | " in card
    assert "prompt: 'Fix: {wrong}'" in card
    assert str(tmp_path) not in card


def test_a_fence_in_a_prompt_does_not_end_that_of_the_card(make_task, write_recipe):
    prompt = "{wrong}\n```sql\nSELECT 1\n```\n"
    format_ = {"kind": "template", "prompt": prompt, "completion": "{right}"}
    (task,) = load_recipe(write_recipe(make_task("first", format=format_))).tasks
    card = adapter_card(task, "sha256:base", "sha256:data", {})
    _, opening, told = card.partition("\n````yaml\n")
    assert opening
    told, closing, after = told.partition("\n````\n")
    assert yaml.safe_load(told)["prompt"] == prompt
    assert closing
    assert after.startswith("\n## Settings")


def test_the_resolved_recipe_starts_the_same_run(run, tmp_path):
    again = manylora_trainer.train(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    weights = "adapters/first/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()
    assert again.tasks["first"].metrics == run.tasks["first"].metrics


def test_a_target_that_matches_nothing_is_refused_before_anything_is_written(
    make_task, write_recipe, tmp_path
):
    recipe = write_recipe(make_task("a", lora={"target_modules": ["query_key_value"]}))
    with pytest.raises(UnfitTaskError, match=r"query_key_value; it has .*q_proj"):
        manylora_trainer.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_examples_are_held_to_the_positions_of_the_base(make_task, write_recipe, tmp_path):
    heard: list[str] = []

    class Hearing(Progress):
        def say(self, text):
            heard.append(text)

    rows = [{"wrong": f"w{i}", "right": "r" * (20 if i % 4 else 600)} for i in range(40)]
    long = make_task("long", rows, max_length=900, overlong="truncate")
    recipe = write_recipe(make_task("fits", max_length=512), long, pack_tokens=1024)
    manylora_trainer.train(recipe, tmp_path / "run", progress=Hearing())
    told = [text for text in heard if "512 positions" in text]
    assert told == ["long: the base has 512 positions, so max_length is 512"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    cut = [line for line in map(json.loads, lines) if line.get("overlong_truncated")]
    assert {line["task"] for line in cut} == {"long"}
    fits, planned = plan(load_recipe(recipe)).tasks
    assert fits.overlong_truncated == 0
    assert planned.overlong_truncated > 0


def test_publishing_a_run_makes_versions_and_moves_aliases(run, tmp_path):
    with Registry.open(tmp_path / "registry") as registry:
        versions = publish_run(tmp_path / "run", registry, alias="production")
        assert [(v.name, v.number) for v in versions] == [("first", 1), ("second", 1)]
        told = json.loads((tmp_path / "run" / "run.json").read_text())
        found = registry.resolve("second")
        assert found.digest == versions[1].digest
        assert found.rank == 2
        assert found.base_fingerprint == told["base"]["fingerprint"]
        assert found.metrics == told["tasks"]["second"]["metrics"]
        assert found.lineage["recipe"] == told["recipe_digest"]
        assert found.lineage["data"] == told["tasks"]["second"]["data_fingerprint"]
        again = publish_run(tmp_path / "run", registry, tasks=["second"])
        assert [v.digest for v in again] == [versions[1].digest]


def test_what_was_not_trained_is_not_published(make_task, write_recipe, tmp_path):
    diverging = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
    recipe = write_recipe(make_task("good", steps=2), make_task("bad", optimizer=diverging))
    manylora_trainer.train(recipe, tmp_path / "run")
    with Registry.open(tmp_path / "registry") as registry:
        with pytest.raises(NotPublishableError, match=r"bad stopped early.*no task 'other'"):
            publish_run(tmp_path / "run", registry, tasks=["good", "bad", "other"])
        assert registry.adapters() == []
        assert [v.name for v in publish_run(tmp_path / "run", registry)] == ["good"]
        with pytest.raises(NotPublishableError, match="is not a run"):
            publish_run(tmp_path, registry)


def test_the_verbs_train_and_publish(recipe, tmp_path):
    run_dir, registry = str(tmp_path / "run"), str(tmp_path / "registry")
    trained = CliRunner().invoke(
        app, ["train", str(recipe), "--run-dir", run_dir, "--set", "tasks.0.steps=2", "--json"]
    )
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["tasks"]["first"]["adapter"].endswith("adapters/first")
    published = CliRunner().invoke(
        app,
        [
            "publish",
            run_dir,
            "--task",
            "first",
            "--alias",
            "next",
            "--registry",
            registry,
            "--json",
        ],
    )
    assert [entry["name"] for entry in json.loads(published.stdout)] == ["first"]


def test_where_nothing_fits_the_recipe_has_to_change_and_no_resume_is_advised(
    make_task, write_recipe, tmp_path
):
    heard: list[str] = []

    class Hearing(Progress):
        def say(self, text):
            heard.append(text)

    recipe = write_recipe(make_task("long", max_length=8))
    with pytest.raises(NoExamplesError, match=r"Raise max_length.* in a new run"):
        manylora_trainer.train(recipe, tmp_path / "run", progress=Hearing())
    assert not any("go on with" in text for text in heard)


def test_the_verb_fails_when_an_adapter_stopped(make_task, write_recipe, tmp_path):
    diverging = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
    recipe = write_recipe(make_task("bad", optimizer=diverging))
    result = CliRunner().invoke(app, ["train", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert isinstance(result.exception, AdaptersStoppedError)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
