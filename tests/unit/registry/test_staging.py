"""What may be published, and that nothing of the rest becomes visible."""

import errno
import os
import pickle
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from manylora_registry import BaseModelIdentity
from manylora_registry.errors import InvalidAdapterError, InvalidNameError, WrongBaseError

Q = "base_model.model.model.layers.0.q_proj"


@pytest.fixture
def refused(registry, base):
    """Publishes, expects a refusal that leaves no trace, and returns what it says."""

    def publish(directory, **description):
        with pytest.raises(InvalidAdapterError) as failed:
            registry.publish("spelling", directory, base=base, **description)
        assert registry.adapters() == []
        assert registry.events() == []
        report = registry.verify()
        assert (report.versions, report.blobs, report.unreferenced) == (0, 0, ())
        return str(failed.value)

    return publish


def test_a_stray_file_is_refused(refused, make_adapter):
    directory = make_adapter()
    (directory / "optimizer.pt").write_bytes(b"")
    (directory / "sub").mkdir()

    assert "optimizer.pt, sub: does not belong" in refused(directory)


def test_pickled_weights_are_refused(refused, make_adapter, tensors):
    directory = make_adapter()
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(tensors))

    said = refused(directory)

    assert "adapter_model.bin: does not belong" in said
    assert "adapter_model.safetensors: is missing" in said


def test_a_pickle_by_the_name_of_safetensors_is_refused(refused, make_adapter, tensors):
    directory = make_adapter()
    (directory / "adapter_model.safetensors").write_bytes(pickle.dumps(tensors))

    assert "not a safetensors file" in refused(directory)


@pytest.mark.parametrize("title", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_a_symbolic_link_is_refused(refused, make_adapter, tmp_path, title):
    directory = make_adapter(card="hello")
    outside = tmp_path / title
    (directory / title).rename(outside)
    (directory / title).symlink_to(outside)

    assert f"{title}: is a symbolic link" in refused(directory)


def test_a_pipe_is_refused_without_waiting_for_it(refused, make_adapter):
    directory = make_adapter()
    os.mkfifo(directory / "README.md")

    assert "README.md: is not a regular file" in refused(directory)
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        # Somebody who has it open would be there to read.
        os.open(directory / "README.md", os.O_WRONLY | os.O_NONBLOCK)


def test_a_directory_that_is_not_there_is_refused(refused, tmp_path):
    assert "cannot be read" in refused(tmp_path / "nothing")


def test_a_config_without_end_is_refused(refused, make_adapter):
    directory = make_adapter()
    with (directory / "adapter_config.json").open("ab") as file:
        file.truncate(50 << 20)

    assert "larger than" in refused(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(refused, make_adapter, tensors, value):
    tensors[f"{Q}.lora_B.weight"][3, 1] = value

    assert f"{Q}.lora_B.weight: holds a NaN" in refused(make_adapter(tensors=tensors))


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("base_model.model.model.layers.9.q_proj.lora_A.weight", (2, 8), "base does not have"),
        ("base_model.model.model.norm.lora_A.weight", (2, 8), "no linear layer"),
        ("base_model.model.model.embed_tokens.lora_A.weight", (2, 8), "no linear layer"),
        ("model.layers.0.q_proj.weight", (8, 8), "is not named"),
        (f"{Q}.lora_embedding_A", (2, 8), "is not named"),
        ("base_model.model..lora_A.weight", (2, 8), "is not named"),
        ("base_model.model.lora_A.weight", (2, 8), "is not named"),
        (f"{Q}.base_layer.weight", (8, 8), "save_embedding_layers=False"),
        (f"{Q}.lora_A.weight", (2, 9), "rank 2 on the base's [8, 8] is [2, 8]"),
        (f"{Q}.lora_A.weight", (3, 8), "rank 2 on the base's [8, 8] is [2, 8]"),
        (f"{Q}.lora_B.weight", (2, 8), "rank 2 on the base's [8, 8] is [8, 2]"),
        (f"{Q}.lora_B.weight", (16,), "rank 2 on the base's [8, 8] is [8, 2]"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused(refused, make_adapter, name, shape, says):
    said = refused(make_adapter(tensors={name: np.zeros(shape, np.float32)}))

    assert says in said


def test_what_is_wrong_with_many_tensors_is_said_once(refused, make_adapter):
    names = [f"layers.{number}.weight" for number in range(40)]
    said = refused(make_adapter(tensors={name: np.zeros((2, 8), np.float32) for name in names}))

    assert said.count("is not named") == 1
    assert " and 37 more: is not named" in said


def test_half_a_pair_is_refused(refused, make_adapter, tensors):
    directory = make_adapter()
    del tensors[f"{Q}.lora_B.weight"]
    save_file(tensors, directory / "adapter_model.safetensors")

    assert f"{Q}.lora_A.weight: has no partner" in refused(directory)


def test_an_empty_adapter_is_refused(refused, make_adapter):
    directory = make_adapter()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")

    assert "holds no tensor" in refused(directory)


def test_integer_weights_are_refused(refused, make_adapter):
    whole = {f"{Q}.lora_A.weight": np.zeros((2, 8), np.int32)}

    assert "I32; allowed are" in refused(make_adapter(tensors=whole))


def test_modules_the_config_does_not_target_are_refused(refused, make_adapter):
    said = refused(make_adapter(config={"target_modules": ["up_proj"]}))

    assert "adapts what the config's target_modules leaves out" in said


@pytest.mark.parametrize(
    ("config", "by"),
    [
        ({"layers_to_transform": [1, 2]}, "layers_to_transform"),
        ({"layers_to_transform": 1}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}, "layers_to_transform"),
        ({"exclude_modules": ["up_proj"]}, "exclude_modules"),
    ],
)
def test_modules_that_peft_would_leave_out_are_refused(refused, make_adapter, config, by):
    assert f"adapts what the config's {by} leaves out" in refused(make_adapter(config=config))


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": []},
        {"layers_to_transform": 0},
        {"layers_to_transform": [1, 0], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": [0], "layers_pattern": "model.layers"},
        {
            "layers_to_transform": [1],
            "target_modules": ["model.layers.0.q_proj", "model.layers.0.up_proj"],
        },
        {"layers_to_transform": [0], "layers_pattern": "", "exclude_modules": ["roj", "layers.1"]},
    ],
)
def test_chosen_layers_that_fit_the_tensors_are_accepted(registry, base, make_adapter, config):
    assert registry.publish("spelling", make_adapter(config=config), base=base).number == 1


def test_ranks_follow_the_pattern(registry, base, make_adapter):
    wide = {
        f"{Q}.lora_A.weight": np.zeros((4, 8), np.float32),
        f"{Q}.lora_B.weight": np.zeros((8, 4), np.float32),
    }
    directory = make_adapter(config={"rank_pattern": {"q_proj": 4}}, tensors=wide)

    assert registry.publish("spelling", directory, base=base).rank == 4


def test_all_mistakes_come_at_once(refused, make_adapter, tensors):
    tensors[f"{Q}.lora_B.weight"][0, 0] = np.nan
    directory = make_adapter(
        config={"bias": "all", "use_dora": True},
        tensors={**tensors, f"{Q}.lora_A.weight": np.zeros((2, 9), np.float32)},
    )
    (directory / "stray.txt").touch()

    said = refused(directory, metrics={"loss": float("nan"), "accuracy": 0.5}, tags={"a b": "c"})

    for mistake in (
        "stray.txt", "bias", "use_dora", "lora_A.weight: is [2, 9]", "lora_B.weight: holds a NaN",
        "metrics.loss", "tags.a b",
    ):  # fmt: skip
        assert mistake in said
    assert "accuracy" not in said


def test_an_adapter_of_another_base_is_refused(registry, base, make_adapter):
    other = BaseModelIdentity("sha256:" + "c" * 64, base.tensors)

    with pytest.raises(WrongBaseError) as failed:
        registry.publish("spelling", make_adapter(), base=other)

    assert (failed.value.made_for, failed.value.wanted) == (base.fingerprint, other.fingerprint)
    assert registry.adapters() == []


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "", "/tmp/x", "A", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(registry, base, make_adapter, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    adapter = make_adapter()

    with pytest.raises(InvalidNameError):
        registry.publish(name, adapter, base=base)

    after = {path for path in tmp_path.rglob("*") if adapter not in (path, *path.parents)}
    assert sorted(after) == before
