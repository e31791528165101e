"""The packs of a step, made while the step before it computes.

Dividing a large step's examples into packs takes tens of milliseconds of Python. A GPU would wait
for them between any two steps.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from manylora_trainer.packing import Batch, Pack, pack_batches
from manylora_trainer.sampling import Cursor, ExampleStream, prepared_ahead

Stream = ExampleStream[Any, Any]
Drawn = list[tuple[int, Cursor]]
"""Adapters with a batch in a step, by number, and where their streams stand behind it."""


class Packer:
    """Packs the batches of a run's streams, one step ahead where it is known who takes part."""

    def __init__(self, streams: Sequence[Stream], pack_tokens: int, multiple: int) -> None:
        """`streams` by the number of their adapter; for the others see `pack_batches`."""
        self._streams = streams
        self._pack_tokens = pack_tokens
        self._multiple = multiple
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: Future[tuple[Drawn, list[Pack]]] | None = None

    @contextmanager
    def prepared_ahead(self) -> Generator[None]:
        """Inside the block `prepare` reads, tokenises and packs a step during the one before."""
        with (
            ThreadPoolExecutor(1, thread_name_prefix="packs") as worker,
            prepared_ahead(self._streams),
        ):
            self._worker = worker
            try:
                yield
            finally:
                self._worker = self._ahead = None

    def packs(self, batches: Sequence[Batch]) -> list[Pack]:
        """The packs of these batches, which their streams have just given."""
        drawn = [(batch.adapter, self._streams[batch.adapter].cursor) for batch in batches]
        ahead, self._ahead = self._ahead, None
        # What fails in a stream is raised where its batch is asked for.
        if ahead is not None and ahead.exception() is None and ahead.result()[0] == drawn:
            return ahead.result()[1]
        return pack_batches(batches, self._pack_tokens, self._multiple)

    def prepare(self, adapters: Sequence[int]) -> None:
        """Begins with the step after this one, in which these adapters may take part."""
        if self._worker is not None and self._ahead is None:
            upcoming = [(index, self._streams[index].prepare()) for index in adapters]
            self._ahead = self._worker.submit(self._pack, upcoming)

    def _pack(
        self, upcoming: Sequence[tuple[int, Future[tuple[list[Any], Cursor]] | None]]
    ) -> tuple[Drawn, list[Pack]]:
        drawn: Drawn = []
        batches: list[Batch] = []
        for index, batch in upcoming:
            if batch is not None:
                items, cursor = batch.result()
                drawn.append((index, cursor))
                batches.append(Batch.of(index, items))
        return drawn, pack_batches(batches, self._pack_tokens, self._multiple)
