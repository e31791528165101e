"""The two inner loops of the kernel, as vector instructions that Numba puts into its code.

A tile is a few rows times a few columns of weights, its sums kept in registers: each vector of
weights is loaded once for all its rows. Written in LLVM's terms, because only so are the registers
filled (left to itself LLVM uses half of an AVX-512 register) and the order of each sum fixed: the
same for a row, to the bit, whatever rows share its tile.
"""

# Neither Numba nor llvmlite is typed.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportMissingParameterType=false

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import product
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from manylora_gateway.cpu_lora.packing import LARGEST, OUTPUTS

ROWS = 4
"""Most rows of a tile."""

_WIDE = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if _WIDE else 8
"""float32 values in a register."""

_VECTORS = 6 if _WIDE else 2
"""Registers of outputs that an expanding tile sums at once for each row: all of a block, or as many
as 16 registers have room for beside their operands."""

COLUMNS = 2
"""Columns of a shrinking tile: with `ROWS` as many sums as hide the latency of an addition."""

FLOAT_BYTES = 4

PREFETCH_BYTES = 4096
"""How far ahead weights are asked for: 20 % of the kernel's time on cold weights."""

_int = ir.IntType(64)
_float = ir.FloatType()
_vector = ir.VectorType(_float, LANES)
_ZEROS = ir.Constant(_vector, [0.0] * LANES)


class _Code:
    """Writes one tile's instructions."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def at(self, address: Any, offset: Any) -> Any:
        """The address of the float `offset` floats on."""
        return self.builder.add(address, self.builder.mul(offset, _whole(FLOAT_BYTES)))

    def pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, kind: Any = _vector) -> Any:
        return self.builder.load(self.pointer(address, kind), align=FLOAT_BYTES)

    def store(self, address: Any, value: Any) -> None:
        self.builder.store(value, self.pointer(address, value.type), align=FLOAT_BYTES)

    def first(self, count: Any) -> Any:
        """The mask of the first `count` lanes."""
        lanes = ir.VectorType(_int, LANES)
        return self.builder.icmp_signed(
            "<", ir.Constant(lanes, list(range(LANES))), self._splat(count, lanes)
        )

    def load_some(self, address: Any, mask: Any) -> Any:
        """The lanes of the mask, zero elsewhere."""
        pointer = self.pointer(address, _vector)
        return self._call(
            f"llvm.masked.load.v{LANES}f32.p0",
            _vector,
            [pointer, ir.Constant(ir.IntType(32), FLOAT_BYTES), mask, _ZEROS],
        )

    def prefetch(self, address: Any) -> None:
        """Asks for what lies some way on.

        The processor's own prefetching stops at each page, and begins anew with each call.
        """
        byte, flag = ir.IntType(8), ir.IntType(32)
        pointer = self.pointer(self.builder.add(address, _whole(PREFETCH_BYTES)), byte)
        arguments = [pointer, *(ir.Constant(flag, value) for value in (0, 3, 1))]
        self._call("llvm.prefetch.p0", ir.VoidType(), arguments)

    def store_some(self, address: Any, value: Any, mask: Any) -> None:
        pointer = self.pointer(address, _vector)
        self._call(
            f"llvm.masked.store.v{LANES}f32.p0",
            ir.VoidType(),
            [value, pointer, ir.Constant(ir.IntType(32), FLOAT_BYTES), mask],
        )

    def fused(self, left: Any, right: Any, total: Any) -> None:
        """Adds the product of two vectors to the variable `total`."""
        value = self._call(
            f"llvm.fma.v{LANES}f32", _vector, [left, right, self.builder.load(total)]
        )
        self.builder.store(value, total)

    def bounded(self, vector: Any) -> Any:
        """The vector with each value in -`LARGEST` to `LARGEST`, a NaN too."""
        for name, bound in (("minnum", LARGEST), ("maxnum", -LARGEST)):
            limit = ir.Constant(_vector, [bound] * LANES)
            vector = self._call(f"llvm.{name}.v{LANES}f32", _vector, [vector, limit])
        return vector

    def total(self, variable: Any) -> Any:
        """The sum of a vector's lanes, pair by pair."""
        return self._call(
            f"llvm.vector.reduce.fadd.v{LANES}f32",
            _float,
            [ir.Constant(_float, 0.0), self.builder.load(variable)],
            fastmath=("reassoc",),
        )

    def spread(self, address: Any) -> Any:
        """A vector of the one float there."""
        return self._splat(self.load(address, _float), _vector)

    def sums(self, count: int) -> list[Any]:
        """Variables for vectors, which LLVM keeps in registers."""
        variables = [cgutils.alloca_once(self.builder, _vector) for _ in range(count)]
        for variable in variables:
            self.builder.store(_ZEROS, variable)
        return variables

    def index(self, indices: Any, item: int) -> Any:
        """The int64 at a place among others."""
        return self.load(self.builder.add(indices, _whole(item * 8)), _int)

    @contextmanager
    def where(self, *equal: tuple[Any, int]) -> Generator[None, None, None]:
        """What is written within runs if each value is the number beside it."""
        condition = ir.Constant(ir.IntType(1), 1)
        for value, number in equal:
            one = self.builder.icmp_signed("==", value, _whole(number))
            condition = self.builder.and_(condition, one)
        with self.builder.if_then(condition):
            yield

    @contextmanager
    def loop(self, stop: Any, step: int = 1) -> Generator[Any, None, None]:
        with cgutils.for_range_slice(self.builder, _whole(0), stop, _whole(step)) as (index, _):
            yield index

    def _splat(self, scalar: Any, kind: Any) -> Any:
        single = self.builder.insert_element(
            ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), zeros)

    def _call(self, name: str, result: Any, arguments: list[Any], fastmath: Any = ()) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments, fastmath=fastmath)


def _tile(arguments: int, write: Callable[..., None]) -> Any:
    """A function of compiled code of a tuple of so many int64, addresses among them."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        write(_Code(builder), *(builder.extract_value(values[0], i) for i in range(arguments)))
        return context.get_dummy_value()

    def declare(_typing_context, values):
        return types.void(values), codegen

    return intrinsic(declare)


def _shrink(code: _Code, rows, columns, *place: Any) -> None:
    for count, width in product(range(1, ROWS + 1), (1, COLUMNS)):
        with code.where((rows, count), (columns, width)):
            _shrink_tile(code, count, width, *place)


def _shrink_tile(
    code: _Code, rows: int, columns: int, weights, width, x, indices, shrunk, stride
) -> None:
    builder = code.builder
    inputs = [code.at(x, builder.mul(code.index(indices, i), width)) for i in range(rows)]
    factors = [code.at(weights, builder.mul(width, _whole(j))) for j in range(columns)]
    sums = code.sums(rows * columns)

    def add(load: Callable[[Any], Any], k: Any) -> None:
        right = [load(code.at(address, k)) for address in factors]
        for i, address in enumerate(inputs):
            left = load(code.at(address, k))
            for j in range(columns):
                code.fused(left, right[j], sums[i * columns + j])

    vectors = builder.and_(width, _whole(-LANES))
    with code.loop(vectors, LANES) as k:
        for address in factors:
            code.prefetch(code.at(address, k))
        add(code.load, k)
    with builder.if_then(builder.icmp_signed("<", vectors, width)):
        mask = code.first(builder.sub(width, vectors))
        add(lambda address: code.load_some(address, mask), vectors)
    for i, j in product(range(rows), range(columns)):
        offset = builder.add(builder.mul(stride, _whole(i)), _whole(j))
        code.store(code.at(shrunk, offset), code.total(sums[i * columns + j]))


def _expand(code: _Code, rows, *place: Any) -> None:
    for count in range(1, ROWS + 1):
        with code.where((rows, count)):
            _expand_tile(code, count, *place)


def _expand_tile(
    code: _Code, rows: int, weights, columns, shrunk, stride, y, y_stride, indices, width
) -> None:
    builder = code.builder
    inputs = [code.at(shrunk, builder.mul(stride, _whole(i))) for i in range(rows)]
    outputs = [code.at(y, builder.mul(code.index(indices, i), y_stride)) for i in range(rows)]
    for part in range(0, OUTPUTS, _VECTORS * LANES):
        offsets = [_whole(part + v * LANES) for v in range(_VECTORS)]
        with builder.if_then(builder.icmp_signed("<", offsets[0], width)):
            sums = code.sums(rows * _VECTORS)
            with code.loop(columns) as column:
                start = builder.mul(column, _whole(OUTPUTS))
                places = [code.at(weights, builder.add(start, offset)) for offset in offsets]
                for place in places:
                    code.prefetch(place)
                right = [code.load(place) for place in places]
                for i, address in enumerate(inputs):
                    left = code.spread(code.at(address, column))
                    for v in range(_VECTORS):
                        code.fused(left, right[v], sums[i * _VECTORS + v])
            for i, v in product(range(rows), range(_VECTORS)):
                left = builder.sub(width, offsets[v])
                _add_to(code, code.at(outputs[i], offsets[v]), sums[i * _VECTORS + v], left)


def _add_to(code: _Code, address: Any, total: Any, left: Any) -> None:
    """Adds a vector to the floats there, of which `left` are outputs."""
    builder = code.builder
    with builder.if_else(builder.icmp_signed(">=", left, _whole(LANES))) as (then, otherwise):
        with then:
            value = builder.fadd(code.load(address), builder.load(total))
            code.store(address, code.bounded(value))
        with otherwise:
            mask = code.first(left)
            value = builder.fadd(code.load_some(address, mask), builder.load(total))
            code.store_some(address, code.bounded(value), mask)


def _whole(value: int) -> Any:
    return ir.Constant(_int, value)


shrink = _tile(8, _shrink)
"""Writes the products of a tile of rows of x with columns of A.

Of (rows, columns, weights, width, x, indices, shrunk, stride): up to `ROWS`, and 1 or `COLUMNS`;
the first column's address, the floats of a column and of a row of x; the addresses of x, of the
rows' indices in it, and of where the products go, a row each `stride` floats.
"""

expand = _tile(9, _expand)
"""Adds the products of a tile of rows with a block of B to y, and keeps the sums bounded.

Of (rows, weights, columns, shrunk, stride, y, y_stride, indices, width): up to `ROWS`; the first
column's address and how many there are; the rows' factors, a row each `stride` floats; y's address
at the block's first output and the floats of its rows; the address of the rows' indices in it, and
how many outputs the block has.
"""
