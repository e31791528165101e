"""Promise 2 at its root: each row gets its own adapter's product and nothing of its neighbours'."""

from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manylora_gateway.cpu_lora.packing import LARGEST

from .reference import announce, expected, kernels_for, stacked

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Scene:
    """A layer with adapters and a batch through it."""

    dtype: torch.dtype
    max_rank: int
    ranks: tuple[tuple[int, ...], ...]
    """[slice][slot]"""
    widths: tuple[int, ...]
    width_in: int
    row_slots: tuple[int, ...]
    seed: int

    @property
    def slots(self) -> int:
        return len(self.ranks[0])

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        return [
            stacked(ranks, self.max_rank, self.width_in, width, self.dtype, self.seed + index)
            for index, (ranks, width) in enumerate(zip(self.ranks, self.widths, strict=True))
        ]

    def rows(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.row_slots), self.width_in)
        x = torch.randn(shape, generator=generator).to(self.dtype)
        y = torch.randn((shape[0], sum(self.widths)), generator=generator).to(self.dtype)
        return y, x


@st.composite
def scenes(draw: st.DrawFn, max_slices: int = 3) -> Scene:
    slots = draw(st.integers(1, 5))
    max_rank = draw(st.sampled_from([1, 8, 16]))
    slices = draw(st.integers(1, max_slices))
    rank = st.integers(0, max_rank)
    slot = st.integers(-1, slots - 1)
    runs = draw(
        st.lists(st.tuples(slot, st.sampled_from([1, 2, 7, 31, 32, 50])), min_size=1, max_size=8)
    )
    return Scene(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        max_rank=max_rank,
        ranks=tuple(tuple(draw(rank) for _ in range(slots)) for _ in range(slices)),
        widths=tuple(draw(st.sampled_from([1, 6, 33, 100])) for _ in range(slices)),
        width_in=draw(st.sampled_from([1, 16, 40])),
        row_slots=tuple(chain.from_iterable([slot] * length for slot, length in runs)),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_close(actual: Tensor, reference: Tensor) -> None:
    scale = reference.abs().max().clamp_min(1.0)
    error = ((actual.double() - reference).abs().max() / scale).item()
    assert error < TOLERANCE[actual.dtype]


@settings(max_examples=150, deadline=None)
@given(scenes(), st.sampled_from([1.0, 0.5]))
def test_linear_is_each_rows_own_adapter(scene: Scene, scale: float) -> None:
    weights = scene.weights()
    y, x = scene.rows()
    reference = expected(y, x, scene.row_slots, weights, scale)
    bare = [row for row, slot in enumerate(scene.row_slots) if slot < 0]
    before = y.clone()
    a, b = zip(*weights, strict=True)
    kernels_for(scene.row_slots, scene.slots).add_lora_linear(y, x, a, b, scale, scene.widths)
    assert_close(y, reference)
    assert torch.equal(y[bare], before[bare])


@settings(max_examples=50, deadline=None)
@given(scenes(max_slices=1), st.sampled_from([0, 5]))
def test_logits_are_each_positions_own_adapter(scene: Scene, padding: int) -> None:
    (a, b), *_ = scene.weights()
    y, x = scene.rows()
    y = torch.cat([y, torch.zeros(y.shape[0], padding, dtype=y.dtype)], dim=1)
    reference = expected(y, x, scene.row_slots, [(a, b)])
    kernels_for(scene.row_slots, scene.slots).add_lora_logits(y, x, a, b, 1.0)
    assert_close(y, reference)


def test_float32_logits_over_bfloat16_weights() -> None:
    a, b = stacked([4, 4], 4, 16, 12, torch.bfloat16, seed=0)
    x = torch.randn(3, 16).bfloat16()
    y = torch.zeros(3, 12)
    reference = expected(y, x, [0, -1, 1], [(a, b)])
    kernels_for([0, -1, 1], 2).add_lora_logits(y, x, a, b, 1.0)
    assert (y - reference).abs().max() < 3e-2 * reference.abs().max()


@settings(max_examples=50, deadline=None)
@given(scenes(max_slices=1), st.booleans())
def test_embedding_is_each_rows_own_adapter(scene: Scene, add_inputs: bool) -> None:
    (_, b), *_ = scene.weights()
    generator = torch.Generator().manual_seed(scene.seed)
    x = torch.randn(len(scene.row_slots), scene.max_rank, generator=generator).to(scene.dtype)
    y, _ = scene.rows()
    reference = y.double().clone()
    for row, slot in enumerate(scene.row_slots):
        if slot >= 0:
            delta = b[slot, 0].double() @ x[row].double()
            reference[row] = reference[row] + delta if add_inputs else delta
    kernels = kernels_for(scene.row_slots, scene.slots)
    kernels.add_lora_embedding(y, x, b, add_inputs=add_inputs)
    assert_close(y, reference)


@settings(max_examples=50, deadline=None)
@given(scenes())
def test_shrink_then_expand_is_the_whole(scene: Scene) -> None:
    weights = scene.weights()
    a, b = zip(*weights, strict=True)
    y, x = scene.rows()
    reference = expected(y, x, scene.row_slots, weights, 0.5)
    kernels = kernels_for(scene.row_slots, scene.slots)
    shrunk = torch.zeros(len(weights), len(scene.row_slots), scene.max_rank)
    kernels.add_shrink(shrunk, x, a, 0.5)
    kernels.add_expand(y, shrunk, b, scene.widths)
    assert_close(y, reference)


def test_whole_classifier_only_where_a_slot_has_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 1, 5, 8, generator=generator)
    bias = torch.randn(2, 5, generator=generator)
    x, y = torch.randn(4, 8, generator=generator), torch.randn(4, 5, generator=generator)
    before = y.clone()
    kernels = kernels_for([1, 0, -1, 1], 2)
    kernels.apply_lora_full_linear(y, x, weight, bias, torch.tensor([False, True]))
    torch.testing.assert_close(y[[0, 3]], x[[0, 3]] @ weight[1, 0].t() + bias[1])
    assert torch.equal(y[[1, 2]], before[[1, 2]])


class Layer:
    """One layer with two slots of rank 4 and its kernels, batch after batch."""

    ROW_SLOTS = (0, 1, -1, 0)

    def __init__(self) -> None:
        self.a, self.b = stacked([4, 4], 8, 16, 12, torch.float32, seed=1)
        self.x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
        self.kernels = kernels_for(self.ROW_SLOTS, 2)

    def output(self) -> Tensor:
        y = torch.zeros(4, 12)
        self.kernels.add_lora_linear(y, self.x, (self.a,), (self.b,), 1.0, (12,))
        return y

    def assert_current(self) -> None:
        zeros = torch.zeros(4, 12)
        assert_close(self.output(), expected(zeros, self.x, self.ROW_SLOTS, [(self.a, self.b)]))


@pytest.fixture
def layer() -> Layer:
    used = Layer()
    used.assert_current()
    return used


@pytest.mark.parametrize("inference", [True, False])
def test_weights_replaced_in_a_slot_count_at_once(layer: Layer, inference: bool) -> None:
    a, b = stacked([7], 7, 16, 12, torch.float32, seed=9)
    with torch.inference_mode(inference):
        layer.a[1] = 0
        layer.b[1] = 0
        layer.a[1, 0, :7, :16].copy_(a[0, 0])
        layer.b[1, 0, :12, :7].copy_(b[0, 0])
    layer.assert_current()


def test_each_single_write_counts(layer: Layer) -> None:
    for weights in (layer.a, layer.b):
        weights.view(-1)[3] += 1.0
        layer.assert_current()


def test_replaced_storage_counts(layer: Layer) -> None:
    layer.b.data = layer.b * 2
    layer.assert_current()


def test_a_reset_slot_adds_nothing(layer: Layer) -> None:
    layer.a[0] = 0
    layer.b[0] = 0
    layer.assert_current()
    assert not layer.output()[[0, 3]].any()


def test_the_next_batch_has_its_own_slots(layer: Layer) -> None:
    announce(layer.kernels, [-1, -1, -1, -1], 2)
    assert not layer.output().any()
    announce(layer.kernels, Layer.ROW_SLOTS, 2)
    layer.assert_current()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_broken_adapter_leaves_its_neighbours_alone(
    layer: Layer, poison: float, factor: str
) -> None:
    sound = layer.output()
    getattr(layer, factor)[1, 0, 2, 2] = poison
    broken = layer.output()
    torch.testing.assert_close(broken[[0, 2, 3]], sound[[0, 2, 3]])


def test_a_rows_result_is_the_same_to_the_bit_among_any_few_neighbours(layer: Layer) -> None:
    together = layer.output()
    for row, slot in enumerate(Layer.ROW_SLOTS):
        announce(layer.kernels, [slot], 2)
        alone = torch.zeros(1, 12)
        x = layer.x[row : row + 1]
        layer.kernels.add_lora_linear(alone, x, (layer.a,), (layer.b,), 1.0, (12,))
        assert torch.equal(alone[0], together[row])


def test_a_row_is_the_same_to_the_bit_in_tiles_of_any_size() -> None:
    """Five rows of a slot are a tile of four and one of one; width and rank fill no vector."""
    a, b = stacked([5, 7], 8, 41, 131, torch.float32, seed=4)
    x = torch.randn(12, 41, generator=torch.Generator().manual_seed(5))
    row_slots = [0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, -1]
    together = torch.zeros(12, 131)
    kernels = kernels_for(row_slots, 2)
    kernels.add_lora_linear(together, x, (a,), (b,), 1.0, (131,))
    for row, slot in enumerate(row_slots):
        announce(kernels, [slot], 2)
        alone = torch.zeros(1, 131)
        kernels.add_lora_linear(alone, x[row : row + 1], (a,), (b,), 1.0, (131,))
        assert torch.equal(alone[0], together[row])


def test_fewer_rows_than_the_batch_are_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="a batch of 4 rows do not fit x"):
        layer.kernels.add_lora_linear(
            torch.zeros(3, 12), layer.x[:3], (layer.a,), (layer.b,), 1.0, (12,)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "row_slots", [(0, -1, 0), (0,) * 40 + (-1,), (0, -1) * 40], ids=["few", "many", "scattered"]
)
def test_an_adapter_that_adds_too_much_leaves_finite_outputs(
    dtype: torch.dtype, row_slots: tuple[int, ...]
) -> None:
    """Promise 7: a NaN in the cache of keys and values would be in everybody's answers."""
    weights = stacked([8], 8, 40, 100, dtype, seed=1)
    weights[1].mul_(65_504.0)
    x = torch.full((len(row_slots), 40), 1e30, dtype=dtype)
    y = torch.ones(len(row_slots), 100, dtype=dtype)
    reference = expected(y, x, row_slots, [weights])
    kernels_for(row_slots, 1).add_lora_linear(y, x, (weights[0],), (weights[1],), 1.0, (100,))
    adapted = torch.tensor(row_slots) == 0
    assert torch.equal(y[~adapted], torch.ones_like(y[~adapted]))
    assert y.abs().max() <= 1.01 * LARGEST
    assert torch.equal(y[adapted].sign().double(), reference[adapted].sign())
