"""One task's rows, read as a stream and divided: what trains, what validates, what is held out.

A row's place is decided by a hash of its rendered input alone, so that no duplicate crosses from
training into an evaluation, and adding rows never moves the others.
"""

import hashlib
import heapq
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, cast

from manylora_trainer.data_settings import Split
from manylora_trainer.errors import NoExamplesError, RowError, UnfitTaskError
from manylora_trainer.formats import Rendered
from manylora_trainer.items import I, Preparation, R, Rendering
from manylora_trainer.preference import PairPreparation
from manylora_trainer.recipe import Task
from manylora_trainer.source_factory import open_source
from manylora_trainer.sources import Row, Source
from manylora_trainer.tokenization import ChatPreparation, ChatTokenizer

Part = Literal["train", "validation", "held_out"]
TOLD_EVERY = 250_000
"""Rows between two lines about a long reading."""
COUNTED_AT_ONCE = 256
"""Rows tokenised in one call while they are counted."""


@dataclass(frozen=True)
class HeldOutRow:
    """A row kept out of training, for the evaluator."""

    rendered: Rendering
    columns: Mapping[str, Any]

    def as_json(self) -> str:
        """One line of `held_out/TASK.jsonl`.

        All columns are in it, so also values that no format would have taken.
        """
        try:
            row = _as_json_has_it(self.columns)
        except RecursionError:
            # A value that holds itself; Python's own text of it has an end.
            row = {str(name): str(value) for name, value in self.columns.items()}
        return json.dumps({**self.rendered.held_out(), "row": row}, ensure_ascii=False, default=str)


def _as_json_has_it(value: Any) -> Any:
    """The same with what JSON has no form for: keys as of a map from dates as text, NaN as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        return {
            key if isinstance(key, str | int | float | None) else str(key): _as_json_has_it(entry)
            for key, entry in entries
        }
    if isinstance(value, list | tuple):
        return [_as_json_has_it(entry) for entry in cast("Sequence[Any]", value)]
    return value


@dataclass(frozen=True)
class Window:
    """The training rows that are shuffled together, as they were looked through."""

    rows: int
    digest: bytes
    """SHA-256 over the `content_digest` of each."""


@dataclass(frozen=True)
class TaskData(Generic[R, I]):
    """What one task trains and is measured on. Its training rows stay in their source."""

    source: Source
    preparation: Preparation[R, I]
    validation: list[I]
    held_out: list[HeldOutRow]
    steps: int
    """Optimiser steps: the recipe's, or what its epochs amount to."""
    examples: int | None
    """Examples those epochs hold, after which a stream ends; None without epochs."""
    rows_read: int
    """Looked through at the start: all, or `split.scan_rows` where the run is counted in steps."""
    rows_skipped: int
    """Of these, malformed ones that were passed over."""
    train_rows: int
    """Of these, rows to train on."""
    windows: Sequence[Window]
    """Of these, what a stream will read: it takes no others in their place."""
    whole: bool
    """Whether all rows were looked through, so that the last window ends the source."""
    overlong_dropped: int
    """Of the examples tokenised at the start: validation, and with epochs all that train."""
    overlong_truncated: int
    data_fingerprint: str
    """`sha256:…` of the training and validation rows read, in order."""


def random_for(seed: int, task: str, purpose: str) -> random.Random:
    """A generator that depends on nothing but its arguments: not on the other tasks of a run."""
    return random.Random(f"{seed}/{task}/{purpose}")  # noqa: S311 (repeatable, not secret)


def part_of(rendered: Rendering, split: Split) -> tuple[Part, bytes]:
    """Where an input belongs, and the hash that says so."""
    digest = hashlib.sha256(rendered.input_key).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < split.held_out:
        return "held_out", digest
    if place < split.held_out + split.validation:
        return "validation", digest
    return "train", digest


def content_digest(rendered: Rendering) -> bytes:
    """SHA-256 of all that trains of a row."""
    return hashlib.sha256(rendered.content_key).digest()


def preparation_of(task: Task, tokenizer: ChatTokenizer) -> Preparation[Rendered, Any]:
    """What makes a task's items: examples, or pairs of them for a task of preferences."""
    if task.kind == "dpo":
        return PairPreparation(task.format, tokenizer)
    return ChatPreparation(task.format, tokenizer)


def load_task(
    task: Task,
    tokenizer: ChatTokenizer,
    seed: int,
    *,
    source: Source | None = None,
    say: Callable[[str], None] | None = None,
    ask: Callable[[], None] | None = None,
) -> TaskData[Rendered, Any]:
    """Looks through the rows of one task; see `survey`."""
    source = source or open_source(task.source, f"{seed}/{task.seed_name}")
    return survey(task, source, preparation_of(task, tokenizer), say, ask)


def survey(
    task: Task,
    source: Source,
    preparation: Preparation[R, I],
    say: Callable[[str], None] | None = None,
    ask: Callable[[], None] | None = None,
) -> TaskData[R, I]:
    """Reads a task's rows once: counts them, and keeps those it is measured on.

    Of each evaluation part the rows with the smallest hashes are kept, once each, so memory does
    not grow with the source. A run counted in epochs reads and tokenises all rows, because its
    learning rate depends on how many steps they are; one counted in steps reads
    `split.scan_rows` at most. `say` is told now and then how far a long reading is, and of the
    first row that is passed over; `ask` is called at each row, and ends the reading by what it
    raises.

    Raises:
        RowError: a row is malformed.
        SourceError: the source cannot be opened or fails midway.
        NoExamplesError: no row is left to train on.
        UnfitTaskError: the epochs end before the warm-up does.
    """
    validation = _Smallest(task.split.validation_rows)
    held_out = _Smallest(task.split.held_out_rows)
    counting = _Counting[R, I](task, preparation)
    windows = _Windows(task.shuffle_buffer)
    fingerprint = hashlib.sha256()
    rows_read = rows_skipped = train_rows = 0
    first_skipped: RowError | None = None

    def pass_over(error: RowError) -> None:
        nonlocal first_skipped
        if first_skipped is None:
            first_skipped = error
            if say is not None:
                say(f"{task.name}: malformed rows are passed over; the first: {error}")

    for row in source.rows():
        if task.epochs is None and rows_read == task.split.scan_rows:
            break
        rows_read += 1
        if ask is not None:
            ask()
        if say is not None and rows_read % TOLD_EVERY == 0:
            say(f"{task.name}: {rows_read:,} rows looked through")
        rendered = rendered_or_skipped(task, preparation, row, rows_skipped, pass_over)
        if rendered is None:
            rows_skipped += not row.again
            continue
        part, digest = part_of(rendered, task.split)
        if part == "held_out":
            held_out.offer(digest, HeldOutRow(rendered, row.columns))
            continue
        content = content_digest(rendered)
        fingerprint.update(content)
        if part == "validation":
            validation.offer(digest, HeldOutRow(rendered, row.columns))
        else:
            train_rows += 1
            windows.add(content)
            if task.epochs is not None:
                counting.add(rendered)
    else:
        windows.end()
    if rows_read == 0:
        raise NoExamplesError(f"task {task.name}: {source.name} has no rows")
    counting.flush()
    if train_rows == 0 or (task.epochs is not None and counting.examples == 0):
        raise NoExamplesError(
            f"task {task.name}: of {rows_read} rows in {source.name} none is left to train on "
            f"({counting.dropped} are longer than max_length {task.max_length}, {rows_skipped} "
            "malformed, the rest held out)"
            + ("" if first_skipped is None else f"; the first malformed one: {first_skipped}")
        )
    steps, examples = length_of(task, counting.examples, counting.tokens)
    validating = counting.fit([cast("R", row.rendered) for row in validation.rows()])
    return TaskData(
        source,
        preparation,
        validating,
        list(held_out.rows()),
        steps,
        examples,
        rows_read,
        rows_skipped,
        train_rows,
        windows.complete,
        windows.ended,
        counting.dropped,
        counting.truncated,
        f"sha256:{fingerprint.hexdigest()}",
    )


def rendered_or_skipped(
    task: Task,
    preparation: Preparation[R, I],
    row: Row,
    skipped: int,
    pass_over: Callable[[RowError], None] | None = None,
) -> R | None:
    """One row rendered, or None if it is malformed and the task passes over such rows.

    A row that is given again counts once. `pass_over` is told why one is malformed.

    Raises:
        RowError: it is malformed, and `skipped` rows before it leave no room for another.
    """
    try:
        return preparation.render(row)
    except RowError as error:
        if task.on_bad_row == "fail":
            raise
        if skipped >= task.max_bad_rows and not row.again:
            problem = f"{error.problem} (and {skipped} malformed rows before it: max_bad_rows)"
            raise RowError(error.source, error.row, error.field, problem) from error
        if pass_over is not None:
            pass_over(error)
        return None


def fitted(item: I, task: Task) -> I | None:
    """An overlong item as the task's policy wants it: cut, or None to drop it."""
    return item.truncated(task.max_length) if task.overlong == "truncate" else None


class _Counting(Generic[R, I]):
    """Tokenises rows in batches, for their number and their tokens alone."""

    def __init__(self, task: Task, preparation: Preparation[R, I]) -> None:
        self._task = task
        self._preparation = preparation
        self._waiting: list[R] = []
        self.examples = 0
        self.tokens = 0
        self.dropped = 0
        self.truncated = 0

    def add(self, rendered: R) -> None:
        self._waiting.append(rendered)
        if len(self._waiting) == COUNTED_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        items = self.fit(self._waiting)
        self._waiting = []
        self.examples += len(items)
        self.tokens += sum(len(item) for item in items)

    def fit(self, rendered: Sequence[R]) -> list[I]:
        """The items of some rows, as the policy for overlong ones leaves them."""
        kept: list[I] = []
        for item in self._preparation.encode(rendered):
            if item.longest <= self._task.max_length:
                kept.append(item)
            elif (fits := fitted(item, self._task)) is not None:
                kept.append(fits)
                self.truncated += 1
            else:
                self.dropped += 1
        return kept


def length_of(task: Task, counted: int, tokens: int) -> tuple[int, int | None]:
    """Steps of a task, and the examples it ends with if it is counted in epochs.

    `counted` are the examples of one epoch, and `tokens` their tokens.

    Raises:
        UnfitTaskError: they end within the warm-up.
    """
    if task.epochs is None:
        assert task.steps is not None
        return task.steps, None
    examples = math.ceil(task.epochs * counted)
    if task.batch_tokens is None:
        steps = math.ceil(examples / task.examples_per_step)
    else:
        steps = math.ceil(task.epochs * tokens / task.batch_tokens)
    if steps <= (warmup := task.optimizer.warmup(steps)):
        raise UnfitTaskError(
            task.name,
            f"{task.epochs} epochs of {counted} examples are {steps} steps, which must be "
            f"greater than optimizer.warmup_steps ({warmup})",
        )
    return steps, examples


def require_validation(task: Task, rows: int, *, of_sweep: bool = False) -> None:
    """Refuses a task that goes by its validation rows and has none.

    Raises:
        NoExamplesError: it does.
    """
    judged = "early_stopping" if task.early_stopping else "a sweep" if of_sweep else None
    if judged and not rows:
        raise NoExamplesError(
            f"task {task.name}: {judged} has no validation rows to go by; raise split.validation"
        )


class _Windows:
    """The windows that rows make up, in their order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows = 0
        self._hash = hashlib.sha256()
        self.complete: list[Window] = []
        self.ended = False

    def add(self, content: bytes) -> None:
        self._rows += 1
        self._hash.update(content)
        if self._rows == self._size:
            self._close()

    def end(self) -> None:
        """No more rows will come."""
        self.ended = True
        if self._rows:
            self._close()

    def _close(self) -> None:
        self.complete.append(Window(self._rows, self._hash.digest()))
        self._rows, self._hash = 0, hashlib.sha256()


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
