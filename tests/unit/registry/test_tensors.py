import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from manylora_registry.tensors import find_too_large, read_header, read_tensor


@pytest.fixture
def write(tmp_path):
    """Writes a safetensors file by hand: a header, as JSON or as it is, and data bytes."""

    def written(header, data=b"", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(
            struct.pack("<Q", length if length is not None else len(text)) + text + data
        )
        return file

    return written


def entry(start=0, end=8, shape=(2,), dtype: object = "F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_safetensors_wrote(tmp_path):
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.ones((4,), np.float16)}
    file = tmp_path / "adapter_model.safetensors"
    save_file(arrays, file, metadata={"format": "pt"})

    tensors, problems = read_header(file)

    assert problems == []
    assert {t.name: (t.dtype, t.shape) for t in tensors} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }
    for tensor in tensors:
        assert file.read_bytes()[tensor.start : tensor.end] == arrays[tensor.name].tobytes()


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"", b"", "header length"),
        (b"\x80\x04K\x01.", b"", "header is wrong"),
        (b"[1]", b"", "no object"),
        (b"[" * 100_000, b"", "header is wrong"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "header is wrong"),
        (b'{"a":{},"a":{}}', b"", "twice"),
        ({"a": 3}, b"", "has no dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "has no dtype"),
        ({"a": entry(dtype="I64", end=16)}, bytes(16), "allowed are"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "allowed are"),
        ({"a": entry(shape=[])}, bytes(8), "no list of sizes"),
        ({"a": entry(shape=[-2])}, bytes(8), "no positive number"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "no positive number"),
        ({"a": entry(shape=[1 << 50])}, bytes(8), "no positive number"),
        ({"a": entry(shape=[3])}, bytes(8), "does not fit"),
        ({"a": entry(end=16, shape=[4])}, bytes(8), "behind the end"),
        ({"a": entry(start=-8, end=0)}, bytes(8), "no range"),
        ({"a": entry(start=8, end=0)}, bytes(8), "no range"),
        ({"a": entry(start=8, end=16)}, bytes(16), "gap"),
        ({"a": entry(), "b": entry(4, 12)}, bytes(12), "overlaps"),
        ({"a": entry()}, bytes(9), "1 bytes behind"),
    ],
)
def test_a_header_that_lies_is_refused(write, header, data, says):
    _, problems = read_header(write(header, data))

    assert problems
    assert says in str(problems[0])


@pytest.mark.parametrize("length", [0, 1, 1 << 62, (1 << 64) - 1, 9])
def test_a_header_length_beyond_the_file_or_the_limit_is_refused(write, length):
    _, problems = read_header(write(b"{}", b"", length))

    assert "header length" in str(problems[0])


def test_a_header_larger_than_the_limit_is_refused_unread(write):
    _, problems = read_header(write(b"{}" + b" " * (17 << 20)))

    assert "header length" in str(problems[0])


@pytest.mark.parametrize("value", [np.nan, -np.inf, -6.6e4])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_finds_what_is_not_finite_or_too_large_in_every_dtype(write, dtype, value):
    good = np.full(2_200_000, -65_504, np.float32)
    bad = good.copy()
    bad[-1] = value

    def stored(array):
        if dtype == "BF16":
            return (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        with np.errstate(over="ignore"):
            return array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()

    first, second = stored(good), stored(bad)
    size = len(first)
    header = {
        "good": entry(0, size, good.shape, dtype),
        "bad": entry(size, 2 * size, bad.shape, dtype),
    }
    file = write(header, first + second)
    tensors, problems = read_header(file)

    assert problems == []
    assert [problem.path for problem in find_too_large(file, tensors)] == ["bad"]


def test_reads_values_of_every_dtype(write):
    data = np.array([1, -2], "<f4").tobytes() + np.array([1, -2], "<f2").tobytes()
    bf16 = np.array([0x3F80, 0xC000], "<u2").tobytes()
    header = {
        "a": entry(0, 8, dtype="F32"),
        "b": entry(8, 12, dtype="F16"),
        "c": entry(12, 16, (2, 1), "BF16"),
    }
    file = write(header, data + bf16)
    tensors, _ = read_header(file)

    values = [read_tensor(file, tensor) for tensor in tensors]

    assert [value.ravel().tolist() for value in values] == [[1.0, -2.0]] * 3
    assert values[2].shape == (2, 1)
