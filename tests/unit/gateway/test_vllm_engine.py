"""What the engine of production does before a model is in memory."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.parallel_sampling import ParentRequest

from manylora_gateway.config import EngineConfig
from manylora_gateway.engine import Sampling
from manylora_gateway.errors import StartError
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
