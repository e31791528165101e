"""Which examples a step of one task takes. Nothing here depends on the other tasks of a run."""

from dataclasses import dataclass

from manylora_trainer.dataset import random_for


@dataclass(frozen=True)
class Cursor:
    """Where a task stands in its data; part of a checkpoint."""

    epoch: int = 0
    position: int = 0
    """Examples of this epoch already taken."""


class Sampler:
    """Draws batches from shuffled epochs.

    The order of an epoch is a function of seed, task and epoch number, so the cursor is the whole
    state: no generator has to be saved.
    """

    def __init__(self, examples: int, batch_size: int, *, seed: int, task: str) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._task = task
        self.cursor = Cursor()
        self._order = self._shuffled(0)

    def move_to(self, cursor: Cursor) -> None:
        """Goes on from a cursor of an earlier sampler with the same arguments."""
        self.cursor = cursor
        self._order = self._shuffled(cursor.epoch)

    def next_batch(self) -> list[int]:
        """Indices of the next examples; an epoch's end falls anywhere within a batch."""
        batch: list[int] = []
        epoch, position = self.cursor.epoch, self.cursor.position
        while len(batch) < self._batch_size:
            if position == self._examples:
                epoch, position = epoch + 1, 0
                self._order = self._shuffled(epoch)
            taken = self._order[position : position + self._batch_size - len(batch)]
            position += len(taken)
            batch += taken
        self.cursor = Cursor(epoch, position)
        return batch

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self._examples))
        random_for(self._seed, self._task, f"epoch {epoch}").shuffle(order)
        return order
