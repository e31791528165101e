"""A tiny random base with its own tokenizer, and recipes over it."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from manylora_trainer.progress import Progress

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou answer with one word."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random float32 weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("base")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


class StopAt(Progress):
    """Sends this process a signal during a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__()
        self._step = step
        self._number = number

    def step(self, step, losses, tokens_per_s):
        if step == self._step:
            os.kill(os.getpid(), self._number)


def words(count: int, prefix: str = "word") -> list[dict[str, str]]:
    """Rows of different lengths."""
    return [
        {"wrong": f"{prefix}{i * 7919 % 1009}", "right": f"{prefix}-{'x' * (i % 5)}{i}"}
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of one task over forty rows; keyword arguments replace keys."""

    def make(name: str, rows: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
        path = write_rows(tmp_path / f"{name}.jsonl", rows or words(40, name))
        return {
            "name": name,
            "source": {"kind": "jsonl", "path": str(path)},
            "format": {"kind": "template", "prompt": "Fix: {wrong}", "completion": "{right}"},
            "split": {"validation": 0.1, "held_out": 0.1},
            "lora": {"rank": 4, "alpha": 8},
            "optimizer": {"learning_rate": 0.01},
            "steps": 6,
            "batch_size": 4,
            "max_length": 200,
            **changes,
        }

    return make


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """Writes a recipe of these tasks; keyword arguments replace training settings."""

    def write(*tasks: Mapping[str, Any], name: str = "recipe", **training: Any) -> Path:
        recipe = {
            "base": str(tiny_base),
            "seed": 7,
            "run_directory": str(tmp_path / "runs" / name),
            "training": {
                "pack_tokens": 128,
                "validate_every": 2,
                "checkpoint_every": 2,
                "threads": 1,
                **training,
            },
            "tasks": list(tasks),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write
