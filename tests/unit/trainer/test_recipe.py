"""A recipe's mistakes are all told at once, with their places, and without torch."""

import subprocess
import sys

import pytest
import yaml

from manylora_registry.errors import ConfigError
from manylora_trainer import load_recipe
from manylora_trainer.source_settings import JsonlSource

GOOD = {
    "base": "base",
    "run_directory": "runs/one",
    "tasks": [
        {
            "name": "spelling",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "format": {"kind": "template", "prompt": "Fix {wrong}", "completion": "{right}"},
            "steps": 10,
        }
    ],
}


def write(path, recipe):
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def with_task(**changes):
    return {**GOOD, "tasks": [{**GOOD["tasks"][0], **changes}]}


def problems(path, recipe):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(path / "recipe.yaml", recipe))
    return {problem.path: problem.message for problem in caught.value.problems}


def test_paths_are_relative_to_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path / "recipe.yaml", GOOD))
    assert recipe.base == tmp_path / "base"
    assert recipe.run_directory == tmp_path / "runs" / "one"
    source = recipe.tasks[0].source
    assert isinstance(source, JsonlSource)
    assert source.path == str(tmp_path / "rows.jsonl")


def test_every_mistake_is_reported_with_its_place(tmp_path):
    task = GOOD["tasks"][0]
    recipe = {
        **GOOD,
        "sede": 1,
        "tasks": [
            task,
            {
                **task,
                "lora": {"rank": 0, "use_dora": True, "target_modules": ["q_proj", "lm_head"]},
                "optimizer": {"warmup_steps": 10, "learning_rate": "fast"},
                "split": {"validation": 0.6, "held_out": 0.5},
                "batch_size": 0,
            },
            {
                **task,
                "name": "Bad name",
                "seed_as": "../no",
                "source": {"kind": "csv"},
                "steps": None,
            },
        ],
    }
    found = problems(tmp_path, recipe)
    assert set(found) >= {
        "sede",
        "tasks.1.name",
        "tasks.1.lora.rank",
        "tasks.1.lora.use_dora",
        "tasks.1.lora.target_modules",
        "tasks.1.optimizer.learning_rate",
        "tasks.1.split.held_out",
        "tasks.1.batch_size",
        "tasks.2.name",
        "tasks.2.seed_as",
        "tasks.2.source",
        "tasks.2.epochs",
    }
    assert found["sede"] == "unknown key"
    assert found["tasks.1.name"] == "two tasks are named 'spelling'"
    assert "'lm_head' cannot be adapted" in found["tasks.1.lora.target_modules"]
    assert "jsonl" in found["tasks.2.source"]
    assert "python" in found["tasks.2.source"]


@pytest.mark.parametrize(
    ("format_", "said"),
    [
        ({"kind": "template", "prompt": "{a.b}", "completion": "x"}, "is not a column"),
        ({"kind": "template", "prompt": "{", "completion": "x"}, "'{'"),
        ({"kind": "template", "prompt": "{}", "completion": "x"}, "is not a column"),
        ({"kind": "template", "prompt": "{a}"}, "either completion or completion_json"),
        (
            {"kind": "template", "prompt": "{a}", "completion": "b", "completion_json": ["c"]},
            "either completion or completion_json",
        ),
    ],
)
def test_a_wrong_template_is_told(tmp_path, format_, said):
    found = problems(tmp_path, with_task(format=format_))
    assert any(said in message for message in found.values()), found


def test_a_warmup_as_long_as_the_run_is_refused(tmp_path):
    found = problems(tmp_path, with_task(optimizer={"warmup_steps": 10}))
    assert "warmup_steps" in found["tasks.0.steps"]


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 300, "init_weights": "pissa"}, "600 is more than the 512"),
        ({"init_weights": "pissa", "use_rslora": True}, "doubles the rank"),
        ({"init_weights": "eva", "init_from": "there"}, "remove it or init_from"),
    ],
)
def test_starts_that_do_not_go_together_are_refused(tmp_path, lora, said):
    assert said in problems(tmp_path, with_task(lora=lora))["tasks.0.lora"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": [GOOD["tasks"][0], {**GOOD["tasks"][0], "name": "b"}]}, "exactly one task"),
        (with_task(lora={"rank": 4}), "remove tasks.0.lora"),
        ({"training": {"dtype": "bfloat16"}}, "float32"),
    ],
)
def test_full_fine_tuning_is_one_plain_task(tmp_path, change, said):
    found = problems(tmp_path, {**GOOD, **change, "kind": "full"})
    assert any(said in message for message in found.values()), found


def test_preferences_need_their_kind_and_their_format(tmp_path):
    assert "belong together" in problems(tmp_path, with_task(kind="dpo"))["tasks.0.kind"]
    found = problems(tmp_path, with_task(format={"kind": "preference"}))
    assert "belong together" in found["tasks.0.kind"]


def test_early_stopping_needs_validation_rows(tmp_path):
    found = problems(tmp_path, with_task(early_stopping={}, split={"validation": 0.0}))
    assert "split.validation" in found["tasks.0.early_stopping"]


def test_a_warmup_is_given_in_steps_or_as_a_share(tmp_path):
    found = problems(tmp_path, with_task(optimizer={"warmup_steps": 2, "warmup_share": 0.1}))
    assert "either warmup_steps or warmup_share" in found["tasks.0.optimizer"]


@pytest.mark.parametrize("rank", [1, 512])
def test_ranks_the_engine_takes_are_taken(tmp_path, rank):
    path = write(tmp_path / "recipe.yaml", with_task(lora={"rank": rank}))
    assert load_recipe(path).tasks[0].lora.rank == rank


def test_a_rank_above_the_engines_largest_is_refused(tmp_path):
    assert "tasks.0.lora.rank" in problems(tmp_path, with_task(lora={"rank": 513}))


def test_overrides_reach_a_task(tmp_path):
    path = write(tmp_path / "recipe.yaml", GOOD)
    assert load_recipe(path, ["tasks.0.steps=99"]).tasks[0].steps == 99


def test_the_digest_is_of_what_is_trained(tmp_path):
    path = write(tmp_path / "recipe.yaml", GOOD)
    digest = load_recipe(path).digest
    assert load_recipe(path, ["run_directory=elsewhere"]).digest == digest
    assert load_recipe(path, ["tasks.0.steps=11"]).digest != digest


def test_checking_a_recipe_imports_nothing_heavy(tmp_path):
    path = write(tmp_path / "recipe.yaml", GOOD)
    script = (
        "import sys; from manylora_trainer import load_recipe; load_recipe(__import__('pathlib')"
        ".Path(sys.argv[1])); import manylora_trainer.publish; "
        "print([m for m in ('torch', 'transformers', 'ray', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_paths_lose_the_way_up_they_begin_with(make_task, write_recipe, tmp_path):
    path = write_recipe(make_task("a"))
    loaded = load_recipe(path, ["run_directory=../below/../runs/one", "base=../base"])
    assert loaded.run_directory == tmp_path.parent / "below" / ".." / "runs" / "one"
    assert loaded.base == tmp_path.parent / "base"
