"""Preference tuning equals its formula, computed with an unpacked model that is trained by hand."""

import json
import math

import pytest
import torch
from safetensors.numpy import load_file

import manylora_trainer
from manylora_trainer.dataset import load_task
from manylora_trainer.errors import RowError
from manylora_trainer.recipe import load_recipe
from manylora_trainer.sampling import ExampleStream
from manylora_trainer.tokenization import ChatTokenizer

FORMAT = {"kind": "preference", "system": "Choose the better spelling of all the words."}
BETA = 0.3


def pairs(count):
    return [
        {"prompt": f"wrd {i}", "chosen": f"word {i}", "rejected": f"wurd{'s' * (i % 4)} {i}"}
        for i in range(count)
    ]


@pytest.fixture
def task(make_task):
    return make_task(
        "prefer",
        rows=pairs(30),
        kind="dpo",
        beta=BETA,
        format=FORMAT,
        # The optimiser is so plain that one line of test is the same.
        optimizer={
            "kind": "sgd",
            "momentum": 0.0,
            "learning_rate": 0.5,
            "clip_norm": None,
            "schedule": "constant",
        },
        # All of them in every step: the order does not matter.
        batch_size=26,
        split={"validation": 0.2, "held_out": 0.0},
        steps=3,
    )


def by_hand(recipe, base, start):
    """Losses of three steps, and the validation loss after them, from PEFT and the formula."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (settings,) = load_recipe(recipe).tasks
    data = load_task(settings, ChatTokenizer(base), 7)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if settings.lora.init_from is not None:
        frozen = PeftModel.from_pretrained(frozen, str(settings.lora.init_from))
    model = PeftModel.from_pretrained(stock, str(start), is_trainable=True)

    def answer(of, example):
        tokens = torch.from_numpy(example.tokens)[None].long()
        each = of(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        picked = each.gather(1, tokens[0, 1:, None])[:, 0]
        return picked[torch.from_numpy(example.trained)[1:]].sum()

    def loss(pair):
        with torch.no_grad():
            before = answer(frozen, pair.chosen) - answer(frozen, pair.rejected)
        now = answer(model, pair.chosen) - answer(model, pair.rejected)
        return -torch.nn.functional.logsigmoid(BETA * (now - before))

    losses = []
    stream = ExampleStream(settings, data, seed=7)
    for _ in range(data.steps):
        step = torch.stack([loss(pair) for pair in stream.next_batch()]).mean()
        model.zero_grad()
        step.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
        losses.append(step.item())
    with torch.no_grad():
        return losses, torch.stack([loss(pair) for pair in data.validation]).mean().item()


def trained_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], lines


def initial(task, write_recipe, tmp_path):
    """The adapter as the run initialises it: trained with a rate of next to nothing."""
    still = {**task["optimizer"], "learning_rate": 1e-30}
    recipe = write_recipe({**task, "optimizer": still, "steps": 1}, name="still")
    manylora_trainer.train(recipe, tmp_path / "still")
    return tmp_path / "still" / "adapters" / task["name"]


@pytest.mark.parametrize("pack_tokens", [64, 4096])
def test_dpo_equals_its_formula(task, write_recipe, tiny_base, tmp_path, pack_tokens):
    recipe = write_recipe(task, pack_tokens=pack_tokens)
    result = manylora_trainer.train(recipe, tmp_path / "run")
    losses, validation = by_hand(recipe, tiny_base, initial(task, write_recipe, tmp_path))
    ours, lines = trained_losses(tmp_path / "run")
    assert ours[0] == pytest.approx(0.693147, abs=1e-5)
    assert ours == pytest.approx(losses, rel=1e-4)
    assert ours[-1] < ours[0] - 0.01
    assert result.tasks["prefer"].metrics["validation_loss"] == pytest.approx(validation, rel=1e-4)
    assert lines[-2]["preference_accuracy"] > 0.5
    # The loss of a pair with this margin: the pairs are much alike.
    margin = -math.log(math.expm1(ours[-1]))
    assert lines[-2]["preference_margin"] == pytest.approx(margin, rel=0.2)


def test_the_reference_of_an_adapter_that_goes_on_is_where_it_started(
    task, make_task, write_recipe, tiny_base, tmp_path
):
    manylora_trainer.train(write_recipe(make_task("word", steps=2)), tmp_path / "first")
    start = tmp_path / "first" / "adapters" / "word"
    on = {**task, "lora": {"rank": 4, "alpha": 8, "init_from": str(start)}}
    recipe = write_recipe(on)
    manylora_trainer.train(recipe, tmp_path / "run")
    losses, _ = by_hand(recipe, tiny_base, start)
    assert trained_losses(tmp_path / "run")[0] == pytest.approx(losses, rel=1e-4)


def test_preferences_beside_supervised_tasks_equal_each_alone(
    task, make_task, write_recipe, tmp_path
):
    other = make_task("word", steps=4)
    manylora_trainer.train(write_recipe(task, other), tmp_path / "both")
    for name, alone in (("prefer", task), ("word", other)):
        manylora_trainer.train(write_recipe(alone), tmp_path / name)
        ours, theirs = (
            load_file(tmp_path / run / "adapters" / name / "adapter_model.safetensors")
            for run in ("both", name)
        )
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4)


def test_equal_answers_are_a_malformed_row(task, make_task, write_recipe, tmp_path):
    rows = [*pairs(3), {"prompt": "a", "chosen": "b", "rejected": "b"}]
    recipe = write_recipe({**task, "source": make_task("same", rows=rows)["source"]})
    with pytest.raises(RowError, match="row 4, field 'rejected'"):
        manylora_trainer.train(recipe, tmp_path / "run")


def test_a_pair_that_is_cut_to_the_same_answers_is_left_out(make_task, write_recipe, tiny_base):
    rows = [{**row, "chosen": row["chosen"] + "x" * 300} for row in pairs(10)]
    # What tells these apart lies behind the cut.
    rows += [
        {**row, "prompt": f"late {n}", "rejected": row["chosen"] + "y"}
        for n, row in enumerate(rows)
    ]
    task = make_task(
        "prefer", rows=rows, kind="dpo", format=FORMAT, overlong="truncate", epochs=1, steps=None,
        split={"validation": 0.0, "held_out": 0.0},
    )  # fmt: skip
    (settings,) = load_recipe(write_recipe(task)).tasks
    data = load_task(settings, ChatTokenizer(tiny_base), 7)
    assert (data.examples, data.overlong_truncated, data.overlong_dropped) == (10, 10, 10)
