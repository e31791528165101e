"""Going on from an adapter that was trained before."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import manylora_trainer
from manylora_registry import Registry
from manylora_trainer.errors import InitialAdapterError
from manylora_trainer.publish import publish_run

WEIGHTS = "adapters/word/adapter_model.safetensors"
STILL = {"learning_rate": 1e-12}


@pytest.fixture
def first(make_task, write_recipe, tmp_path):
    manylora_trainer.train(write_recipe(make_task("word")), tmp_path / "first")
    return tmp_path / "first"


def test_training_goes_on_from_the_weights_it_is_given(first, make_task, write_recipe, tmp_path):
    lora = {"rank": 4, "alpha": 8, "init_from": str(first / "adapters/word")}
    recipe = write_recipe(make_task("word", lora=lora, steps=1, optimizer=STILL))
    manylora_trainer.train(recipe, tmp_path / "second")
    before, after = load_file(first / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name] == pytest.approx(tensor, abs=1e-9)


def test_what_fails_at_once_keeps_the_weights_it_was_given(
    first, make_task, write_recipe, tmp_path
):
    given = {name: tensor * np.float32(1e30) for name, tensor in load_file(first / WEIGHTS).items()}
    save_file(given, first / WEIGHTS)
    lora = {"rank": 4, "alpha": 8, "init_from": str(first / "adapters/word")}
    result = manylora_trainer.train(write_recipe(make_task("word", lora=lora)), tmp_path / "run")
    assert (result.tasks["word"].stopped or "").startswith("step 1: loss nan")
    kept = load_file(tmp_path / "run/stopped/word/adapter_model.safetensors")
    assert all((kept[name] == tensor).all() for name, tensor in given.items())


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 2, "alpha": 8}, "its r is 4, not 2"),
        ({"rank": 4, "alpha": 4}, "its lora_alpha is 8, not 4"),
        ({"rank": 4, "alpha": 8, "target_modules": ["q_proj"]}, "other modules"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    first, make_task, write_recipe, tmp_path, lora, said
):
    task = make_task("word", lora={**lora, "init_from": str(first / "adapters/word")})
    with pytest.raises(InitialAdapterError, match=said):
        manylora_trainer.train(write_recipe(task), tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_missing_adapter_is_one_clear_error(make_task, write_recipe, tmp_path):
    task = make_task("word", lora={"rank": 4, "alpha": 8, "init_from": str(tmp_path / "nowhere")})
    with pytest.raises(InitialAdapterError, match="nowhere cannot be read"):
        manylora_trainer.train(write_recipe(task), tmp_path / "run")


def test_what_went_on_from_a_version_names_it_as_its_parent(
    first, make_task, write_recipe, tmp_path
):
    lora = {"rank": 4, "alpha": 8, "init_from": str(first / "adapters/word")}
    recipe = write_recipe(make_task("word", lora=lora, steps=1))
    manylora_trainer.train(recipe, tmp_path / "second")
    with Registry.open(tmp_path / "unrelated") as registry:
        (version,) = publish_run(tmp_path / "second", registry)
        assert version.parent is None
    with Registry.open(tmp_path / "registry") as registry:
        (fresh,) = publish_run(tmp_path / "first", registry)
        (version,) = publish_run(tmp_path / "second", registry)
        assert (fresh.parent, version.parent) == (None, "word@1")
