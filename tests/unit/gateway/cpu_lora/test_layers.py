"""vLLM's own LoRA layers, found by its plugin mechanism to use our kernels, give the right rows."""

# vLLM declares its layers looser than they are.
# pyright: reportArgumentType=false

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.plugins import load_general_plugins

from manylora_gateway.cpu_lora.wrapper import GroupedLoRAWrapper

from .reference import VOCABULARY, announce

HIDDEN = 32
WIDTHS = (32, 16, 16)
ROW_SLOTS = (2, -1, 0, 0, 1, -1, 2)
CONFIG = LoRAConfig(max_lora_rank=8, max_loras=3, lora_dtype=torch.float32)


@pytest.fixture(scope="module", autouse=True)
def one_process_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The distributed state vLLM's layers ask for, of this process alone."""
    meeting = tmp_path_factory.mktemp("world") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture
def kernels() -> GroupedLoRAWrapper:
    """What vLLM gives its layers once it has loaded its plugins."""
    load_general_plugins()
    found = get_punica_wrapper(64, max_batches=16, device="cpu", lora_config=CONFIG)
    assert isinstance(found, GroupedLoRAWrapper)
    announce(found, ROW_SLOTS, 3)
    return found


def adapter(rank: int, width_in: int, width_out: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width_in, generator=generator)
    return a, torch.randn(width_out, rank, generator=generator)


def with_lora(layer: BaseLayerWithLoRA, kernels: GroupedLoRAWrapper) -> None:
    layer.create_lora_weights(3, CONFIG)
    layer.set_mapping(kernels)


def test_fused_qkv(kernels: GroupedLoRAWrapper) -> None:
    base = QKVParallelLinear(HIDDEN, 8, 4, 2, bias=False, params_dtype=torch.float32)
    torch.nn.init.normal_(base.weight)
    base.quant_method.process_weights_after_loading(base)
    layer = MergedQKVParallelLinearWithLoRA(base)
    with_lora(layer, kernels)
    x = torch.randn(len(ROW_SLOTS), HIDDEN)
    plain = base(x)[0]
    torch.testing.assert_close(layer(x)[0], plain)

    deltas: dict[int, Tensor] = {-1: torch.zeros(len(ROW_SLOTS), sum(WIDTHS))}
    for slot, rank in enumerate([3, 8, 5]):
        q, v = adapter(rank, HIDDEN, WIDTHS[0], slot), adapter(rank, HIDDEN, WIDTHS[2], 10 + slot)
        layer.set_lora(slot, [q[0], None, v[0]], [q[1], None, v[1]])
        none = torch.zeros(len(ROW_SLOTS), WIDTHS[1])
        deltas[slot] = torch.cat([x @ q[0].t() @ q[1].t(), none, x @ v[0].t() @ v[1].t()], dim=1)
    expected = torch.stack([plain[r] + deltas[slot][r] for r, slot in enumerate(ROW_SLOTS)])
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)

    layer.reset_lora(2)
    deltas[2] = deltas[-1]
    expected = torch.stack([plain[r] + deltas[slot][r] for r, slot in enumerate(ROW_SLOTS)])
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_row_parallel_with_a_bias_in_two_and_three_dimensions(
    kernels: GroupedLoRAWrapper, skip_bias_add: bool
) -> None:
    base = RowParallelLinear(HIDDEN, 24, params_dtype=torch.float32, skip_bias_add=skip_bias_add)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    base.quant_method.process_weights_after_loading(base)
    layer = RowParallelLinearWithLoRA(base)
    with_lora(layer, kernels)
    x = torch.randn(len(ROW_SLOTS), HIDDEN)
    expected, bias = (None if part is None else part.clone() for part in base(x))
    assert expected is not None
    for slot, rank in enumerate([3, 8, 5]):
        a, b = adapter(rank, HIDDEN, 24, slot)
        layer.set_lora(slot, a, b)
        for row, row_slot in enumerate(ROW_SLOTS):
            if row_slot == slot:
                expected[row] += b @ (a @ x[row])
    for shaped in (x, x.unsqueeze(0)):
        output, returned = layer(shaped)
        torch.testing.assert_close(output.view_as(expected), expected, rtol=1e-4, atol=1e-4)
        assert (returned is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(returned, bias)


def test_embedding(kernels: GroupedLoRAWrapper) -> None:
    base = VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=torch.float32)
    torch.nn.init.normal_(base.weight)
    layer = VocabParallelEmbeddingWithLoRA(base)
    with_lora(layer, kernels)
    tokens = torch.tensor([3, 49, 0, 7, 7, 3, 21])
    expected = base(tokens).clone()
    for slot, rank in enumerate([3, 8, 5]):
        a, b = adapter(rank, VOCABULARY, HIDDEN, slot)
        layer.set_lora(slot, a, b)
        for row, row_slot in enumerate(ROW_SLOTS):
            if row_slot == slot:
                expected[row] += b @ a[:, tokens[row]]
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-4, atol=1e-4)


def test_logits(kernels: GroupedLoRAWrapper) -> None:
    head = ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.float32)
    torch.nn.init.normal_(head.weight)
    head.quant_method.process_weights_after_loading(head)
    layer = LogitsProcessorWithLoRA(
        LogitsProcessor(VOCABULARY), HIDDEN, torch.float32, torch.device("cpu"), None
    )
    with_lora(layer, kernels)
    x = torch.randn(len(ROW_SLOTS), HIDDEN)
    expected = LogitsProcessor(VOCABULARY)(head, x).clone()
    for slot, rank in enumerate([3, 8, 5]):
        a, b = adapter(rank, HIDDEN, VOCABULARY, slot)
        layer.set_lora(slot, a, b)
        for row, row_slot in enumerate(ROW_SLOTS):
            if row_slot == slot:
                expected[row] += b @ (a @ x[row])
    torch.testing.assert_close(layer(head, x), expected, rtol=1e-4, atol=1e-4)
