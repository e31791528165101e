"""One task's stream of examples: shuffled, tokenised ahead, and exact to resume.

The rows of a source are read in windows of `shuffle_buffer` training rows, and each window is
shuffled as a whole by a generator that is a function of seed, task, epoch and window number. So
the state is where the window begins in its source and how much of it was taken: no buffer and no
generator has to be saved, and a resume reads one window again. A source that fits in one window is
read once and shuffled anew in every epoch. Nothing here depends on the other tasks of a run.
"""

import hashlib
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic

from manylora_trainer.dataset import (
    TaskData,
    content_digest,
    fitted,
    part_of,
    random_for,
    rendered_or_skipped,
)
from manylora_trainer.errors import NoExamplesError, SourceError
from manylora_trainer.items import I, R
from manylora_trainer.recipe import Task
from manylora_trainer.sources import Place, Row

WORKERS = 2
"""Threads that prepare batches, for all tasks of a run together."""
ENCODED_AT_ONCE = 64
"""Rows tokenised in one call: enough for the tokenizer to use several threads."""


@dataclass(frozen=True)
class Cursor:
    """Where a task stands in its data; part of a checkpoint, as JSON."""

    epoch: int = 0
    window: int = 0
    """Number of the window in its epoch."""
    place: Place | None = None
    """Where the window begins in the source; None: at its beginning."""
    position: int = 0
    """Rows of the window already drawn."""
    skipped: int = 0
    """Malformed rows passed over in the windows before this one of the epoch."""
    batches: int = 0
    """Taken so far, over all epochs, as are those below."""
    examples: int = 0
    tokens: int = 0
    overlong_dropped: int = 0
    overlong_truncated: int = 0

    def dropping(self) -> "Cursor":
        """Behind an example that is left out."""
        return replace(self, position=self.position + 1, overlong_dropped=self.overlong_dropped + 1)

    def taking(self, tokens: int, *, truncated: bool) -> "Cursor":
        """Behind an example that is taken."""
        return replace(
            self,
            position=self.position + 1,
            examples=self.examples + 1,
            tokens=self.tokens + tokens,
            overlong_truncated=self.overlong_truncated + truncated,
        )


@dataclass
class _Window(Generic[R, I]):
    """Some training rows of a source, in the order they are drawn in."""

    rows: list[R]
    after: Place | None
    """Where the next window begins; None when the source ends here."""
    skipped: int
    order: list[int] = field(default_factory=list[int])
    items: dict[int, I] = field(default_factory=dict[int, I])
    """Those tokenised so far, by their number in `rows`."""


class ExampleStream(Generic[R, I]):
    """Draws the batches of one task."""

    def __init__(self, task: Task, data: TaskData[R, I], *, seed: int) -> None:
        self._task = task
        self._data = data
        self._seed = seed
        self.workers: ThreadPoolExecutor | None = None
        """Set by `prepared_ahead`; without it batches are drawn when they are asked for."""
        self._ahead: Future[tuple[list[I], Cursor]] | None = None
        self.abandoned = threading.Event()
        # What follows is touched by the one job in flight only.
        self._reading: tuple[Place | None, Iterator[Row]] | None = None
        self._drawing: tuple[tuple[int, int], _Window[R, I]] | None = None
        self.cursor = Cursor()

    def move_to(self, cursor: Cursor) -> None:
        """Goes on from a cursor of an earlier stream with the same arguments."""
        self.cursor = cursor

    def prepare(self) -> Future[tuple[list[I], Cursor]] | None:
        """Begins with the next batch, outside of this thread: its items, the cursor behind it.

        None where there is no next one, or no other thread.
        """
        more = self.cursor.batches < self._data.steps
        if self._ahead is None and more and self.workers is not None:
            self._ahead = self.workers.submit(self._draw, self.cursor)
        return self._ahead

    def next_batch(self) -> list[I]:
        """The items of the next step; an epoch's end falls anywhere within a batch.

        Raises:
            RowError, SourceError: the source fails; the cursor stays where it was.
            NoExamplesError: nothing in it fits.
        """
        ahead, self._ahead = self._ahead, None
        items, self.cursor = self._draw(self.cursor) if ahead is None else ahead.result()
        return items

    def _draw(self, cursor: Cursor) -> tuple[list[I], Cursor]:
        """The batch that follows a cursor, and the cursor behind it."""
        items: list[I] = []
        fruitless = 0
        while not self._ends_before_next_row(items, cursor):
            window = self._window(cursor)
            # Rows behind those looked through may have gone since a checkpoint.
            if cursor.position >= len(window.rows):
                if window.after is None:
                    fruitless = 0 if items else fruitless + 1
                    if fruitless > 1:
                        raise self._nothing_fits()
                cursor = _behind(window, cursor)
                continue
            item = self._item(window, cursor.position)
            truncated = item.longest > self._task.max_length
            if truncated:
                fits = fitted(item, self._task)
                if fits is None:
                    cursor = cursor.dropping()
                    continue
                item = fits
            if items and self._is_too_much(cursor.tokens + len(item), cursor):
                break
            items.append(item)
            cursor = cursor.taking(len(item), truncated=truncated)
        return items, replace(cursor, batches=cursor.batches + 1)

    def _ends_before_next_row(self, items: list[I], cursor: Cursor) -> bool:
        if not items:
            return False
        if cursor.examples == self._data.examples:
            return True
        return self._task.batch_tokens is None and len(items) == self._task.examples_per_step

    def _is_too_much(self, tokens: int, cursor: Cursor) -> bool:
        """Whether an example that ends at `tokens` belongs to a later batch.

        Batch k holds the examples that end within its share of the whole stream of tokens. So
        batches have `batch_tokens` on average whatever the lengths are, and the number of steps
        that some epochs take is known before they are shuffled.
        """
        share = self._task.batch_tokens
        return share is not None and tokens > share * (cursor.batches + 1)

    def _window(self, cursor: Cursor) -> _Window[R, I]:
        """The window that a cursor stands in, read unless it is at hand."""
        wanted = (cursor.epoch, cursor.window)
        (_, number), window = drawing = self._drawing or ((0, 0), None)
        if window is not None and drawing[0] == wanted:
            return window
        holds_all = window is not None and number == 0 and window.after is None
        if window is None or not holds_all:
            # Before the next one is read: two are never held.
            self._drawing = window = drawing = None
            window = self._read(cursor)
        window.order = list(range(len(window.rows)))
        purpose = f"epoch {cursor.epoch} window {cursor.window}"
        random_for(self._seed, self._task.seed_name, purpose).shuffle(window.order)
        self._drawing = (wanted, window)
        return window

    def _read(self, cursor: Cursor) -> _Window[R, I]:
        """Reads the window that a cursor stands in."""
        place, known = cursor.place, self._data.windows
        looked_through = known[cursor.window] if cursor.window < len(known) else None
        size = looked_through.rows if looked_through else self._task.shuffle_buffer
        # What was added to the source meanwhile is of another run.
        is_last = self._data.whole and cursor.window == len(known) - 1
        at, rows = self._reading or (None, None)
        if rows is None or place is None or at != place:
            rows = self._data.source.rows(place)
        self._reading = None
        window = _Window[R, I]([], None, 0)
        digest = hashlib.sha256()
        for row in rows:
            if self.abandoned.is_set():
                raise CancelledError
            rendered = rendered_or_skipped(
                self._task, self._data.preparation, row, cursor.skipped + window.skipped
            )
            if rendered is None:
                window.skipped += not row.again
            elif part_of(rendered, self._task.split)[0] == "train":
                window.rows.append(rendered)
                digest.update(content_digest(rendered))
                if len(window.rows) == size:
                    if not is_last:
                        window.after = row.after
                        self._reading = (row.after, rows)
                    break
        if looked_through and looked_through.digest != digest.digest():
            raise SourceError(
                f"task {self._task.name}: {self._data.source.name} gives other rows than when this "
                "run looked through them; put those back, or begin a new run over rows that stay "
                "as they are"
            )
        return window

    def _item(self, window: _Window[R, I], position: int) -> I:
        """The item at a position of the drawing order, tokenised together with those behind it."""
        number = window.order[position]
        if number not in window.items:
            numbers = [
                n
                for n in window.order[position : position + ENCODED_AT_ONCE]
                if n not in window.items
            ]
            encoded = self._data.preparation.encode([window.rows[n] for n in numbers])
            window.items.update(zip(numbers, encoded, strict=True))
        return window.items[number]

    def _nothing_fits(self) -> NoExamplesError:
        return NoExamplesError(
            f"task {self._task.name}: no row of {self._data.source.name} is left to train on; all "
            f"are longer than max_length {self._task.max_length}, held out, or malformed. Raise "
            "max_length, or cut them by overlong: truncate, in a new run"
        )


def _behind(window: _Window[R, I], cursor: Cursor) -> Cursor:
    """The beginning of the next window, or of the next epoch."""
    if window.after is None:
        return replace(cursor, epoch=cursor.epoch + 1, window=0, place=None, position=0, skipped=0)
    return replace(
        cursor,
        window=cursor.window + 1,
        place=window.after,
        position=0,
        skipped=cursor.skipped + window.skipped,
    )


@contextmanager
def prepared_ahead(streams: Sequence[ExampleStream[R, I]]) -> Generator[None]:
    """Inside the block `prepare` reads and tokenises a batch while the one before it trains.

    Threads and not processes: the tokenizer, where 70 % of the time goes, works outside of Python's
    lock, as training does, and nothing has to be copied. What fails in a thread is raised by
    `next_batch`. Leaving the block gives up what was not asked for yet.
    """
    workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="stream")
    for stream in streams:
        stream.workers = workers
    try:
        yield
    finally:
        for stream in streams:
            stream.abandoned.set()
        workers.shutdown(wait=True, cancel_futures=True)
