"""One task's rows, read as a stream and divided: what trains, what validates, what is held out.

A row's place is decided by a hash of its rendered input alone, so that no duplicate crosses from
training into an evaluation, and adding rows never moves the others.
"""

import hashlib
import heapq
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from manylora_trainer.data_settings import Split
from manylora_trainer.errors import NoExamplesError
from manylora_trainer.formats import Rendered, render
from manylora_trainer.preference import Pair, encode_pairs
from manylora_trainer.recipe import Task
from manylora_trainer.sources import Source, open_source
from manylora_trainer.tokenization import ChatTokenizer, Example

Part = Literal["train", "validation", "held_out"]


@dataclass(frozen=True)
class HeldOutRow:
    """A row kept out of training, for the evaluator."""

    rendered: Rendered
    columns: Mapping[str, Any]

    def as_json(self) -> str:
        """One line of `held_out/TASK.jsonl`."""
        return json.dumps(
            {
                "messages": [
                    {"role": message.role, "content": message.content}
                    for message in self.rendered.messages
                ],
                "expected": self.rendered.completion,
                "row": dict(self.columns),
            },
            ensure_ascii=False,
            default=str,
        )


@dataclass(frozen=True)
class TaskData:
    """Everything one task trains and is measured on."""

    train: Sequence[Any]
    """Examples, or pairs of them for a task of preferences."""
    validation: Sequence[Any]
    held_out: list[HeldOutRow]
    rows_read: int
    overlong_dropped: int
    overlong_truncated: int
    data_fingerprint: str
    """`sha256:…` of the training and validation tokens, in order."""


def random_for(seed: int, task: str, purpose: str) -> random.Random:
    """A generator that depends on nothing but its arguments: not on the other tasks of a run."""
    return random.Random(f"{seed}/{task}/{purpose}")  # noqa: S311 (repeatable, not secret)


def part_of(rendered: Rendered, split: Split) -> tuple[Part, bytes]:
    """Where an input belongs, and the hash that says so."""
    digest = hashlib.sha256(rendered.input_key).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < split.held_out:
        return "held_out", digest
    if place < split.held_out + split.validation:
        return "validation", digest
    return "train", digest


def load_task(
    task: Task, tokenizer: ChatTokenizer, seed: int, *, source: Source | None = None
) -> TaskData:
    """Reads, divides and tokenises the rows of one task.

    Memory is bounded by what the run can use: a uniform sample of `steps * batch_size` training
    rows, and of each evaluation part the rows with the smallest hashes, once each.

    Raises:
        RowError: a row is malformed.
        SourceError: the source cannot be opened or fails midway.
        NoExamplesError: no row is left to train on.
    """
    source = source or open_source(task.source)
    sample = _Sample(task.steps * task.batch_size, random_for(seed, task.name, "sample"))
    validation = _Smallest(task.split.validation_rows)
    held_out = _Smallest(task.split.held_out_rows)
    rows_read = 0
    for row in source.rows():
        rows_read += 1
        rendered = render(task.format, source.name, row)
        part, digest = part_of(rendered, task.split)
        if part == "train":
            sample.offer(rendered)
        elif part == "validation":
            validation.offer(digest, HeldOutRow(rendered, row.columns))
        else:
            held_out.offer(digest, HeldOutRow(rendered, row.columns))
    if rows_read == 0:
        raise NoExamplesError(f"task {task.name}: {source.name} has no rows")
    train, train_cut = _tokenise(sample.rows, tokenizer, task)
    validating, validation_cut = _tokenise(
        [row.rendered for row in validation.rows()], tokenizer, task
    )
    if not train:
        raise NoExamplesError(
            f"task {task.name}: of {rows_read} rows in {source.name} none is left to train on "
            f"({train_cut.dropped} longer than max_length {task.max_length})"
        )
    return TaskData(
        train,
        validating,
        list(held_out.rows()),
        rows_read,
        train_cut.dropped + validation_cut.dropped,
        train_cut.truncated + validation_cut.truncated,
        _fingerprint([*train, *validating]),
    )


@dataclass
class _Sample:
    """A uniform sample of a stream (Vitter 1985, algorithm R); all of it when it is short."""

    size: int
    generator: random.Random
    rows: list[Rendered] = field(default_factory=list[Rendered])
    seen: int = 0

    def offer(self, row: Rendered) -> None:
        self.seen += 1
        if len(self.rows) < self.size:
            self.rows.append(row)
        elif (place := self.generator.randrange(self.seen)) < self.size:
            self.rows[place] = row


class _Smallest:
    """The rows with the smallest hashes, one for each input."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: dict[bytes, HeldOutRow] = {}
        self._largest_first: list[tuple[int, bytes]] = []

    def offer(self, digest: bytes, row: HeldOutRow) -> None:
        if digest in self._rows or self._size == 0:
            return
        entry = (-int.from_bytes(digest), digest)
        if len(self._rows) == self._size:
            if entry < self._largest_first[0]:
                return
            del self._rows[heapq.heappushpop(self._largest_first, entry)[1]]
        else:
            heapq.heappush(self._largest_first, entry)
        self._rows[digest] = row

    def rows(self) -> Iterator[HeldOutRow]:
        return (self._rows[digest] for digest in sorted(self._rows))


@dataclass
class _Cut:
    dropped: int = 0
    truncated: int = 0


def encode(
    rendered: Sequence[Rendered], tokenizer: ChatTokenizer, task: Task
) -> Sequence[Example | Pair]:
    """Tokenises rows as the kind of the task wants them."""
    return (tokenizer.encode if task.kind == "sft" else partial(encode_pairs, tokenizer))(rendered)


def _tokenise(
    rendered: Sequence[Rendered], tokenizer: ChatTokenizer, task: Task
) -> tuple[list[Example | Pair], _Cut]:
    """Tokenises and applies the policy for overlong examples, counting what it touched."""
    cut = _Cut()
    kept: list[Example | Pair] = []
    for example in encode(rendered, tokenizer, task):
        if example.longest <= task.max_length:
            kept.append(example)
        elif task.overlong == "truncate" and (short := example.truncated(task.max_length)):
            kept.append(short)
            cut.truncated += 1
        else:
            # A prompt that fills the length leaves nothing to learn, whatever the policy.
            cut.dropped += 1
    return kept, cut


def _fingerprint(items: Sequence[Example | Pair]) -> str:
    digest = hashlib.sha256()
    for example in (example for item in items for example in item.sequences):
        digest.update(len(example).to_bytes(8))
        digest.update(example.tokens.astype("<i4").tobytes())
        digest.update(example.trained.tobytes())
    return f"sha256:{digest.hexdigest()}"
