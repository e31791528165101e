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
from manylora_gateway.cpu_lora.tiles import COLUMNS, ROWS, expand, shrink


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


# What the kernel is called with, as int64.
(
    ROWS_FEW,
    SLICES,
    SLOTS,
    COLUMNS_ALL,
    BLOCKS,
    WIDTH_IN,
    WIDTH_OUT,
    Y,
    X,
    A,
    B,
    SHRUNK,
    ROW,
    ROW_STARTS,
    STARTS,
    BLOCK_OF,
    ARGUMENTS,
) = range(17)


def _pointer_to(element: Any) -> Any:
    """A function of compiled code that takes an address as a pointer."""
    pointer = types.CPointer(element)

    def convert(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    def declare(_typing_context, _address):
        return pointer(types.int64), convert

    return intrinsic(declare)


_integers = _pointer_to(types.int64)


@cfunc(types.void(types.CPointer(types.int64)))
def _work(call):
    c = carray(call, (ARGUMENTS,))
    few, columns, blocks = c[ROWS_FEW], c[COLUMNS_ALL], c[BLOCKS]
    width_in, width_out = c[WIDTH_IN], c[WIDTH_OUT]
    row_starts = carray(_integers(c[ROW_STARTS]), (c[SLOTS] + 1,))
    starts = carray(_integers(c[STARTS]), (c[SLOTS] + 1,))
    block_of = carray(_integers(c[BLOCK_OF]), (blocks, 3))
    thread, threads = np.int64(_thread()), np.int64(_threads())

    for index in range(c[SLICES]):
        for slot in range(c[SLOTS]):
            if row_starts[slot] == row_starts[slot + 1]:
                continue
            rank = starts[slot + 1] - starts[slot]
            column = starts[slot] + rank * thread // threads
            last = starts[slot] + rank * (thread + 1) // threads
            while column < last:
                wide = COLUMNS if column + COLUMNS <= last else 1
                weights = c[A] + 4 * (index * columns + column) * width_in
                item = row_starts[slot]
                while item < row_starts[slot + 1]:
                    rows = min(ROWS, row_starts[slot + 1] - item)
                    shrunk = c[SHRUNK] + 4 * ((index * few + item) * columns + column)
                    row = c[ROW] + 8 * item
                    shrink((rows, wide, weights, width_in, c[X], row, shrunk, columns))
                    item += rows
                column += wide

    _barrier()

    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        index, low, width = block_of[block, 0], block_of[block, 1], block_of[block, 2]
        y = c[Y] + 4 * low
        for slot in range(c[SLOTS]):
            rank = starts[slot + 1] - starts[slot]
            weights = c[B] + 4 * (block * columns + starts[slot]) * OUTPUTS
            item = row_starts[slot]
            while item < row_starts[slot + 1]:
                rows = min(ROWS, row_starts[slot + 1] - item)
                shrunk = c[SHRUNK] + 4 * ((index * few + item) * columns + starts[slot])
                row = c[ROW] + 8 * item
                expand((rows, weights, rank, shrunk, columns, y, width_out, row, width))
                item += rows


_work_address: Any = _work.address


class FewRows:
    """The kernel with one layer's weights."""

    def __init__(self, layer: PackedLayer) -> None:
        slices, columns, width_in = layer.a.shape
        self.layer = layer
        self._batch: Batch | None = None
        self._shrunk = torch.empty(0)
        self._call = call = (ctypes.c_int64 * ARGUMENTS)()
        self._address = ctypes.addressof(call)
        call[SLICES], call[SLOTS], call[COLUMNS_ALL] = slices, len(layer.ranks), columns
        call[BLOCKS], call[WIDTH_IN] = layer.blocks.shape[0], width_in
        call[A], call[B] = layer.a.data_ptr(), layer.b.data_ptr()
        call[STARTS], call[BLOCK_OF] = layer.starts.data_ptr(), layer.blocks.data_ptr()

    def add(self, y: Tensor, x: Tensor, batch: Batch) -> None:
        """Adds the LoRA product of the batch's `few` rows to y, each with its own slot's weights.

        Args:
            y: float32 [rows, out or more], contiguous.
            x: float32 [rows, in], contiguous.
            batch: of as many slots as the layer, and no more rows than y and x have.
        """
        call = self._call
        if batch is not self._batch:
            self._batch = batch  # kept, so that its tensors stay where they are
            call[ROWS_FEW] = few = batch.few.shape[0]
            call[ROW], call[ROW_STARTS] = batch.few.data_ptr(), batch.few_starts.data_ptr()
            self._shrunk = torch.empty(call[SLICES] * few * call[COLUMNS_ALL])
            call[SHRUNK] = self._shrunk.data_ptr()
        call[Y], call[X], call[WIDTH_OUT] = y.data_ptr(), x.data_ptr(), y.shape[1]
        _parallel(_work_address, self._address, torch.get_num_threads(), 0)
