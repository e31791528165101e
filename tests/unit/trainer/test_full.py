"""Full fine-tuning equals plain autograd and torch's optimiser, and makes a model directory."""

import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import manylora_trainer
from manylora_registry import Registry
from manylora_trainer.dataset import load_task
from manylora_trainer.errors import NotPublishableError, RunInterruptedError, UnsupportedBaseError
from manylora_trainer.progress import Progress
from manylora_trainer.publish import publish_run
from manylora_trainer.recipe import load_recipe
from manylora_trainer.sampling import ExampleStream
from manylora_trainer.tokenization import ChatTokenizer

ROUNDING = 1e-7
"""Gradients no larger are as small as AdamW's epsilon or rounding."""


@pytest.fixture
def recipe(make_task, write_recipe):
    import yaml

    task = make_task(
        "whole",
        batch_size=40,
        steps=3,
        optimizer={"learning_rate": 1e-3, "clip_norm": None, "schedule": "constant"},
    )
    del task["lora"]
    path = write_recipe(task)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "kind": "full"}))
    return path


def test_full_fine_tuning_equals_plain_autograd(recipe, tiny_base, tmp_path):
    result = manylora_trainer.train(recipe, tmp_path / "run")
    directory = result.tasks["whole"].adapter
    assert directory is not None
    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    (task,) = load_recipe(recipe).tasks
    data = load_task(task, ChatTokenizer(tiny_base), 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    stream = ExampleStream(task, data, seed=7)
    least = {parameter: torch.full_like(parameter, torch.inf) for parameter in model.parameters()}
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for example in stream.next_batch():
            tokens = torch.from_numpy(example.tokens)[None].long()
            logits = model(input_ids=tokens).logits[0, :-1]
            trained = torch.from_numpy(example.trained)[1:]
            total = total + torch.nn.functional.cross_entropy(
                logits[trained], tokens[0, 1:][trained], reduction="sum"
            )
            count += int(trained.sum())
        optimizer.zero_grad()
        (total / count).backward()
        for parameter, smallest in least.items():
            assert parameter.grad is not None
            torch.minimum(smallest, parameter.grad.abs(), out=smallest)
        optimizer.step()
    for (name, mine), theirs in zip(ours.named_parameters(), model.parameters(), strict=True):
        # Where a gradient is rounding and nothing else, AdamW makes a whole step of it.
        told = (least[theirs] > ROUNDING) | (least[theirs] == 0)
        assert told.float().mean() > 0.99, name
        torch.testing.assert_close(mine[told], theirs[told], rtol=1e-3, atol=2e-4, msg=name)


def test_the_result_is_a_model_directory_and_not_an_adapter(recipe, tiny_base, tmp_path):
    result = manylora_trainer.train(recipe, tmp_path / "run")
    directory = result.tasks["whole"].adapter
    assert directory is not None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_base).chat_template
    with (
        Registry.open(tmp_path / "registry") as registry,
        pytest.raises(NotPublishableError, match="trained the base itself"),
    ):
        publish_run(tmp_path / "run", registry)


def test_it_resumes_to_the_same_bytes(recipe, tmp_path):
    class Stop(Progress):
        def step(self, step, losses, tokens_per_s):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=Stop())
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    weights = "adapters/whole/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so four bits are fine")
def test_four_bits_without_a_gpu_are_one_clear_error(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("a"), quantization="nf4")
    with pytest.raises(UnsupportedBaseError, match="nf4 needs a GPU"):
        manylora_trainer.train(recipe, tmp_path / "run")
