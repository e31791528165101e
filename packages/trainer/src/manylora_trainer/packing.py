"""Packs examples of many adapters into forward passes without padding and without repetition.

A pack is a flat list of tokens, grouped by adapter, so that each adapter's tokens are one
contiguous range. Within a group, examples that begin alike share that prefix: a system prompt and
an instruction that stand before many examples are computed once for them. That changes nothing in
the result, as a token's hidden state depends only on the tokens before it, and the gradients of
all examples add up in the shared tokens.

    adapter 0                                                       adapter 1
    [prefix][own tokens of a][own of b] ... [prefix][own of c] ...  [prefix][own of d] ...

Attention follows the same plan: every example's own tokens look at their prefix and at
themselves. Examples of similar length form a bucket, one rectangular attention call.

Which examples share a prefix is decided within the adapter's own batch, before any packing, so it
depends neither on the other adapters nor on the size of the packs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from manylora_trainer.preference import Pair
from manylora_trainer.tokenization import Example

MIN_SHARED_PREFIX = 8
"""A shorter common prefix is not worth a masked attention call."""
MAX_SHARING_LENGTH = 1024
"""Longer examples share nothing: their attention mask would grow with the square of the length."""
MAX_BUCKET_WASTE = 1.25
"""A bucket's longest example may be this many times its shortest, plus a few tokens."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Bucket:
    """Examples attended to in one call: own tokens as queries, prefix and own tokens as keys.

    Both index arrays hold token positions of the pack. Shorter examples are filled up by
    repeating their own last token: it stands behind every real query, so causality hides it.
    """

    queries: Indices
    """[examples, own]"""
    keys: Indices
    """[examples, prefix + own]"""

    @property
    def prefix(self) -> int:
        """Tokens every example of the bucket shares."""
        return self.keys.shape[1] - self.queries.shape[1]


@dataclass(frozen=True)
class Range:
    """Tokens `start:end` of a pack go through one adapter."""

    adapter: int
    start: int
    end: int


@dataclass(frozen=True)
class Pack:
    """One forward pass."""

    tokens: Indices
    """[tokens]"""
    positions: Indices
    """Position of each token in its example, [tokens]."""
    token_sequences: Indices
    """Number in its batch of the example each token belongs to, [tokens]. A shared prefix belongs
    to the first example that has it."""
    ranges: tuple[Range, ...]
    buckets: tuple[Bucket, ...]
    spans: tuple["Span", ...]
    predicting: Indices
    """Tokens whose successor trains, [targets]."""
    targets: Indices
    """Those successors' ids, [targets]."""
    target_sequences: Indices
    """Which of the pack's examples, in the order of `spans`, each target is of, [targets]."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Span:
    """The examples of one adapter in a pack."""

    adapter: int
    sequences: tuple[int, ...]
    """Their numbers in the adapter's batch."""


@dataclass(frozen=True)
class Batch:
    """Examples that one adapter takes in one step."""

    adapter: int
    """Number of the adapter in its run."""
    examples: Sequence[Example]
    together: int = 1
    """Runs of this many examples stay in one pack: 2 for the halves of a preference."""

    @classmethod
    def of(cls, adapter: int, items: Sequence[Example | Pair]) -> "Batch":
        """The batch of all examples that some items, all of one kind, consist of."""
        examples = [example for item in items for example in item.sequences]
        return cls(adapter, examples, together=len(examples) // len(items))

    @property
    def tokens(self) -> int:
        """Of all examples, prompts included."""
        return sum(len(example) for example in self.examples)

    @cached_property
    def trained(self) -> Indices:
        """Tokens of each example that are learned, [examples]."""
        return np.array([int(example.trained.sum()) for example in self.examples])


def pack_batches(batches: Sequence[Batch], pack_tokens: int, multiple: int = 1) -> list[Pack]:
    """Packs the batches of one step into forward passes of about `pack_tokens` tokens each.

    An example longer than that gets a pack of its own. The number of packs is a multiple of
    `multiple` where the examples allow it, so that as many workers have equally much to do.
    """
    clusters = [cluster for batch in batches for cluster in _clusters(batch)]
    total = sum(unit.own(c.prefix) for c in clusters for unit in c.units)
    total += sum(cluster.prefix for cluster in clusters)
    needed = max(1, -(-total // pack_tokens))
    needed = -(-needed // multiple) * multiple
    # Even packs: a small last one would spend a whole forward's overhead on few tokens. A prefix
    # is computed again in every pack its examples reach into.
    longest_prefix = max((cluster.prefix for cluster in clusters), default=0)
    target = (total + longest_prefix * (needed - 1)) / needed
    packs: list[Pack] = []
    waiting: list[_Cluster] = []
    packed = 0
    for cluster in clusters:
        for unit in cluster.units:
            joins = bool(waiting) and waiting[-1].first == cluster.first
            joins = joins and waiting[-1].batch is cluster.batch
            cost = unit.own(cluster.prefix) + (0 if joins else cluster.prefix)
            if waiting and packed + cost / 2 > target * (len(packs) + 1):
                packs.append(_build(waiting))
                waiting, joins = [], False
                cost = unit.own(cluster.prefix) + cluster.prefix
            if not joins:
                waiting.append(_Cluster(cluster.batch, cluster.prefix, cluster.first, []))
            waiting[-1].units.append(unit)
            packed += cost
    return [*packs, _build(waiting)] if waiting else packs


@dataclass(frozen=True)
class _Unit:
    """Examples of a batch that stay together, by their numbers in it."""

    examples: tuple[tuple[int, Example], ...]

    def own(self, prefix: int) -> int:
        """Tokens beside a shared prefix."""
        return sum(len(example) - prefix for _, example in self.examples)

    @property
    def opening(self) -> NDArray[np.int32]:
        """What all of its examples begin with.

        Ends before the last prompt token of each, so that every prediction is made by an
        example's own token.
        """
        shortest = min(example.prompt_length for _, example in self.examples) - 1
        openings = [example.tokens[:shortest] for _, example in self.examples]
        return openings[0][: min(_common(openings[0], other) for other in openings)]


@dataclass(frozen=True)
class _Cluster:
    """Units of one batch that share a prefix."""

    batch: Batch
    prefix: int
    """Tokens."""
    first: int
    """Its lowest-numbered example, over all packs that it reaches into."""
    units: list[_Unit]


def _clusters(batch: Batch) -> list[_Cluster]:
    numbered = list(enumerate(batch.examples))
    units = [
        _Unit(tuple(numbered[at : at + batch.together]))
        for at in range(0, len(numbered), batch.together)
    ]
    openings = sorted(
        ((unit.opening, unit) for unit in units),
        key=lambda entry: (entry[0].tolist(), entry[1].examples[0][0]),
    )
    clusters: list[_Cluster] = []
    rest: list[_Unit] = []
    for prefix, members in _share(openings, batch.together)[1]:
        longest = max(len(example) for unit in members for _, example in unit.examples)
        if prefix < MIN_SHARED_PREFIX or longest > MAX_SHARING_LENGTH:
            rest += members
        else:
            clusters.append(_cluster(batch, prefix, members))
    return [*clusters, _cluster(batch, 0, rest)] if rest else clusters


def _cluster(batch: Batch, prefix: int, units: Sequence[_Unit]) -> _Cluster:
    first = min(unit.examples[0][0] for unit in units)
    # Sorted with the example's number last: the order must not come from anything else.
    ordered = sorted(units, key=lambda unit: (unit.own(0), unit.examples[0][0]))
    return _Cluster(batch, prefix, first, ordered)


Openings = Sequence[tuple[NDArray[np.int32], _Unit]]


def _share(openings: Openings, together: int) -> tuple[int, list[tuple[int, list[_Unit]]]]:
    """Divides units, sorted by what they begin with, so that sharing saves the most tokens.

    Gives the tokens saved, and prefix and units of each part.
    """
    units = [unit for _, unit in openings]
    if len(units) == 1:
        alone = len(openings[0][0]) if together > 1 else 0
        return (together - 1) * alone, [(alone, units)]
    shared = [_common(a, b) for (a, _), (b, _) in itertools.pairwise(openings)]
    least = min(shared)
    joined = (len(units) * together - 1) * least
    cuts = [0, *(at for at, length in enumerate(shared, 1) if length == least), len(units)]
    parts = [_share(openings[a:b], together) for a, b in itertools.pairwise(cuts) if b > a]
    saved = sum(saving for saving, _ in parts)
    if joined >= saved:
        return joined, [(least, units)]
    return saved, [cluster for _, clusters in parts for cluster in clusters]


def _common(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """Leading tokens that both have."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def _build(clusters: Sequence[_Cluster]) -> Pack:
    tokens: list[NDArray[np.int32]] = []
    positions: list[Indices] = []
    token_sequences: list[Indices] = []
    predicting: list[Indices] = []
    targets: list[NDArray[np.int32]] = []
    target_sequences: list[Indices] = []
    buckets: list[Bucket] = []
    ranges: list[Range] = []
    spans: list[Span] = []
    at = counted = 0
    for cluster in clusters:
        prefix, start = cluster.prefix, at
        examples = [entry for unit in cluster.units for entry in unit.examples]
        examples.sort(key=lambda entry: len(entry[1]))
        if prefix:
            tokens.append(examples[0][1].tokens[:prefix])
            positions.append(np.arange(prefix))
            token_sequences.append(np.full(prefix, cluster.first))
            buckets.append(_bucket(np.arange(0), [(start, prefix)]))
            at += prefix
        shared = np.arange(start, start + prefix)
        places: list[tuple[int, int]] = []
        for number, example in examples:
            own = len(example) - prefix
            tokens.append(example.tokens[prefix:])
            positions.append(np.arange(prefix, len(example)))
            token_sequences.append(np.full(own, number))
            learned = np.flatnonzero(example.trained)
            predicting.append(learned - 1 - prefix + at)
            targets.append(example.tokens[learned])
            target_sequences.append(np.full(len(learned), counted))
            places.append((at, own))
            at += own
            counted += 1
        buckets += [_bucket(shared, similar) for similar in _similar(places)]
        adapter, numbers = cluster.batch.adapter, tuple(number for number, _ in examples)
        if ranges and ranges[-1].adapter == adapter:
            ranges[-1] = Range(adapter, ranges[-1].start, at)
            spans[-1] = Span(adapter, spans[-1].sequences + numbers)
        else:
            ranges.append(Range(adapter, start, at))
            spans.append(Span(adapter, numbers))
    return Pack(
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(positions),
        np.concatenate(token_sequences),
        tuple(ranges),
        tuple(buckets),
        tuple(spans),
        np.concatenate(predicting),
        np.concatenate(targets).astype(np.int64),
        np.concatenate(target_sequences),
    )


def _similar(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs of (start, length), shortest first, whose lengths are close enough for one call."""
    runs: list[list[tuple[int, int]]] = []
    for span in spans:
        if runs and span[1] <= runs[-1][0][1] * MAX_BUCKET_WASTE + 8:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _bucket(shared: Indices, spans: Sequence[tuple[int, int]]) -> Bucket:
    longest = max(length for _, length in spans)
    queries = np.array(
        [start + np.minimum(np.arange(longest), length - 1) for start, length in spans]
    )
    keys = np.concatenate([np.tile(shared, (len(spans), 1)), queries], axis=1)
    return Bucket(queries, keys)
