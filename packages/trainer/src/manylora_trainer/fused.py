"""The small operations between a base's linear layers, fused on a GPU.

Norms, gates and rotations read and write whole activations a dozen times to do little: on a GPU
as much time as a third of the products takes. `torch.compile` makes one pass of each. Only they
are compiled, functions of tensors alone, so that nothing is compiled again for another pack.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

GATED = {"down_proj", "act_fn", "gate_proj", "up_proj"}
ROTATION = "apply_rotary_pos_emb"


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """The same function as one pass; compiled when it is first called.

    The second length makes lengths variable. Asking for that at once would make widths variable
    too, and kernels that do not know them are slow. TORCH_COMPILE_DISABLE=1 in the environment
    leaves the function as it is.
    """
    return _compiled(function)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def fuse_small_operations(model: nn.Module) -> None:
    """Replaces what is known of a transformers model's modules; others stay as they are.

    Only instances are changed: other models of the process are not touched.
    """
    for module in model.modules():
        forward: Any = type(module).forward
        names: set[str] = set(getattr(getattr(forward, "__code__", None), "co_names", ()))
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(fused(forward), module)
        elif names == GATED:
            module.forward = functools.partial(_gated, module)
        elif ROTATION in names:
            module.forward = functools.partial(_rotating(forward), module)


def _gated(module: Any, inputs: Tensor) -> Tensor:
    """A gated MLP, both halves of which are there before the gate."""
    gate, up = module.gate_proj(inputs), module.up_proj(inputs)
    return module.down_proj(fused(_gate)(module.act_fn, gate, up))


def _gate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


@functools.cache
def _rotating(forward: Any) -> Any:
    """An attention's forward that finds the fused rotation where its module has the plain one."""
    found = {**forward.__globals__, ROTATION: fused(_token_major(forward.__globals__[ROTATION]))}
    rewired = types.FunctionType(
        forward.__code__, found, forward.__name__, forward.__defaults__, forward.__closure__
    )
    rewired.__kwdefaults__ = forward.__kwdefaults__
    return rewired


@functools.cache
def _token_major(rotate: Any) -> Any:
    """A rotation that leaves tokens outside of heads in memory, as all around it want them.

    Otherwise each of queries, keys and their gradients would be copied into that order.
    """
    if "unsqueeze_dim" not in inspect.signature(rotate).parameters:
        return rotate

    def rotated(query: Tensor, key: Tensor, *angles: Tensor, **others: Any) -> Any:
        if others or len(angles) != 2:
            return rotate(query, key, *angles, **others)
        turned = rotate(query.transpose(1, 2), key.transpose(1, 2), *angles, unsqueeze_dim=2)
        return tuple(states.transpose(1, 2) for states in turned)

    return rotated
