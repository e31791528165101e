"""The LoRA product of few rows of each slot, where one pass over the weights is all the cost.

Compiled by Numba, which vLLM's CPU build brings along, and run by the threads of the OpenMP runtime
that torch itself runs on: a second pool (Numba's own) would have to fight the first for the cores,
as OpenMP's threads keep spinning for a while after each of torch's operations. GOMP_parallel and
GOMP_barrier are what compilers call for OpenMP's pragmas; GNU's, LLVM's and Intel's runtimes all
have them.
"""

# Neither Numba nor what it compiles is typed.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownLambdaType=false

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from numba.extending import intrinsic
from torch import Tensor

from manylora_gateway.cpu_lora.batch import Batch
from manylora_gateway.cpu_lora.packing import OUTPUTS, PackedLayer


def _openmp(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ctypes.PyDLL(None), name)
    function.restype, function.argtypes = result, arguments
    return function


_thread = _openmp("omp_get_thread_num", ctypes.c_int)
_threads = _openmp("omp_get_num_threads", ctypes.c_int)
_barrier = _openmp("GOMP_barrier", None)
_parallel = _openmp(
    "GOMP_parallel", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
)


def _pointer_to(element: Any) -> Any:
    """A function of compiled code that takes an address as a pointer."""
    pointer = types.CPointer(element)

    def convert(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    def declare(_typing_context, _address):
        return pointer(types.int64), convert

    return intrinsic(declare)


_floats = _pointer_to(types.float32)
_integers = _pointer_to(types.int64)


# Sums may be reordered, which makes vectors of them; NaN and infinity stay what they are.
@cfunc(types.void(types.CPointer(types.int64)), fastmath={"reassoc", "contract"})
def _work(call):
    c = carray(call, (17,))
    rows, width_in, width_out, few = c[0], c[1], c[2], c[3]
    slices, slots, columns, blocks = c[4], c[5], c[6], c[7]
    y = carray(_floats(c[8]), (rows, width_out))
    x = carray(_floats(c[9]), (rows, width_in))
    a = carray(_floats(c[10]), (slices, columns, width_in))
    b = carray(_floats(c[11]), (blocks, columns, OUTPUTS))
    shrunk = carray(_floats(c[12]), (slices, few, columns))
    row = carray(_integers(c[13]), (few,))
    row_starts = carray(_integers(c[14]), (slots + 1,))
    starts = carray(_integers(c[15]), (slots + 1,))
    block_of = carray(_integers(c[16]), (blocks, 3))
    thread, threads = np.int64(_thread()), np.int64(_threads())

    for index in range(slices):
        for slot in range(slots):
            if row_starts[slot] == row_starts[slot + 1]:
                continue
            rank = starts[slot + 1] - starts[slot]
            first = starts[slot] + rank * thread // threads
            last = starts[slot] + rank * (thread + 1) // threads
            for column in range(first, last):
                weights = a[index, column]
                for item in range(row_starts[slot], row_starts[slot + 1]):
                    values = x[row[item]]
                    total = np.float32(0.0)
                    for k in range(width_in):
                        total += values[k] * weights[k]
                    shrunk[index, item, column] = total

    _barrier()

    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        index, low, width = block_of[block, 0], block_of[block, 1], block_of[block, 2]
        for slot in range(slots):
            column = starts[slot]
            while column + 4 <= starts[slot + 1]:
                b0, b1 = b[block, column], b[block, column + 1]
                b2, b3 = b[block, column + 2], b[block, column + 3]
                for item in range(row_starts[slot], row_starts[slot + 1]):
                    out = y[row[item], low : low + width]
                    h = shrunk[index, item]
                    h0, h1, h2, h3 = h[column], h[column + 1], h[column + 2], h[column + 3]
                    for o in range(width):
                        out[o] += h0 * b0[o] + h1 * b1[o] + h2 * b2[o] + h3 * b3[o]
                column += 4
            while column < starts[slot + 1]:
                b0 = b[block, column]
                for item in range(row_starts[slot], row_starts[slot + 1]):
                    out = y[row[item], low : low + width]
                    h0 = shrunk[index, item, column]
                    for o in range(width):
                        out[o] += h0 * b0[o]
                column += 1


_work_address: Any = _work.address


def add_few(y: Tensor, x: Tensor, layer: PackedLayer, batch: Batch) -> None:
    """Adds the LoRA product of the batch's `few` rows to y, each with its own slot's weights alone.

    Args:
        y: float32 [rows, out or more], contiguous.
        x: float32 [rows, in], contiguous.
        layer: the weights, for as many slots as the batch knows.
        batch: of no more rows than y and x have.
    """
    slices, columns, width_in = layer.a.shape
    blocks, few = layer.blocks.shape[0], batch.few.shape[0]
    shrunk = torch.empty(slices, few, columns)
    call = (ctypes.c_int64 * 17)(
        *(y.shape[0], width_in, y.shape[1], few),
        *(slices, len(layer.ranks), columns, blocks),
        *(tensor.data_ptr() for tensor in (y, x, layer.a, layer.b, shrunk)),
        *(tensor.data_ptr() for tensor in (batch.few, batch.few_starts)),
        *(tensor.data_ptr() for tensor in (layer.starts, layer.blocks)),
    )
    _parallel(_work_address, ctypes.addressof(call), torch.get_num_threads(), 0)
