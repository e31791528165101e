import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from manylora_registry import identify_base
from manylora_registry.errors import BaseError


def test_the_shapes_of_all_weights_are_known(base_directory, base):
    assert identify_base(base_directory).tensors == base.tensors


def test_where_a_base_lies_does_not_matter(base_directory, tmp_path):
    before = identify_base(base_directory).fingerprint
    config = {"_name_or_path": "elsewhere", "model_type": "llama", "transformers_version": "9"}
    (base_directory / "config.json").write_text(json.dumps(config, indent=4))
    base_directory.rename(tmp_path / "moved")

    assert identify_base(tmp_path / "moved").fingerprint == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"model_type": "llama", "rope_theta": 5}'),
        ("generation_config.json", '{"eos_token_id": 2}'),
        ("tokenizer.json", "{}"),
        ("chat_template.jinja", "{{ messages }} "),
    ],
)
def test_whatever_changes_an_answer_changes_the_fingerprint(base_directory, file, content):
    before = identify_base(base_directory).fingerprint
    (base_directory / file).write_text(content)

    assert identify_base(base_directory).fingerprint != before


def test_tuned_weights_are_another_base(base_directory):
    before = identify_base(base_directory).fingerprint
    weights = load_file(base_directory / "model.safetensors")
    weights["model.norm.weight"] += np.float32(1e-3)
    save_file(weights, base_directory / "model.safetensors")

    assert identify_base(base_directory).fingerprint != before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_half_a_base_is_none(base_directory, missing):
    (base_directory / missing).unlink()

    with pytest.raises(BaseError):
        identify_base(base_directory)


@pytest.mark.parametrize("content", [b"", b"\x02" + bytes(7) + b"[]", b"\xff" * 8, bytes(100)])
def test_weights_that_cannot_be_read_are_no_base(base_directory, content):
    (base_directory / "model.safetensors").write_bytes(content)

    with pytest.raises(BaseError):
        identify_base(base_directory)
