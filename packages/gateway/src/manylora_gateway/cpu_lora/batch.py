"""A batch's rows, sorted by how they are best multiplied with their slots' weights."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

NO_SLOT = -1
"""vLLM's slot for rows without an adapter."""

MANY_ROWS = 32
"""Rows of one slot from which a matrix product of their own outdoes the kernel for few rows."""


class Batch:
    """The slot of each row of a batch, and ways to go through the rows that have one.

    `many` and `few` together hold each such row once.
    """

    def __init__(self, row_slots: Sequence[int], slots: int) -> None:
        """Sorts the rows.

        Args:
            row_slots: the slot of each row, or `NO_SLOT`.
            slots: how many there are.
        """
        self.size = len(row_slots)
        self.many: list[tuple[int, slice | Tensor]] = []
        """A slot and rows of it: consecutive ones, or an index of scattered ones."""
        few: list[list[int]] = [[] for _ in range(slots)]
        start = 0
        for slot, run in groupby(row_slots):
            stop = start + len(list(run))
            if slot != NO_SLOT:
                if stop - start >= MANY_ROWS:
                    self.many.append((slot, slice(start, stop)))
                else:
                    few[slot] += range(start, stop)
            start = stop
        for slot, rows in enumerate(few):
            if len(rows) >= MANY_ROWS:
                self.many.append((slot, torch.tensor(rows)))
                rows.clear()
        self.few = torch.tensor([row for rows in few for row in rows], dtype=torch.int64)
        """The other rows, by slot: int64 [rows]."""
        self.few_starts = torch.tensor([*accumulate(map(len, few), initial=0)])
        """Where each slot begins in `few`, and where the last ends: int64 [slots + 1]."""
        self.has_few = self.few.numel() > 0
        self.bare = not self.many and not self.has_few
        """Whether no row has a slot."""
        self._row_slots = torch.tensor(row_slots, dtype=torch.int64)

    @cached_property
    def slots(self) -> list[tuple[int, Tensor]]:
        """Each slot in use with the index of all its rows, int64."""
        return [
            (slot, self._row_slots.eq(slot).nonzero().squeeze(1))
            for slot in sorted(set(map(int, self._row_slots)) - {NO_SLOT})
        ]
