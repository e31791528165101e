"""Sets our CPU kernels beside vLLM's own on this machine: are they right, and how fast.

    python -m manylora_gateway.cpu_lora [--slots 4] [--rank 16] [--dtype bfloat16] [--json]

One layer with an adapter in every slot, and batches in which the bare base and all adapters are
mixed: few rows of each, as in decoding, and many, as in prefill. A row is wrong that is further
from its own adapter's product, computed alone in float64, than rounding explains. Exit status 1
if ours are wrong.
"""

# Neither torch's members nor vLLM's are all typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the largest value: what the type's rounding explains."""
ROUNDS = 7


@dataclass(frozen=True)
class Layer:
    """A linear layer, its adapters, and one batch through it."""

    a: Tensor
    """[slots, 1, rank, in]"""
    b: Tensor
    """[slots, 1, out, rank]"""
    x: Tensor
    """[rows, in]"""
    row_slots: tuple[int, ...]
    """Slot of each row, -1 for none."""

    def expected(self) -> Tensor:
        """What each row gets of its own adapter, float64 [rows, out]."""
        y = torch.zeros(len(self.row_slots), self.b.shape[2], dtype=torch.float64)
        for row, slot in enumerate(self.row_slots):
            if slot >= 0:
                shrunk = self.a[slot, 0].double() @ self.x[row].double()
                y[row] = self.b[slot, 0].double() @ shrunk
        return y

    def apply(self, kernels: Any) -> Tensor:
        """What `kernels` give each row."""
        y = torch.zeros(len(self.row_slots), self.b.shape[2], dtype=self.x.dtype)
        kernels.add_lora_linear(y, self.x, (self.a,), (self.b,), 1.0, (self.b.shape[2],))
        return y


@dataclass(frozen=True)
class Result:
    """One kind of batch through one kind of kernels."""

    kernels: str
    batch: str
    rows: int
    wrong_rows: int
    microseconds: float
    """Median of a call, after the first."""


def compare(options: argparse.Namespace) -> list[Result]:
    """Both kernels with both batches."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from manylora_gateway.cpu_lora.wrapper import GroupedLoRAWrapper

    results: list[Result] = []
    slots = range(options.slots)
    for batch, rows_each in (("decode", 4), ("prefill", options.prefill)):
        row_slots = tuple(slot for slot in (-1, *slots) for _ in range(rows_each))
        layer = _layer(options, row_slots)
        expected = layer.expected()
        rows = len(row_slots)
        adapters = tuple(0 if slot < 0 else slot + 1 for slot in row_slots)
        mapping = LoRAMapping(adapters, adapters, is_prefill=batch == "prefill")
        for name, kind in (("ours", GroupedLoRAWrapper), ("stock", PunicaWrapperCPU)):
            kernels: Any = kind(rows, rows, device="cpu")
            # As many slots as adapters: vLLM's own take the last one for rows that have none.
            kernels.update_metadata(mapping, [slot + 1 for slot in slots], options.slots, 1)
            wrong = _wrong_rows(layer.apply(kernels), expected, TOLERANCE[options.dtype])
            results.append(Result(name, batch, rows, wrong, _microseconds(layer, kernels)))
    return results


def _layer(options: argparse.Namespace, row_slots: Sequence[int]) -> Layer:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width, out, rank = options.width, options.out, options.rank
    return Layer(
        a=random(options.slots, 1, rank, width) / width**0.5,
        b=random(options.slots, 1, out, rank),
        x=random(len(row_slots), width),
        row_slots=tuple(row_slots),
    )


def _wrong_rows(actual: Tensor, expected: Tensor, tolerance: float) -> int:
    error = (actual.double() - expected).abs().amax(dim=1)
    return int((error > tolerance * expected.abs().max()).sum())


def _microseconds(layer: Layer, kernels: Any) -> float:
    spent: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        layer.apply(kernels)
        spent.append(time.perf_counter() - began)
    return round(statistics.median(spent) * 1e6, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or JSON; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora_gateway.cpu_lora", description="Compare CPU LoRA kernels."
    )
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=576, help="inputs of the layer")
    parser.add_argument("--out", type=int, default=1536, help="outputs of the layer")
    parser.add_argument("--prefill", type=int, default=128, help="rows of each in prefill")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    results = compare(options)
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        print(f"{'kernels':<10}{'batch':<10}{'rows':>6}{'wrong':>8}{'µs a call':>12}")
        for result in results:
            print(
                f"{result.kernels:<10}{result.batch:<10}{result.rows:>6}{result.wrong_rows:>8}"
                f"{result.microseconds:>12.1f}"
            )
    return int(any(result.wrong_rows for result in results if result.kernels == "ours"))


if __name__ == "__main__":
    sys.exit(main())
