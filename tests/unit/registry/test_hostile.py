"""Made-up headers, configs and directories: refused in a sentence, or what they say is true."""

import contextlib
import json
import os
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from manylora_registry import Registry
from manylora_registry.adapter_config import MAX_RANK, read_config
from manylora_registry.errors import InvalidAdapterError, Problem
from manylora_registry.tensors import read_header
from tests.unit.registry.conftest import BASE, plain_tensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
WEIGHTS = save(plain_tensors(0), {"format": "pt"})
HEADER = json.loads(WEIGHTS[8 : 8 + struct.unpack("<Q", WEIGHTS[:8])[0]])
DATA = WEIGHTS[8 + struct.unpack("<Q", WEIGHTS[:8])[0] :]
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "init_lora_weights": True,
}


def with_header(header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def changed_bytes(draw):
    """The bytes of a good file, some of them others, or cut, or longer."""
    content = bytearray(WEIGHTS)
    for _ in range(draw(st.integers(0, 6))):
        content[draw(st.integers(0, len(content) - len(DATA)))] = draw(st.integers(0, 255))
    cut = draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:cut]) + draw(st.just(b"") | st.binary(max_size=8))


@st.composite
def changed_headers(draw):
    """A good header with entries of anything, at offsets of anywhere."""
    header = {name: dict(entry) for name, entry in HEADER.items()}
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2)):
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        header[name][key] = draw(
            JSON
            | st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3"])
            | st.lists(st.integers(-8, 600), max_size=3)
        )
    for name in draw(st.lists(st.text(max_size=8) | st.just("__metadata__"), max_size=2)):
        header[name] = draw(JSON)
    return with_header(header)


@settings(max_examples=200, deadline=None)
@given(st.one_of(changed_bytes(), changed_headers(), st.binary(max_size=200)))
def test_a_file_that_is_accepted_is_one_to_the_reference_reader(content):
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "adapter_model.safetensors"
        file.write_bytes(content)

        tensors, problems = read_header(file)

        if not problems:
            with safe_open(file, "numpy") as reference:
                assert {tensor.name for tensor in tensors} == {*reference.keys()}
                for tensor in tensors:
                    found = reference.get_slice(tensor.name)
                    shape, dtype = found.get_shape(), found.get_dtype()
                    assert (tuple(shape), dtype) == (tensor.shape, tensor.dtype)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*CONFIG]) | st.text(max_size=20), JSON, max_size=4),
    st.text(max_size=30),
)
def test_a_config_that_is_accepted_says_what_every_module_is(changes, module):
    config, problems = read_config(json.dumps({**CONFIG, **changes}).encode())

    assert (config is None) == bool(problems)
    if config is not None:
        assert 1 <= config.rank_of(module) <= config.max_rank <= MAX_RANK
        assert 0 < config.scaling_of(module) < 1e6


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=100))
def test_bytes_that_are_no_config_are_refused(content):
    config, problems = read_config(content)

    assert config is None
    assert problems


NAMES = st.sampled_from(
    ["adapter_config.json", "adapter_model.safetensors", "README.md"]
) | st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda name: name not in (".", ".."))
KINDS = st.sampled_from(["good", "file", "directory", "link out", "link away", "pipe"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A registry for many examples."""
    with Registry.open(tmp_path_factory.mktemp("hostile") / "registry") as opened:
        yield opened


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, KINDS, max_size=5))
def test_a_tree_is_published_whole_or_refused_without_a_trace(store, tree):
    before = store.verify()
    good = {
        "adapter_config.json": json.dumps(CONFIG).encode(),
        "adapter_model.safetensors": WEIGHTS,
    }
    kinds = {**dict.fromkeys(good, "good"), **tree}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "adapter"
        directory.mkdir()
        (directory.parent / "secret").write_bytes(WEIGHTS)
        for name, kind in kinds.items():
            _make(directory / name, kind, good.get(name, b"# a card"))
        made = {path.name: kinds[path.name] for path in directory.iterdir()}

        said = None
        try:
            store.publish("spelling", directory, base=BASE)
        except InvalidAdapterError as error:
            said = str(error)

    allowed = {*good, "README.md"} >= {*made}
    after = store.verify()
    assert after.ok
    assert after.unreferenced == ()
    if said is None:
        assert allowed
        assert {*made.values()} <= {"good", "file"}
    else:
        assert said.encode().isascii() or said.isprintable()
        assert after == before
        assert not (allowed and {*made.values()} == {"good"})


def _make(path, kind, content):
    with contextlib.suppress(OSError):  # A name too long for the file system makes no file.
        match kind:
            case "good":
                path.write_bytes(content)
            case "file":
                path.write_bytes(content[:-1] + b"\n")
            case "directory":
                path.mkdir()
            case "link out":
                path.symlink_to(path.parent.parent / "secret")
            case "link away":
                path.symlink_to("/nonexistent")
            case "pipe":
                os.mkfifo(path)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
        b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(1_200_000)) + b"}}",
        b"{" + b",".join(b'"%d":{}' % n for n in range(1_000_000)) + b"}",
        b'{"a":' + b"[" * 8_000_000 + b"]" * 8_000_000 + b"}",
    ],
    ids=["lists", "metadata", "tensors", "depth"],
)
def test_a_header_that_would_unfold_to_much_is_refused_in_little(tmp_path, text):
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(with_header(text, b""))

    tracemalloc.start()
    began = time.thread_time()
    _, problems = read_header(file)
    worked = time.thread_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "holds too much" in str(problems[0])
    assert peak < 3 * len(text)
    assert worked < 5


def test_weights_larger_than_any_adapter_of_the_base_are_not_copied(registry, make_adapter):
    directory = make_adapter()
    with (directory / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 40)

    with pytest.raises(InvalidAdapterError, match="is larger than"):
        registry.publish("spelling", directory, base=BASE)


def test_an_adapter_of_a_very_wide_base_is_not_too_much(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    names = [
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{proj}_proj.lora_{side}.weight"
        for layer in range(80)
        for expert in range(128)
        for proj in ("gate", "up", "down")
        for side in "AB"
    ]
    header = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]}
        for at, name in enumerate(names)
    }
    file.write_bytes(with_header(header, bytes(4 * len(names))))

    tensors, problems = read_header(file)

    assert (len(tensors), problems) == (61_440, [])


def test_a_problem_is_one_printable_line():
    shown = str(Problem("a\nb\x1b[31m\ud800" + "x" * 1_000_000, "is no tensor"))

    assert shown.startswith("a?b?[31m?xxx")
    assert shown.encode().count(b"x") < 300
