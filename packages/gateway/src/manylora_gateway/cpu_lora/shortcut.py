"""A short way through vLLM's LoRA layers, for the plain ones.

Between a layer's call and the kernels vLLM looks up some twenty attributes of nested modules, 9 µs
that a layer without LoRA does not spend: 1 ms in each step of a model of 30 layers, as much as the
kernels compute. What is looked up never changes once the layers are in place.
"""

# Neither torch's members nor vLLM's are all typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

PLAIN = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
"""Layers that, not split over processes, are a product and a bias and nothing else."""


def install(kernels: type[PunicaWrapperBase]) -> None:
    """Gives the short way to each plain layer that vLLM ties to such kernels from now on."""

    def set_mapping(layer: Any, punica_wrapper: PunicaWrapperBase) -> None:
        BaseLayerWithLoRA.set_mapping(layer, punica_wrapper)
        if (
            isinstance(punica_wrapper, kernels)
            and layer.tp_size == 1
            and type(layer.base_layer) in PLAIN
        ):
            layer.forward = _forward(layer, punica_wrapper)

    replaced: Any = BaseLinearLayerWithLoRA
    replaced.set_mapping = set_mapping


def _forward(layer: Any, kernels: PunicaWrapperBase) -> Callable[[Tensor], Any]:
    """What the layer's own `forward` does for two-dimensional inputs."""
    base, whole = layer.base_layer, type(layer).forward
    apply = base.quant_method.apply
    added, returned = (None, base.bias) if base.skip_bias_add else (base.bias, None)
    add, slices = kernels.add_lora_linear, layer.output_slices

    def forward(input_: Tensor) -> Any:
        if input_.ndim != 2:
            return whole(layer, input_)
        output = apply(base, input_, added)
        add(output, input_, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, slices)
        return (output, returned) if base.return_bias else output

    return forward
