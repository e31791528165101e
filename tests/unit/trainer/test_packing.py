"""Packs hold many examples without padding, and none of them sees another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_registry import identify_base
from manylora_trainer.adapter import Adapter
from manylora_trainer.adapter_settings import Lora
from manylora_trainer.base_model import BaseModel
from manylora_trainer.lora import Routing, attach
from manylora_trainer.packing import Batch, pack_batches
from manylora_trainer.targets import linears_of
from manylora_trainer.tokenization import Example


def example(tokens: list[int], prompt: int) -> Example:
    return Example(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= prompt)


def random_examples(seed: int, shared: int, lengths: list[int]) -> list[Example]:
    """Examples that begin with the same `shared` tokens and go on with `lengths` of their own."""
    random = np.random.default_rng(seed)
    prefix = random.integers(3, 250, shared).tolist()
    return [
        example([*prefix, *random.integers(3, 250, length).tolist()], shared + length // 2)
        for length in lengths
    ]


@pytest.fixture(scope="module")
def base(tiny_base):
    return BaseModel(tiny_base, torch.float32, torch.device("cpu"))


def adapter_of_targets(pack):
    """The adapter of each of a pack's targets."""
    return np.array([s.adapter for s in pack.spans for _ in s.sequences])[pack.target_sequences]


def logits_by_target(base, packs):
    """Logits of every prediction, keyed by adapter and target so that packings compare."""
    rows = [
        ((int(a), int(t)), row)
        for pack in packs
        for a, t, row in zip(
            adapter_of_targets(pack), pack.targets, base.logits(pack).detach(), strict=True
        )
    ]
    return sorted(rows, key=lambda entry: (entry[0], entry[1].tolist()))


@pytest.mark.parametrize("pack_tokens", [40, 128, 4096])
def test_packed_logits_equal_unpacked(base, pack_tokens):
    batches = [
        Batch(0, random_examples(1, 24, [6, 7, 9, 30, 31, 60])),
        Batch(1, random_examples(2, 0, [12, 40, 13])),
        Batch(2, random_examples(3, 60, [8])),
        # Several answers to one prompt: its last token predicts the first of each.
        Batch(3, [example([*range(40, 70), 80 + i, 90 + i], 30) for i in range(3)]),
    ]
    packed = logits_by_target(base, pack_batches(batches, pack_tokens))
    alone = logits_by_target(
        base,
        [p for b in batches for e in b.examples for p in pack_batches([Batch(b.adapter, [e])], 1)],
    )
    assert [key for key, _ in packed] == [key for key, _ in alone]
    for (_, ours), (_, theirs) in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_unpacked_logits_are_the_models_own(base):
    (only,) = random_examples(4, 0, [30])
    (pack,) = pack_batches([Batch(0, [only])], 64)
    base.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        stock = base.model(input_ids=torch.from_numpy(only.tokens)[None].long()).logits[0]
    base.model.set_attn_implementation("manylora_packed")
    torch.testing.assert_close(
        base.logits(pack).detach(), stock[only.prompt_length - 1 : -1], rtol=1e-4, atol=1e-5
    )


def test_one_example_cannot_change_another(base):
    first, second, third = random_examples(5, 20, [10, 10, 10])
    changed = example([*second.tokens[:20].tolist(), *range(100, 110)], 25)

    def first_rows(neighbour):
        (pack,) = pack_batches([Batch(0, [first, neighbour, third])], 4096)
        return base.logits(pack).detach()[:5]

    torch.testing.assert_close(first_rows(changed), first_rows(second), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(2, 60), min_size=1, max_size=12)),
        min_size=1,
        max_size=4,
    ),
    st.integers(16, 300),
)
def test_every_prediction_is_made_exactly_once_at_its_own_position(shapes, pack_tokens):
    batches = [
        Batch(adapter, random_examples(adapter, shared, lengths))
        for adapter, (shared, lengths) in enumerate(shapes)
    ]
    expected = sorted(
        (b.adapter, int(place), int(e.tokens[place - 1]), int(e.tokens[place]))
        for b in batches
        for e in b.examples
        for place in np.flatnonzero(e.trained)
    )
    packs = pack_batches(batches, pack_tokens)
    found = sorted(
        (int(a), int(p.positions[at]) + 1, int(p.tokens[at]), int(target))
        for p in packs
        for at, target, a in zip(p.predicting, p.targets, adapter_of_targets(p), strict=True)
    )
    assert found == expected
    for pack in packs:
        numbered = [(s.adapter, number) for s in pack.spans for number in s.sequences]
        for (adapter, number), trained in zip(
            numbered, np.bincount(pack.target_sequences, minlength=len(numbered)), strict=True
        ):
            assert batches[adapter].trained[number] == trained
        covered = [at for r in pack.ranges for at in range(r.start, r.end)]
        assert covered == list(range(len(pack)))
        queried = np.concatenate([bucket.queries.ravel() for bucket in pack.buckets])
        assert set(queried.tolist()) == set(covered)


def test_a_shared_prompt_is_computed_once():
    batch = Batch(0, random_examples(6, 50, [10] * 8))
    (pack,) = pack_batches([batch], 4096)
    assert batch.tokens == 8 * 60
    assert len(pack) == 50 + 8 * 10


def test_examples_of_several_instructions_share_within_each():
    kinds = [random_examples(seed, 30, [10] * 4) for seed in (1, 2, 3)]
    mixed = [kind[i] for i in range(4) for kind in kinds]
    (pack,) = pack_batches([Batch(0, mixed)], 4096)
    assert len(pack) == 3 * (30 + 4 * 10)


def test_halves_of_a_preference_share_their_prompt_and_stay_in_one_pack():
    pairs = [random_examples(seed, 40, [21, 22]) for seed in range(8)]
    batch = Batch(0, [half for pair in pairs for half in pair], together=2)
    packs = pack_batches([batch], 200)
    assert len(packs) > 2
    # One prompt and two answers a pair; the trained half of the answer does not end a prompt.
    assert sum(len(pack) for pack in packs) == 8 * (40 + 21 + 22)
    for pack in packs:
        (span,) = pack.spans
        assert {number ^ 1 for number in span.sequences} == set(span.sequences)


def test_long_examples_share_nothing_so_that_attention_needs_no_square_mask():
    (pack,) = pack_batches([Batch(0, random_examples(3, 600, [700, 701]))], 4096)
    assert len(pack) == 1300 + 1301
    assert all(bucket.prefix == 0 for bucket in pack.buckets)


def test_gradients_through_a_shared_prompt_equal_those_of_separate_examples(tiny_base):
    base = BaseModel(tiny_base, torch.float32, torch.device("cpu"))
    shapes = linears_of(identify_base(tiny_base))
    adapter = Adapter(shapes, Lora(rank=4), torch.Generator().manual_seed(0), base.device)
    # With B at zero, A would have no gradient to compare.
    adapter.weights.add_(0.1 * torch.randn(adapter.weights.shape))
    routing = Routing(base.device)
    attach(base.model, [adapter], routing)
    examples = random_examples(8, 40, [5, 6, 18, 30])

    def gradients(batches):
        adapter.gradients.zero_()
        for batch in batches:
            for pack in pack_batches([batch], 4096):
                with base.reading(pack), routing.through(pack.ranges):
                    base.cross_entropy(pack).sum().backward()
        return adapter.gradients.clone()

    together = gradients([Batch(0, examples)])
    separate = gradients([Batch(0, [example]) for example in examples])
    scale = float(separate.abs().max())
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5 * scale)


def test_packs_are_even():
    packs = pack_batches([Batch(0, random_examples(7, 0, [20] * 33))], 128)
    sizes = [len(pack) for pack in packs]
    assert len(sizes) == 6
    assert max(sizes) - min(sizes) <= 20
