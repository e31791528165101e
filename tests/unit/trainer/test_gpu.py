"""What training promises on a GPU. Seconds each, on a random base of two layers."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import distributed

import manylora_trainer
from manylora_registry.base import identify_base
from manylora_trainer.adapter import Adapter
from manylora_trainer.adapter_settings import Lora
from manylora_trainer.base_model import BaseModel
from manylora_trainer.errors import DeviceMemoryError, RunInterruptedError
from manylora_trainer.interruption import Signals
from manylora_trainer.loop import nobody, train_run
from manylora_trainer.lora import Routing, attach
from manylora_trainer.memory import Footprint
from manylora_trainer.objectives import MeanCrossEntropy, losses_by_adapter, sums_by_example
from manylora_trainer.packing import Batch, pack_batches
from manylora_trainer.progress import Progress
from manylora_trainer.recipe import load_recipe
from manylora_trainer.tokenization import Example
from manylora_trainer.workers import ProcessGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WEIGHTS = "adapter_model.safetensors"
LASTING = {"schedule": "constant", "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def compiled_anew():
    """Past some shapes in one process torch leaves a function as it is, and rounds otherwise."""
    torch.compiler.reset()


def adapter_bytes(run, task):
    return (run / "adapters" / task / WEIGHTS).read_bytes()


def distance(run, other, task):
    """How far two adapters are apart, in relation to how large they are."""
    ours, theirs = (load_file(r / "adapters" / task / WEIGHTS) for r in (run, other))
    ours, theirs = (np.concatenate([t[n].ravel() for n in sorted(t)]) for t in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def losses(run, task):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["task"] == task and "loss" in line]


def several(make_task):
    """Adapters that differ in rank, targets, dropout, optimiser and steps."""
    return [
        make_task("all", optimizer=LASTING),
        make_task(
            "few",
            lora={"rank": 2, "alpha": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            batch_size=7,
        ),
        make_task("dropped", lora={"rank": 5, "alpha": 10, "dropout": 0.3}),
        make_task("sgd", optimizer={"kind": "sgd", "learning_rate": 0.3, "momentum": 0.8}, steps=4),
    ]


def test_training_learns_in_bfloat16(make_task, write_recipe, tmp_path):
    task = make_task("a", optimizer=LASTING, steps=40, batch_size=8)
    manylora_trainer.train(write_recipe(task), tmp_path / "run")
    fallen = losses(tmp_path / "run", "a")
    assert np.mean(fallen[-5:]) < 0.6 * fallen[0]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_together_equals_alone(make_task, write_recipe, tmp_path, dtype, bound):
    tasks = several(make_task)
    manylora_trainer.train(write_recipe(*tasks, dtype=dtype), tmp_path / "together")
    apart = {}
    for task in tasks:
        alone = tmp_path / task["name"]
        manylora_trainer.train(write_recipe(task, name=task["name"], dtype=dtype), alone)
        apart[task["name"]] = distance(tmp_path / "together", alone, task["name"])
    assert max(apart.values()) < bound


def test_stopped_and_resumed_is_uninterrupted_to_the_bit(make_task, write_recipe, tmp_path):
    recipe = write_recipe(*several(make_task))

    class Stop(Progress):
        def step(self, step, losses, tokens_per_s):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    manylora_trainer.train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        manylora_trainer.train(recipe, tmp_path / "run", progress=Stop())
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    for task in ("all", "few", "dropped", "sgd"):
        assert adapter_bytes(tmp_path / "run", task) == adapter_bytes(tmp_path / "whole", task)


def test_computing_activations_again_changes_no_bit(make_task, write_recipe, tmp_path):
    task = make_task("a", lora={"rank": 4, "alpha": 8, "dropout": 0.2})
    for kept in ("on", "off"):
        recipe = write_recipe(task, name=kept, gradient_checkpointing=kept)
        manylora_trainer.train(recipe, tmp_path / kept)
    assert adapter_bytes(tmp_path / "on", "a") == adapter_bytes(tmp_path / "off", "a")


def test_an_adapter_that_diverges_stops_alone(make_task, write_recipe, tmp_path):
    healthy = make_task("healthy")
    reckless = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
    both = manylora_trainer.train(
        write_recipe(healthy, make_task("hopeless", optimizer=reckless)), tmp_path / "both"
    )
    manylora_trainer.train(write_recipe(healthy), tmp_path / "alone")
    assert both.tasks["hopeless"].stopped
    assert both.tasks["healthy"].stopped is None
    assert distance(tmp_path / "both", tmp_path / "alone", "healthy") < 0.05


def test_packs_are_as_large_as_memory_allows(make_task, write_recipe, tiny_base):
    recipe = load_recipe(write_recipe(make_task("a"), pack_tokens=None))
    small = Footprint.of(recipe, identify_base(tiny_base), torch.device("cuda:0"))
    assert (small.pack_tokens, small.recomputes) == (16384, False)
    weights = torch.cuda.get_device_properties(0).total_memory // 2
    filling = replace(small, shapes=replace(small.shapes, weights=weights))
    assert (filling.pack_tokens, filling.recomputes) == (2048, True)


def batches_with_prefixes():
    """Two adapters' examples of many lengths, some of which begin alike."""
    random = np.random.default_rng(0)
    prefix = random.integers(3, 250, 20)
    made = []
    for adapter in range(2):
        examples = []
        for length in (9, 30, 31, 64, 100, 140):
            tokens = random.integers(3, 250, length)
            if length in (31, 64, 140):
                tokens[:20] = prefix
            prompt = min(24, length - 3)
            examples.append(Example(tokens.astype(np.int32), np.arange(length) >= prompt))
        made.append(Batch(adapter, examples))
    return made


def gradients(tiny_base, device, dtype):
    """Of two adapters over one pack, and the logits at its targets."""
    base = BaseModel(tiny_base, dtype, torch.device(device))
    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in base.model.named_parameters()
        if "proj" in name
    }
    adapters = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        made = Adapter(shapes, Lora(rank=4, alpha=8), generator, base.device)
        made.weights += 0.05 * torch.randn(made.weights.shape, generator=generator).to(device)
        adapters.append(made)
    routing = Routing(base.device)
    attach(base.model, adapters, routing)
    batches = batches_with_prefixes()
    (pack,) = pack_batches(batches, 4096)
    assert any(bucket.prefix for bucket in pack.buckets)
    objectives = [MeanCrossEntropy(batch, "tokens", base.device) for batch in batches]
    with base.reading(pack), routing.through(pack.ranges):
        summed = sums_by_example(pack, base.cross_entropy(pack))
        of_each = [loss for _, loss in losses_by_adapter(pack, summed, objectives)]
        torch.stack(of_each).sum().backward()
        with torch.no_grad():
            logits = base.model.get_output_embeddings()(base.hidden_states(pack))
    return [a.gradients.cpu() for a in adapters], logits.float().cpu()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=["float32", "bfloat16"]
)
def test_logits_and_gradients_of_a_pack_are_those_of_a_cpu(tiny_base, dtype, bound):
    theirs, expected = gradients(tiny_base, "cpu", torch.float32)
    ours, logits = gradients(tiny_base, "cuda", dtype)
    error = {"logits": float((logits - expected).norm() / expected.norm())}
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        error[f"adapter {number}"] = float((own - other).norm() / other.norm())
    assert max(error.values()) < bound


def test_four_bits_train_a_plain_adapter_in_less_memory(
    make_task, write_recipe, tmp_path, tiny_base
):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    wide = tmp_path / "wide"
    config = AutoConfig.from_pretrained(tiny_base)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 1024, 4096, 16
    config.head_dim, config.num_key_value_heads = 64, 8
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(wide)
    taken = {}
    for four_bit in (False, True):
        before = torch.cuda.memory_allocated()
        base = BaseModel(wide, torch.bfloat16, torch.device("cuda"), four_bit=four_bit)
        taken[four_bit] = torch.cuda.memory_allocated() - before
        del base
    assert taken[True] < 0.4 * taken[False]

    task = make_task("a", optimizer={"learning_rate": 2e-3, "schedule": "constant"}, steps=30)
    recipe = write_recipe(task, quantization="nf4")
    settings = recipe.read_text().replace(str(tiny_base), str(wide))
    recipe.write_text(settings)
    manylora_trainer.train(recipe, tmp_path / "run")
    fallen = losses(tmp_path / "run", "a")
    assert np.mean(fallen[-5:]) < 0.8 * fallen[0]
    stock = AutoModelForCausalLM.from_pretrained(wide)
    loaded = PeftModel.from_pretrained(stock, str(tmp_path / "run" / "adapters" / "a"))
    assert all(p.isfinite().all() for n, p in loaded.named_parameters() if "lora" in n)


def test_a_worker_with_a_divided_base_trains_the_same(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("a"), dtype="float32")
    manylora_trainer.train(recipe, tmp_path / "alone")
    distributed.init_process_group(
        "nccl",
        init_method=(tmp_path / "store").as_uri(),
        rank=0,
        world_size=1,
        device_id=torch.device("cuda:0"),
    )
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
                device=torch.device("cuda:0"),
            )
    finally:
        workers.leave()
    assert distance(tmp_path / "divided", tmp_path / "alone", "a") < 1e-4


def test_too_little_memory_is_one_clear_error(make_task, write_recipe, tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 40e6 / total))
    rows = [{"wrong": "w" * 20, "right": "r" * 300} for _ in range(320)]
    task = make_task("a", rows, max_length=500, batch_size=200)
    recipe = write_recipe(task, pack_tokens=65536)
    try:
        with pytest.raises(DeviceMemoryError, match="pack_tokens 65536: lower that"):
            manylora_trainer.train(recipe, tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
