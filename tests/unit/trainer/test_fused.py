"""What stands in for norms, gates and rotations on a CPU computes what they do, there and back."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manylora_trainer.fused import fuse_small_operations

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
NORM, GATE, ROTATION = "_RmsNormBackward", "_SiluGateBackward", "_RotationBackward"


def model_of(family: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, **changes)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.5, 1.5)
    rotary = model.model.rotary_emb
    angles = rotary.forward

    def uneven(*arguments: Any, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles whose halves differ, as nobody promises that they are the same."""
        cos, sin = angles(*arguments, **others)
        return cos, sin * torch.linspace(0.5, 1.5, sin.shape[-1])

    rotary.forward = uneven
    return model.eval().requires_grad_(False)


def there_and_back(
    model: Any, embedded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    """Logits, what comes back to the embeddings, and the names of the nodes between them."""
    embedded = embedded.clone().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    seen: set[Any] = set()
    nodes = [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [entered for entered, _ in node.next_functions]
    logits.square().sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad, {type(node).__name__ for node in seen}


@pytest.mark.parametrize(
    ("family", "changes", "replaced"),
    [
        ("llama", {}, {NORM, GATE, ROTATION}),
        ("qwen3", {"head_dim": 16}, {NORM, GATE, ROTATION}),
        ("gemma", {"head_dim": 8}, {NORM, ROTATION}),
        ("gemma3_text", {"head_dim": 8}, {NORM, ROTATION}),
        ("phi3", {}, {NORM, ROTATION}),
        ("stablelm", {}, {GATE, ROTATION}),
        ("cohere", {}, {GATE}),
    ],
)
def test_a_family_computes_the_same_in_fewer_passes(
    family: str, changes: dict[str, Any], replaced: set[str]
) -> None:
    stock = model_of(family, changes)
    model = copy.deepcopy(stock)
    fuse_small_operations(model, torch.device("cpu"))
    embedded = torch.randn(2, 7, SHAPE["hidden_size"])
    logits, gradient, nodes = there_and_back(model, embedded)
    expected, wanted, stock_nodes = there_and_back(stock, embedded)
    assert nodes - stock_nodes == replaced
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_norms_that_are_trained_keep_their_gradient() -> None:
    stock = model_of("llama", {})
    model = copy.deepcopy(stock)
    fuse_small_operations(model, torch.device("cpu"))
    embedded = torch.randn(2, 7, SHAPE["hidden_size"])
    gradients: list[torch.Tensor] = []
    for each in (stock, model):
        each.model.norm.weight.requires_grad_(True)
        each(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(each.model.norm.weight.grad)
    torch.testing.assert_close(*gradients)
