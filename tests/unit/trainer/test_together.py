"""Promise 3: N adapters trained in one run equal N trained in N runs, to float32 rounding."""

import json
import re
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import manylora_trainer
from manylora_trainer.adapter_settings import EarlyStopping
from manylora_trainer.errors import NoExamplesError, RunInterruptedError
from manylora_trainer.result import TaskProgress
from manylora_trainer.saved_runs import read_run
from tests.unit.trainer.conftest import StopAt, words

DIFFERENT = {
    "all": {"lora": {"rank": 4, "alpha": 8}},
    "attention": {
        "lora": {"rank": 2, "alpha": 2, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"learning_rate": 0.03, "schedule": "cosine", "warmup_steps": 2},
        "batch_size": 7,
    },
    "short": {
        "lora": {"rank": 8, "alpha": 4, "target_modules": ["down_proj", "o_proj"]},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant", "weight_decay": 0.1},
        "steps": 3,
    },
    "clipped": {
        "optimizer": {"learning_rate": 0.005, "clip_norm": 0.05},
        "format": {
            "kind": "template",
            "system": "Another system prompt.",
            "prompt": "{wrong}?",
            "completion_json": ["right"],
        },
    },
    "sgd": {
        "lora": {"rank": 3, "alpha": 6, "use_rslora": True},
        "optimizer": {"kind": "sgd", "learning_rate": 0.5, "momentum": 0.8, "clip_norm": None},
        "steps": 5,
    },
    "dropped": {
        "lora": {"rank": 5, "alpha": 10, "dropout": 0.3},
        "optimizer": {"learning_rate": 0.01, "schedule": "wsd", "warmup_share": 0.2},
        "batch_size": 5,
    },
    "dropped-sgd": {
        "lora": {"rank": 2, "alpha": 8, "dropout": 0.1, "target_modules": ["k_proj", "up_proj"]},
        "optimizer": {
            "kind": "sgd",
            "learning_rate": 0.3,
            "lora_plus_ratio": 3.0,
            "weight_decay": 0.01,
            "normalizer": "examples",
        },
        "steps": 4,
    },
}


def weights(run: Path, task: str):
    return load_file(run / "adapters" / task / "adapter_model.safetensors")


def assert_equal_to_rounding(run: Path, other: Path, task: str) -> None:
    ours, theirs = weights(run, task), weights(other, task)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam divides by the root of the gradient's square, so a weight whose gradient is all
        # rounding may move the other way: hence an absolute term well below one step.
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_tasks_together_equal_each_alone(make_task, write_recipe, tmp_path):
    tasks = {name: make_task(name, **changes) for name, changes in DIFFERENT.items()}
    together = tmp_path / "together"
    manylora_trainer.train(write_recipe(*tasks.values()), together)
    for name, task in tasks.items():
        alone = tmp_path / f"alone-{name}"
        manylora_trainer.train(write_recipe(task, name=name), alone)
        assert_equal_to_rounding(together, alone, name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_packing_does_not_change_an_adapter(make_task, write_recipe, tmp_path, dropout):
    task = make_task("words", lora={"rank": 4, "alpha": 8, "dropout": dropout})
    manylora_trainer.train(write_recipe(task, pack_tokens=16), tmp_path / "single")
    manylora_trainer.train(write_recipe(task, pack_tokens=4096), tmp_path / "whole")
    assert_equal_to_rounding(tmp_path / "single", tmp_path / "whole", "words")


def test_computing_activations_again_changes_nothing(make_task, write_recipe, tmp_path):
    tasks = [
        make_task("plain"),
        make_task("dropped", lora={"rank": 4, "alpha": 8, "dropout": 0.2}),
    ]
    for kept in ("on", "off"):
        recipe = write_recipe(*tasks, gradient_checkpointing=kept)
        manylora_trainer.train(recipe, tmp_path / kept)
    for task in ("plain", "dropped"):
        on, off = weights(tmp_path / "on", task), weights(tmp_path / "off", task)
        assert all((on[name] == off[name]).all() for name in on)


def test_dropout_changes_what_is_learned(make_task, write_recipe, tmp_path):
    plain = make_task("words")
    dropped = {**plain, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}}
    manylora_trainer.train(write_recipe(plain), tmp_path / "plain")
    manylora_trainer.train(write_recipe(dropped), tmp_path / "dropped")
    name = next(name for name in weights(tmp_path / "plain", "words") if "lora_A" in name)
    assert weights(tmp_path / "plain", "words")[name] != pytest.approx(
        weights(tmp_path / "dropped", "words")[name], abs=1e-3
    )


def test_an_adapter_that_ends_early_leaves_the_rest_unchanged(make_task, write_recipe, tmp_path):
    long = make_task("long", steps=8)
    manylora_trainer.train(write_recipe(long, make_task("brief", steps=1)), tmp_path / "both")
    manylora_trainer.train(write_recipe(long), tmp_path / "alone")
    assert_equal_to_rounding(tmp_path / "both", tmp_path / "alone", "long")
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()
        if '"brief"' in line and '"loss"' in line
    ]
    assert steps == [1]
    assert [step for step, _ in entries(tmp_path / "both", "brief", "validation_loss")] == [1]


def test_an_adapter_with_nan_loss_stops_alone_and_says_why(make_task, write_recipe, tmp_path):
    healthy = make_task("healthy")
    hopeless = make_task(
        "hopeless", optimizer={"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
    )
    result = manylora_trainer.train(write_recipe(healthy, hopeless), tmp_path / "both")
    manylora_trainer.train(write_recipe(healthy), tmp_path / "alone")
    assert_equal_to_rounding(tmp_path / "both", tmp_path / "alone", "healthy")
    assert result.tasks["hopeless"].adapter is None
    assert "loss" in (result.tasks["hopeless"].stopped or "")
    assert result.tasks["healthy"].stopped is None
    assert not (tmp_path / "both" / "adapters" / "hopeless").exists()
    # What the bad step was taken from is kept: here the initial weights.
    kept = load_file(tmp_path / "both" / "stopped" / "hopeless" / "adapter_model.safetensors")
    assert all(abs(tensor).max() < 1 for tensor in kept.values())
    run = json.loads((tmp_path / "both" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["tasks"]["hopeless"]["stopped"] == result.tasks["hopeless"].stopped
    lines = (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [e["task"] for e in entries if "stopped" in e] == ["hopeless"]


def test_an_adapter_with_an_infinite_gradient_beside_a_finite_loss_stops_as_well(
    make_task, write_recipe, tmp_path
):
    # B starts at zero: the loss is the base's, and the gradient grows with alpha.
    hopeless = make_task("hopeless", lora={"rank": 4, "alpha": 10**30})
    recipe = write_recipe(make_task("healthy"), hopeless)
    result = manylora_trainer.train(recipe, tmp_path / "run")
    stopped = re.fullmatch(
        r"step 1: loss ([0-9.]+), gradient norm inf", result.tasks["hopeless"].stopped or ""
    )
    assert stopped
    assert float(stopped[1]) < 20
    assert result.tasks["healthy"].stopped is None
    kept = load_file(tmp_path / "run" / "stopped" / "hopeless" / "adapter_model.safetensors")
    assert all(abs(tensor).max() < 1 for tensor in kept.values())


def test_an_adapter_whose_last_step_breaks_it_is_not_an_adapter(make_task, write_recipe, tmp_path):
    broken = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
    recipe = write_recipe(make_task("hopeless", steps=1, optimizer=broken))
    result = manylora_trainer.train(recipe, tmp_path / "run")
    assert "step 1: validation loss" in (result.tasks["hopeless"].stopped or "")
    assert not (tmp_path / "run" / "adapters" / "hopeless").exists()
    kept = load_file(tmp_path / "run" / "stopped" / "hopeless" / "adapter_model.safetensors")
    assert all(abs(tensor).max() < 1 for tensor in kept.values())


def test_a_resume_right_before_a_nan_keeps_the_same_sound_weights(
    make_task, write_recipe, tmp_path
):
    recipe = write_recipe(
        make_task(
            "hopeless", optimizer={"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
        )
    )
    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "resumed", progress=StopAt(1, signal.SIGTERM))
    manylora_trainer.train(recipe, tmp_path / "resumed", resume=True)
    file = "stopped/hopeless/adapter_model.safetensors"
    assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


ENDS_EARLY = {
    "early_stopping": {"patience": 2, "min_delta": 0.01},
    "optimizer": {"learning_rate": 0.05, "schedule": "constant"},
    "steps": 40,
    # More than there are rows, so that any number of steps draws from all of them.
    "batch_size": 40,
}


def entries(run: Path, task: str, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if line["task"] == task and key in line]


def test_early_stopping_needs_rows_that_fall_to_validation(make_task, write_recipe, tmp_path):
    few = {"validation": 0.01, "held_out": 0}
    recipe = write_recipe(make_task("early", **ENDS_EARLY, rows=words(3, "early"), split=few))
    with pytest.raises(NoExamplesError, match=r"early: .* no validation rows .* split\.validation"):
        manylora_trainer.train(recipe, tmp_path / "run")


def test_an_adapter_ends_when_validation_gets_no_better_and_keeps_its_best_weights(
    make_task, write_recipe, tmp_path
):
    steady, early = make_task("steady", steps=25), make_task("early", **ENDS_EARLY)
    both = tmp_path / "both"
    result = manylora_trainer.train(write_recipe(steady, early, validate_every=1), both)
    measured = entries(both, "early", "validation_loss")
    best_step, best = measured[0]
    for step, loss in measured:
        if loss < best - 0.01:
            best_step, best = step, loss
    ended = measured[-1][0]
    assert ended < 25
    assert entries(both, "early", "ended")[0][0] == ended
    assert entries(both, "early", "loss")[-1][0] == ended
    assert result.tasks["early"].stopped is None
    assert f"step {ended}" in (result.tasks["early"].ended_early or "")
    saved = read_run(both).tasks
    assert saved["early"].ended_early == result.tasks["early"].ended_early
    assert saved["steady"].ended_early is None
    assert result.tasks["early"].metrics["validation_loss"] == best

    # The saved weights are those of the best step, and the other adapter did not notice.
    cut = {key: value for key, value in ENDS_EARLY.items() if key != "early_stopping"}
    until_best = make_task("early", **{**cut, "steps": best_step})
    manylora_trainer.train(write_recipe(until_best), tmp_path / "best")
    assert_equal_to_rounding(both, tmp_path / "best", "early")
    manylora_trainer.train(write_recipe(steady), tmp_path / "alone")
    assert_equal_to_rounding(both, tmp_path / "alone", "steady")


def test_patience_is_with_validations_in_a_row():
    progress, settings = TaskProgress(), EarlyStopping(patience=2)
    for step, loss in enumerate([3.0, 3.1, 2.0, 2.1], start=1):
        progress.validated(step, loss, settings)
    assert progress.ended_early is None
    progress.validated(5, 2.2, settings)
    assert progress.ended_early == "step 5: no better validation loss than 2.0000 of step 3"


def test_equal_runs_are_equal_bytes(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("a"), make_task("b"))
    for run in ("one", "two"):
        manylora_trainer.train(recipe, tmp_path / run)
    for task in ("a", "b"):
        one, two = (
            {
                file.name: file.read_bytes()
                for file in (tmp_path / run / "adapters" / task).iterdir()
            }
            for run in ("one", "two")
        )
        assert one == two


def test_a_base_in_bfloat16_trains_almost_alike(make_task, write_recipe, tmp_path):
    losses: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        recipe = write_recipe(make_task("one"), dtype=dtype)
        result = manylora_trainer.train(recipe, tmp_path / dtype)
        losses[dtype] = result.tasks["one"].metrics["validation_loss"]
    weights = load_file(tmp_path / "bfloat16/adapters/one/adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"float32"}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
