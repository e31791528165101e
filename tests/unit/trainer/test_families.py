"""Bases of other families than Llama are trained as PEFT reads the result, or refused by name."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import manylora_trainer
from manylora_trainer.base_model import BaseModel
from manylora_trainer.errors import UnfitTaskError, UnsupportedBaseError
from manylora_trainer.packing import Batch, pack_batches
from manylora_trainer.sweep import run_sweep
from manylora_trainer.sweep_settings import load_sweep
from manylora_trainer.tokenization import Example

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def base_of(tiny_base, tmp_path):
    """A random base of a family, with the tokenizer of the tiny one."""

    def made(family: str, seed: int = 0, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        directory = tmp_path / family
        vocabulary = len(AutoTokenizer.from_pretrained(tiny_base))
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, vocab_size=vocabulary, **{**SHAPE, **changes})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
        for file in tiny_base.glob("*token*"):
            shutil.copy(file, directory)
        for file in tiny_base.glob("*.jinja"):
            shutil.copy(file, directory)
        return directory

    return made


def recipe_over(base: Path, recipe: Path) -> manylora_trainer.Recipe:
    return manylora_trainer.load_recipe(recipe).model_copy(update={"base": base})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("gemma", {"head_dim": 8}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("granite", {"logits_scaling": 6.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gpt_neox", {}),
    ],
)
def test_what_is_trained_is_what_peft_computes(
    base_of, make_task, write_recipe, tmp_path, family, changes
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from manylora_trainer.dataset import load_task
    from manylora_trainer.tokenization import ChatTokenizer

    base = base_of(family, **changes)
    recipe = recipe_over(base, write_recipe(make_task("one", steps=2)))
    result = manylora_trainer.train(recipe, tmp_path / "run")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, str(tmp_path / "run/adapters/one")).eval()
    summed = count = 0.0
    for example in load_task(recipe.tasks[0], ChatTokenizer(base), recipe.seed).validation:
        tokens = torch.from_numpy(example.tokens)[None].long()
        labels = tokens.masked_fill(~torch.from_numpy(example.trained)[None], -100)
        with torch.no_grad():
            summed += model(input_ids=tokens, labels=labels).loss.item() * example.trained.sum()
        count += example.trained.sum()
    assert result.tasks["one"].metrics["validation_loss"] == pytest.approx(summed / count, abs=1e-3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"head_dim": 16}),
        ("gemma", {"head_dim": 8}),
        ("stablelm", {}),
        ("granite", {"logits_scaling": 6.0}),
    ],
)
def test_in_bfloat16_a_family_learns_almost_the_same(
    base_of, make_task, write_recipe, tmp_path, family, changes
):
    base = base_of(family, **changes)
    losses: list[float] = []
    for dtype in ("float32", "bfloat16"):
        recipe = recipe_over(base, write_recipe(make_task("one", steps=2), dtype=dtype))
        result = manylora_trainer.train(recipe, tmp_path / dtype)
        losses.append(result.tasks["one"].metrics["validation_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_learned_positions_train_in_bfloat16(base_of, make_task, write_recipe, tmp_path):
    base = base_of("opt", ffn_dim=48, word_embed_proj_dim=32)
    task = make_task("one", steps=2, lora={"rank": 4, "target_modules": ["q_proj", "fc1"]})
    recipe = recipe_over(base, write_recipe(task, dtype="bfloat16"))
    assert manylora_trainer.train(recipe, tmp_path / "run").tasks["one"].adapter is not None


def test_between_products_in_bfloat16_a_cpu_keeps_float32(tiny_base):
    base = BaseModel(tiny_base, torch.bfloat16, torch.device("cpu"))
    example = Example(np.arange(8, dtype=np.int32), np.arange(8) >= 4)
    (pack,) = pack_batches([Batch(0, [example])], 64)
    with base.reading(pack):
        assert base.hidden_states(pack).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1, "num_experts": 4}),
        ("phimoe", {"num_local_experts": 4}),
    ],
)
def test_a_text_longer_than_the_window_is_refused_and_a_shorter_one_is_not(
    base_of, family, changes
):
    base = BaseModel(
        base_of(family, sliding_window=32, **changes), torch.float32, torch.device("cpu")
    )
    for length in (32, 33):
        example = Example(np.arange(length, dtype=np.int32), np.arange(length) >= 4)
        (pack,) = pack_batches([Batch(0, [example])], 64)
        if length == 32:
            base.logits(pack)
        else:
            with pytest.raises(UnsupportedBaseError, match="the last 32 tokens only"):
                base.logits(pack)


def test_soft_capped_attention_is_refused(base_of, make_task, write_recipe, tmp_path):
    base = base_of("gemma2", head_dim=8, final_logit_softcapping=None)
    recipe = recipe_over(base, write_recipe(make_task("one")))
    with pytest.raises(UnsupportedBaseError, match="soft-capped"):
        manylora_trainer.train(recipe, tmp_path / "run")


def test_soft_capped_logits_are_refused(base_of, make_task, write_recipe, tmp_path):
    changes = {"attn_logit_softcapping": None, "final_logit_softcapping": 30.0}
    base = base_of("gemma2", head_dim=8, **changes)
    recipe = recipe_over(base, write_recipe(make_task("one")))
    with pytest.raises(UnsupportedBaseError, match="more to its logits than a factor"):
        manylora_trainer.train(recipe, tmp_path / "run")


def test_attention_that_cannot_be_packed_is_refused(base_of):
    with pytest.raises(UnsupportedBaseError, match="own logits"):
        BaseModel(base_of("bloom"), torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedBaseError, match="its attention takes no packs"):
        BaseModel(base_of("falcon"), torch.float32, torch.device("cpu"))


def test_a_family_that_this_trainer_cannot_read_is_refused_by_name(base_of):
    base = base_of("qwen3_next", head_dim=8, num_experts=2, moe_intermediate_size=16)
    with pytest.raises(UnsupportedBaseError, match="of the kind qwen3_next cannot be trained here"):
        BaseModel(base, torch.float32, torch.device("cpu"))


def test_sinks_are_refused(base_of, make_task, write_recipe, tmp_path):
    base = base_of("gpt_oss", head_dim=8, num_local_experts=4)
    recipe = recipe_over(base, write_recipe(make_task("one")))
    with pytest.raises(UnsupportedBaseError, match="sink"):
        manylora_trainer.train(recipe, tmp_path / "run")


def test_attention_to_chosen_tokens_is_refused_also_where_a_short_text_has_all_chosen(base_of):
    sparse: dict[str, Any] = {"index_block_size": 8, "index_topk_blocks": 3}
    sparse |= {"layer_types": ["minimax_m3_sparse"] * 2, "head_dim": 8, "num_local_experts": 4}
    with pytest.raises(UnsupportedBaseError, match="attend to chosen tokens"):
        BaseModel(base_of("minimax_m3_vl_text", **sparse), torch.float32, torch.device("cpu"))


def test_experts_are_refused_and_the_layers_beside_them_train(
    base_of, make_task, write_recipe, tmp_path
):
    base = base_of("mixtral", num_local_experts=4)
    recipe = recipe_over(base, write_recipe(make_task("one")))
    with pytest.raises(UnfitTaskError, match=r"task one: .*experts") as told:
        manylora_trainer.train(recipe, tmp_path / "run")
    # What it says to write trains.
    wanted = re.search(r"write lora\.(target_modules: \[.*\])", str(told.value))
    assert wanted is not None
    lora = {"rank": 4, **yaml.safe_load(wanted[1])}
    assert lora["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    task = make_task("one", steps=2, lora=lora)
    result = manylora_trainer.train(recipe_over(base, write_recipe(task)), tmp_path / "beside")
    assert result.tasks["one"].adapter is not None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_local_experts": 4}),
        (
            "qwen3_moe",
            {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 128},
        ),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_sends_a_token_to_another_expert_is_no_fault(base_of, family, changes, seed):
    base = base_of(family, seed=seed, **changes)
    BaseModel(base, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_carried_from_one_example_to_the_next_is_refused(base_of, dtype):
    base = base_of("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(UnsupportedBaseError, match="own logits"):
        BaseModel(base, dtype, torch.device("cpu"))


def test_a_trial_that_targets_experts_does_not_stop_the_others(
    base_of, tiny_base, make_task, write_recipe, tmp_path
):
    recipe = write_recipe(make_task("one", steps=2))
    base = base_of("mixtral", num_local_experts=4)
    recipe.write_text(recipe.read_text().replace(str(tiny_base), str(base)))
    space = {"tasks.0.lora.target_modules": [["w1"], ["q_proj"], "all-linear"]}
    settings = {"recipe": recipe.name, "sweep_directory": "sweep", "method": "grid", "space": space}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    result = run_sweep(load_sweep(tmp_path / "sweep.yaml"))
    assert [trial.state for trial in result.trials] == ["invalid", "finished", "invalid"]
    assert "experts" in (result.trials[0].why or "")


def test_an_example_that_would_move_the_positions_of_others_is_refused(
    base_of, make_task, write_recipe, tmp_path
):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    base = base_of("llama", rope_parameters=rope, max_position_embeddings=90)
    recipe = recipe_over(base, write_recipe(make_task("one")))
    manylora_trainer.train(recipe, tmp_path / "run")
    base = base_of("llama", rope_parameters=rope, max_position_embeddings=60)
    with pytest.raises(UnsupportedBaseError, match=r"beyond 60 tokens .* lower max_length"):
        manylora_trainer.train(recipe, tmp_path / "other")


def test_positions_of_one_kind_of_layer_that_would_move_are_refused(base_of):
    moving = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    changes = {"rope_parameters": {**kinds, "full_attention": moving}, "head_dim": 8}
    base = BaseModel(
        base_of("gemma3_text", max_position_embeddings=60, **changes),
        torch.float32,
        torch.device("cpu"),
    )
    example = Example(np.arange(61, dtype=np.int32), np.arange(61) >= 4)
    (pack,) = pack_batches([Batch(0, [example])], 64)
    with pytest.raises(UnsupportedBaseError, match=r"beyond 60 tokens .* lower max_length"):
        base.logits(pack)
