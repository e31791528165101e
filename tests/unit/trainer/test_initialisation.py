"""Other starts than chance, and the plain adapters that come of them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

import manylora_trainer
from manylora_trainer.dataset import load_task
from manylora_trainer.interruption import Signals
from manylora_trainer.loop import nobody, train_run
from manylora_trainer.progress import Progress
from manylora_trainer.recipe import load_recipe
from manylora_trainer.sampling import ExampleStream
from manylora_trainer.tokenization import ChatTokenizer
from manylora_trainer.workers import ProcessGroup

PISSA = {"rank": 3, "alpha": 6, "init_weights": "pissa"}
EVA = {"rank": 3, "alpha": 6, "init_weights": "eva"}
STILL = {"learning_rate": 1e-30}


def adapter_of(run, task):
    return load_file(run / "adapters" / task / "adapter_model.safetensors")


@pytest.fixture
def started(make_task, write_recipe, tmp_path):
    """Adapters that have not moved from where they began."""
    manylora_trainer.train(
        write_recipe(
            make_task("pissa", lora=PISSA, optimizer=STILL, steps=1),
            make_task("eva", lora=EVA, optimizer=STILL, steps=1),
        ),
        tmp_path / "started",
    )
    return tmp_path / "started"


def test_pissa_begins_as_the_principal_part_of_the_weights_and_changes_nothing(started, tiny_base):
    base = load_file(tiny_base / "model.safetensors")
    saved = adapter_of(started, "pissa")
    config = json.loads((started / "adapters/pissa/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        down = saved[f"base_model.model.{module}.lora_A.weight"]
        up = saved[f"base_model.model.{module}.lora_B.weight"]
        assert (up @ down).abs().max() < 1e-5
        left, values, right = torch.linalg.svd(base[f"{module}.weight"], full_matrices=False)
        principal = left[:, :3] * values[:3] @ right[:3]
        torch.testing.assert_close(2 * up[:, :3] @ down[:3], principal, rtol=1e-3, atol=1e-3)


def test_pissa_begins_so_too_where_workers_divide_the_base(
    started, make_task, write_recipe, tmp_path
):
    recipe = write_recipe(make_task("pissa", lora=PISSA, optimizer=STILL, steps=1))
    store = (tmp_path / "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    workers = ProcessGroup(sharded=True)
    try:
        with Signals() as interruption, Progress() as watch:
            train_run(
                load_recipe(recipe),
                tmp_path / "divided",
                resume=False,
                watch=watch,
                how_to_resume="",
                judge=nobody,
                interruption=interruption,
                workers=workers,
            )
    finally:
        workers.leave()
    expected = adapter_of(started, "pissa")
    for name, tensor in adapter_of(tmp_path / "divided", "pissa").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_pissa_takes_a_rank_beyond_the_smaller_side_of_a_layer(make_task, write_recipe, tmp_path):
    wide = {**PISSA, "rank": 20, "alpha": 20}  # The keys' layer has 16 outputs.
    recipe = write_recipe(make_task("wide", lora=wide, optimizer=STILL, steps=1))
    manylora_trainer.train(recipe, tmp_path / "run")
    saved = adapter_of(tmp_path / "run", "wide")
    module = "base_model.model.model.layers.0.self_attn.k_proj"
    up, down = saved[f"{module}.lora_B.weight"], saved[f"{module}.lora_A.weight"]
    assert (up @ down).abs().max() < 1e-5
    # What has no part of the weight to begin as begins as a plain adapter does.
    assert up[:, 16:20].abs().max() < 1e-20
    assert down[16:20].abs().min(dim=1).values.max() > 0


def test_eva_begins_along_the_main_directions_of_the_inputs(
    started, tiny_base, make_task, write_recipe
):
    from transformers import AutoModelForCausalLM

    (task,) = load_recipe(write_recipe(make_task("eva", lora=EVA, steps=1))).tasks
    data = load_task(task, ChatTokenizer(tiny_base), 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    module = "model.layers.1.self_attn.q_proj"
    seen = []
    model.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        for example in ExampleStream(task, data, seed=7).next_batch():
            model(input_ids=torch.from_numpy(example.tokens)[None].long())
    _, _, right = torch.linalg.svd(torch.cat(seen), full_matrices=False)
    saved = adapter_of(started, "eva")
    down = saved[f"base_model.model.{module}.lora_A.weight"]
    assert saved[f"base_model.model.{module}.lora_B.weight"].abs().max() < 1e-20
    torch.testing.assert_close(down.norm(dim=1), torch.ones(3))
    # The shared start of the prompts is looked at once, so only the first directions agree.
    assert abs(float(down[0] @ right[0])) > 0.9


def test_eva_begins_alike_whatever_the_size_of_the_packs(
    started, make_task, write_recipe, tmp_path
):
    task = make_task("eva", lora=EVA, optimizer=STILL, steps=1)
    manylora_trainer.train(write_recipe(task, pack_tokens=4096), tmp_path / "whole")
    whole = adapter_of(tmp_path / "whole", "eva")
    for name, tensor in adapter_of(started, "eva").items():
        torch.testing.assert_close(tensor, whole[name])


def test_what_they_become_is_what_peft_loads(make_task, write_recipe, tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dropped = {**PISSA, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    recipe = write_recipe(make_task("pissa", lora=dropped), make_task("eva", lora=EVA))
    result = manylora_trainer.train(recipe, tmp_path / "run")
    for task in load_recipe(recipe).tasks:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
            str(result.tasks[task.name].adapter),
        ).eval()
        summed, count = 0.0, 0
        for example in load_task(task, ChatTokenizer(tiny_base), 7).validation:
            tokens = torch.from_numpy(example.tokens)[None].long()
            labels = tokens.masked_fill(~torch.from_numpy(example.trained)[None], -100)
            with torch.no_grad():
                summed += model(input_ids=tokens, labels=labels).loss.item() * int(
                    example.trained.sum()
                )
            count += int(example.trained.sum())
        ours = result.tasks[task.name].metrics["validation_loss"]
        assert ours == pytest.approx(summed / count, rel=1e-4), task.name


def test_together_they_equal_each_alone(make_task, write_recipe, tmp_path):
    optimizer = {"kind": "sgd", "learning_rate": 0.1}
    tasks = {
        "pissa": make_task("pissa", lora=PISSA, optimizer=optimizer),
        "eva": make_task("eva", lora=EVA, optimizer=optimizer),
        "plain": make_task("plain"),
    }
    manylora_trainer.train(write_recipe(*tasks.values()), tmp_path / "together")
    for name in ("pissa", "eva"):
        manylora_trainer.train(write_recipe(tasks[name], name=name), tmp_path / name)
        ours, theirs = adapter_of(tmp_path / "together", name), adapter_of(tmp_path / name, name)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
