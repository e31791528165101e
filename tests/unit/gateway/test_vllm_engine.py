"""What the engine of production does before a model is in memory."""

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.parallel_sampling import ParentRequest

from manylora_gateway.config import EngineConfig
from manylora_gateway.engine import Sampling
from manylora_gateway.errors import StartError
from manylora_gateway.refusals import by_our_names
from manylora_gateway.vllm_engine import VllmEngine, sampling_params


@pytest.mark.parametrize("seed", [7, 2**63 - 1, 2**64 - 1])
def test_seeds_of_all_answers_fit_where_vllm_puts_them(seed: int) -> None:
    asked = Sampling(max_tokens=4, temperature=1.0, n=16, seed=seed)
    request = EngineCoreRequest(
        request_id="one",
        external_req_id="one",
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=sampling_params(asked, 8, 100),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    parent = ParentRequest(request)
    seeds = [parent.get_child_info(index)[1].seed for index in range(asked.n)]
    # The type of the array that the model runner of GPUs keeps them in.
    assert len(set(np.array(seeds, dtype=np.int64))) == asked.n


def test_an_engine_on_a_cpu_asks_for_libnuma_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = ctypes.CDLL

    def linked(name: str | None, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
        if name == "libnuma.so.1":
            raise OSError("libnuma.so.1: cannot open shared object file")
        return real(name, mode)

    monkeypatch.setattr(ctypes, "CDLL", linked)
    with pytest.raises(StartError, match="needs libnuma"):
        VllmEngine(tmp_path, EngineConfig(), gpus=0)


def test_an_engine_on_a_cpu_refuses_a_type_in_which_an_adapter_could_spoil_others(
    tmp_path: Path,
) -> None:
    with pytest.raises(StartError, match=r"engine\.dtype: .*take bfloat16, or float32"):
        VllmEngine(tmp_path, EngineConfig(dtype="float16"), gpus=0)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, r"engine\.max_context \(2048\) is greater than .*max_position_embeddings=512"),
        ({"architectures": ["OddForCausalLM"]}, r"\['OddForCausalLM'\] are not supported for now$"),
        ({"model_type": "odd"}, "model type `odd` but Transformers does not recognize"),
    ],
)
def test_what_vllm_refuses_is_told_in_one_sentence_with_our_names(
    tmp_path: Path, changed: dict[str, object], why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changed}))
    with pytest.raises(StartError, match=why) as refused:
        VllmEngine(tmp_path, EngineConfig(), gpus=0)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_what_an_engine_says_of_too_little_memory_names_our_settings() -> None:
    check = kv_cache_utils._check_enough_kv_cache_memory
    with pytest.raises(ValueError, match="KV cache is needed") as found:
        check(1 << 20, lambda: 1 << 30, 2048, lambda _memory: 2)
    told = by_our_names(str(found.value))
    assert "request with engine.max_context (2048), (1.0 GiB KV cache is needed" in told
    assert "Try increasing engine.kv_cache_gib or decreasing engine.max_context." in told
    with pytest.raises(ValueError, match="No available memory") as found:
        check(0, lambda: 1 << 30, 2048, lambda _memory: 2)
    assert "Try increasing engine.gpu_memory (" in by_our_names(str(found.value))
