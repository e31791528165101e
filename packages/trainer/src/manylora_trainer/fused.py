"""The small operations between a base's linear layers, in as few passes over memory as may be.

Norms, gates and rotations read and write whole activations a dozen times to do little: a fifth of
a step on a CPU, a third of what the products take on a GPU. There `torch.compile` makes one pass of
each; only they are compiled, functions of tensors alone, so that nothing is compiled again for
another pack. On a CPU, where nobody promises a compiler, the usual forms have gradients written by
hand.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUntypedBaseClass=false

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

GATED = {"down_proj", "act_fn", "gate_proj", "up_proj"}
ROTATION = "apply_rotary_pos_emb"
ALIKE = 1e-5
"""How far what a module computes may be from what is put in its place, for values around one."""


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


def fuse_small_operations(model: nn.Module, device: torch.device) -> None:
    """Replaces what is known of a transformers model's modules; others stay as they are.

    Only instances are changed: other models of the process are not touched.
    """
    on_gpu = device.type == "cuda"
    for module in model.modules():
        forward: Any = type(module).forward
        names: set[str] = set(getattr(getattr(forward, "__code__", None), "co_names", ()))
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = (
                functools.partial(fused(forward), module) if on_gpu else _norm_of(module)
            )
        elif names == GATED:
            gate = fused(_gate) if on_gpu else _gate_of(module)
            module.forward = functools.partial(_gated, module, gate)
        elif ROTATION in names:
            rotate = forward.__globals__[ROTATION]
            rotate = fused(_token_major(rotate)) if on_gpu else _rotation_of(rotate)
            module.forward = functools.partial(_with_rotation(forward, rotate), module)


def _gated(module: Any, activated: Any, inputs: Tensor) -> Tensor:
    """A gated MLP, both halves of which are there before the gate."""
    gate, up = module.gate_proj(inputs), module.up_proj(inputs)
    return module.down_proj(activated(module.act_fn, gate, up))


def _gate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


@functools.cache
def _with_rotation(forward: Any, rotate: Any) -> Any:
    """An attention's forward that finds `rotate` where its module has the plain rotation."""
    rewired = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTATION: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
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


def _norm_of(module: Any) -> Any:
    """The forward of a norm; in fewer passes where it does as all do."""
    stock = module.forward
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1 or epsilon is None:
        return stock
    probe = torch.linspace(-2, 3, 3 * len(weight)).view(3, -1)
    with torch.no_grad():
        expected = stock(probe)
        for offset in (0.0, 1.0):
            found = cast("Tensor", _RmsNorm.apply(probe, weight + offset, epsilon))
            if torch.allclose(found, expected, rtol=ALIKE, atol=ALIKE):
                return functools.partial(_norm, module, stock, offset, epsilon)
    return stock


def _norm(module: Any, stock: Any, offset: float, epsilon: float, inputs: Tensor) -> Tensor:
    weight: Tensor = module.weight
    if weight.requires_grad:  # Full fine-tuning trains it.
        return stock(inputs)
    return cast("Tensor", _RmsNorm.apply(inputs, weight + offset if offset else weight, epsilon))


class _RmsNorm(torch.autograd.Function):
    """RMSNorm (https://arxiv.org/abs/1910.07467) of the last dimension, by a frozen scale."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        norms = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        inverse = norms.square_().div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(inputs, scale, inverse)
        return (inputs * inverse).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inputs, scale, inverse = ctx.saved_tensors
        scaled = gradients[0] * scale
        along = (scaled * inputs).sum(-1, keepdim=True)
        along.mul_(inverse.square()).div_(-inputs.shape[-1])
        return scaled.addcmul_(inputs, along).mul_(inverse), None, None


def _gate_of(module: Any) -> Any:
    """SiLU's gate in fewer passes; others as they are."""
    probe = torch.linspace(-4, 4, 64)
    with torch.no_grad():
        alike = torch.allclose(module.act_fn(probe), F.silu(probe), rtol=ALIKE, atol=ALIKE)
    return _silu_gate if alike else _gate


def _silu_gate(_activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    return cast("Tensor", _SiluGate.apply(gate, up))


class _SiluGate(torch.autograd.Function):
    """`silu(gate) * up` (https://arxiv.org/abs/2002.05202) that keeps nothing but these two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        through = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return through, F.silu(gate).mul_(gradients[0])


@functools.cache
def _rotation_of(rotate: Any) -> Any:
    """A rotation in fewer passes, if it turns the first half of a head against the second."""
    query, key = (
        torch.linspace(-2, 3, 48).view(1, 2, 3, 8),
        torch.linspace(3, -2, 24).view(1, 1, 3, 8),
    )
    cos, sin = torch.linspace(0, 1, 24).view(1, 3, 8), torch.linspace(1, -1, 24).view(1, 3, 8)
    try:
        expected = rotate(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return rotate  # It takes something else.
    found = _rotated(rotate, query, key, cos, sin)
    alike = (
        torch.allclose(one, other, rtol=ALIKE, atol=ALIKE)
        for one, other in zip(found, expected, strict=True)
    )
    return functools.partial(_rotated, rotate) if all(alike) else rotate


def _rotated(
    stock: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    if cos.shape[-1] != query.shape[-1]:  # Only a part of each head turns.
        return stock(query, key, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)
    return cast("tuple[Tensor, Tensor]", turned)


class _Rotation(torch.autograd.Function):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), halves against each other."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(states, cos, sin, -1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # sin may differ between the halves: it goes along with what it was multiplied with.
        return _turn(gradients[0], cos, sin.roll(sin.shape[-1] // 2, -1), 1.0), None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """[..., 2 h]: the first half gets `sign` times the second, the second as much less of it."""
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=sign)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:], value=-sign)
    return turned
