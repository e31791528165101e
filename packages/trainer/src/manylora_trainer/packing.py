"""Packs examples of many adapters into forward passes without padding and without repetition.

A pack is a flat list of tokens, grouped by adapter, so that each adapter's tokens are one
contiguous range. Within a group the examples share their common prompt prefix: a system prompt
and an instruction that stand before every example are computed once for the group. That changes
nothing in the result, as a token's hidden state depends only on the tokens before it, and the
gradients of all examples add up in the shared tokens.

    group of adapter 0                                group of adapter 1
    [prefix][own tokens of a][own tokens of b] ...    [prefix][own tokens of c] ...

Attention follows the same plan: every example's own tokens look at the prefix and at themselves.
Examples of similar length form a bucket, one rectangular attention call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manylora_trainer.tokenization import Example

MIN_SHARED_PREFIX = 8
"""A shorter common prefix is not worth a masked attention call."""
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
    ranges: tuple[Range, ...]
    buckets: tuple[Bucket, ...]
    predicting: Indices
    """Tokens whose successor trains, [targets]."""
    targets: Indices
    """Those successors' ids, [targets]."""
    target_adapters: Indices
    """[targets]"""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Examples that one adapter takes in one step."""

    adapter: int
    """Number of the adapter in its run."""
    examples: Sequence[Example]

    @property
    def tokens(self) -> int:
        """Of all examples, prompts included."""
        return sum(len(example) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        """Those that are learned."""
        return sum(int(example.trained.sum()) for example in self.examples)


def pack_batches(batches: Sequence[Batch], pack_tokens: int, multiple: int = 1) -> list[Pack]:
    """Packs the batches of one step into forward passes of about `pack_tokens` tokens each.

    An example longer than that gets a pack of its own. The number of packs is a multiple of
    `multiple` where the examples allow it, so that as many workers have equally much to do.
    """
    queue = [_pieces(batch) for batch in batches if batch.examples]
    total = sum(piece.own for pieces in queue for piece in pieces)
    total += sum(pieces[0].prefix for pieces in queue)
    needed = max(1, -(-total // pack_tokens))
    needed = -(-needed // multiple) * multiple
    # Even packs: a small last one would spend a whole forward's overhead on few tokens. A prefix
    # is computed again in every pack its batch reaches into.
    longest_prefix = max((pieces[0].prefix for pieces in queue), default=0)
    target = (total + longest_prefix * (needed - 1)) / needed
    packs: list[Pack] = []
    waiting: list[_Piece] = []
    packed = 0
    for piece in (piece for pieces in queue for piece in pieces):
        joins = bool(waiting) and waiting[-1].batch is piece.batch
        cost = piece.own if joins else piece.own + piece.prefix
        if waiting and packed + cost / 2 > target * (len(packs) + 1):
            packs.append(_build(waiting))
            waiting = []
            cost = piece.own + piece.prefix
        waiting.append(piece)
        packed += cost
    return [*packs, _build(waiting)] if waiting else packs


@dataclass(frozen=True)
class _Piece:
    """One example within its batch."""

    batch: Batch
    example: Example
    prefix: int
    """Leading tokens it shares with all of its batch."""

    @property
    def own(self) -> int:
        return len(self.example) - self.prefix


def _pieces(batch: Batch) -> list[_Piece]:
    prefix = _common_prefix(batch.examples)
    ordered = sorted(batch.examples, key=len)
    return [_Piece(batch, example, prefix) for example in ordered]


def _common_prefix(examples: Sequence[Example]) -> int:
    """Leading tokens that all examples share.

    Ends before the last prompt token of each, so that every prediction is made by an example's
    own token.
    """
    if len(examples) < 2:
        return 0
    first = examples[0]
    length = min(example.prompt_length for example in examples) - 1
    for example in examples[1:]:
        differs = np.flatnonzero(first.tokens[:length] != example.tokens[:length])
        if len(differs):
            length = int(differs[0])
    return length if length >= MIN_SHARED_PREFIX else 0


def _build(pieces: Sequence[_Piece]) -> Pack:
    tokens: list[NDArray[np.int32]] = []
    positions: list[Indices] = []
    predicting: list[Indices] = []
    targets: list[NDArray[np.int32]] = []
    target_adapters: list[Indices] = []
    ranges: list[Range] = []
    buckets: list[Bucket] = []
    at = 0
    for group in _groups(pieces):
        adapter, prefix, start = group[0].batch.adapter, group[0].prefix, at
        if prefix:
            tokens.append(group[0].example.tokens[:prefix])
            positions.append(np.arange(prefix))
            buckets.append(_bucket(np.arange(0), [(start, prefix)]))
            at += prefix
        shared = np.arange(start, start + prefix)
        spans: list[tuple[int, int]] = []
        for piece in group:
            example, own = piece.example, piece.own
            tokens.append(example.tokens[prefix:])
            positions.append(np.arange(prefix, len(example)))
            learned = np.flatnonzero(example.trained)
            predicting.append(learned - 1 - prefix + at)
            targets.append(example.tokens[learned])
            target_adapters.append(np.full(len(learned), adapter))
            spans.append((at, own))
            at += own
        buckets += [_bucket(shared, similar) for similar in _similar(spans)]
        ranges.append(Range(adapter, start, at))
    return Pack(
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(positions),
        tuple(ranges),
        tuple(buckets),
        np.concatenate(predicting),
        np.concatenate(targets).astype(np.int64),
        np.concatenate(target_adapters),
    )


def _groups(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups and groups[-1][0].batch is piece.batch:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


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
