import json

import pytest

from manylora_registry.adapter_config import read_config
from manylora_registry.errors import InvalidAdapterError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def read(**changes):
    return read_config(json.dumps({**PLAIN, **changes}).encode())


# As PEFT 0.21 saves a LoraConfig.
FROM_PEFT = {
    "task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": None, "peft_version": "0.21.2",
    "base_model_name_or_path": None, "revision": None, "inference_mode": False, "r": 4,
    "target_modules": ["q_proj"], "exclude_modules": None, "lora_alpha": 8, "lora_dropout": 0.0,
    "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "modules_to_save": None,
    "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None,
    "rank_pattern": {"layers.0.q_proj": 8}, "alpha_pattern": {}, "megatron_config": None,
    "megatron_core": "megatron.core", "trainable_token_indices": None, "loftq_config": {},
    "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False,
    "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "qalora_group_size": 16, "monteclora_config": None, "layer_replication": None,
    "lora_bias": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None,
    "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip


def test_what_peft_writes_is_accepted():
    config, problems = read_config(json.dumps(FROM_PEFT).encode())

    assert problems == []
    assert config is not None
    assert (config.max_rank, config.rank_of("model.layers.0.q_proj")) == (8, 8)
    assert config.rank_of("model.layers.10.q_proj") == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"target_modules": "all-linear"},
        {"r": 512},
        {"rank_pattern": None, "modules_to_save": None, "layer_replication": None},
        {"modules_to_save": [], "some_later_key_of_peft": 1},
    ],
)
def test_plain_lora_is_accepted(changes):
    assert read(**changes)[1] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("r", 0),
        ("r", 513),
        ("r", "8"),
        ("r", True),
        ("r", 8.5),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", ""),
        ("target_modules", "("),
        ("bias", "all"),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("trainable_token_indices", [5]),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"q_proj": 1024}),
        ("rank_pattern", {"(a+)+$": 8}),
        ("alpha_pattern", {".*": 8}),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", "(a+)+$"),
    ],
)
def test_what_the_engine_would_refuse_or_compute_wrongly_is_refused(key, value):
    config, problems = read(**{key: value})

    assert config is None
    assert [problem.path.split(".")[1] for problem in problems if key in problem.path]


def test_all_mistakes_come_at_once():
    _, problems = read(r=0, bias="all", use_dora=True, init_lora_weights="olora")

    assert len(problems) == 4


@pytest.mark.parametrize(
    ("once", "twice"),
    [('"r": 2', '"r": 4, "r": 2'), ('{"q_proj": 2}', '{"q_proj": 4, "q_proj": 2}')],
)
def test_an_adapter_whose_config_has_a_key_twice_is_refused(
    registry, base, make_adapter, once, twice
):
    directory = make_adapter(config={"rank_pattern": {"q_proj": 2}, "use_dora": True})
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace(once, twice))

    with pytest.raises(InvalidAdapterError) as refused:
        registry.publish("spelling", directory, base=base)

    assert [problem.message for problem in refused.value.problems] == [
        f"the key '{'q_proj' if 'q_proj' in once else 'r'}' stands in an object twice",
        "DoRA cannot be served",
    ]


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[]", b"{", b"[" * 100_000])
def test_what_is_no_config_is_refused(content):
    config, problems = read_config(content)

    assert config is None
    assert problems
