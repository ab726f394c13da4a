"""The range tree over gVA: hot regions found by splitting ranges that stand out from their neighbours.

The seed's classifier (Demeter, SOSP'25, 3.2.1; released code: mm/demeter/range_tree.h). Leaves partition the
heap and the mmap region; samples count into leaves; every epoch all counts are halved, and a leaf that is significantly
hotter than its neighbours is split into equal halves, each inheriting half the count, down to 2 MiB.
"""

import numpy as np

from guestd.meter import metered
from proto.arrays import Words

START, END, COUNT, CREATED, ACCESSED = 0, 1, 2, 3, 4
"""Rows of the leaf table; ages in epochs."""

CAPACITY = 2048
"""Leaf cap of the released code."""


@metered
def _record(leaves: Words, used: int, gvas: Words, epoch: int) -> int:
    counted = 0
    for gva in gvas:
        low, high = 0, used
        while low < high:
            middle = (low + high) >> 1
            if leaves[START, middle] <= gva:
                low = middle + 1
            else:
                high = middle
        leaf = low - 1
        if leaf >= 0 and gva < leaves[END, leaf]:
            leaves[COUNT, leaf] += 1
            leaves[ACCESSED, leaf] = epoch
            counted += 1
    return counted


@metered
def _split(leaves: Words, used: int, capacity: int, floor: int, margin: int, eligible: int, both: bool,
           epoch: int) -> int:  # fmt: skip
    """One left-to-right pass; returns the new number of leaves. A right half is not looked at before the next pass."""
    i = 0
    while i < used:
        start, end, count = leaves[START, i], leaves[END, i], leaves[COUNT, i]
        hotter = compared = 0
        if i > 0:
            compared += 1
            hotter += 1 if count > leaves[COUNT, i - 1] + margin else 0
        if i + 1 < used:
            compared += 1
            hotter += 1 if count > leaves[COUNT, i + 1] + margin else 0
        stands_out = hotter == compared if both else hotter > 0 or compared == 0
        if stands_out and count >= eligible and end - start >= 2 * floor and used < capacity:
            for row in range(leaves.shape[0]):
                for j in range(used, i + 1, -1):
                    leaves[row, j] = leaves[row, j - 1]
            middle = start + ((end - start) // 2) // floor * floor
            leaves[END, i] = middle
            leaves[START, i + 1], leaves[END, i + 1] = middle, end
            leaves[COUNT, i] = count - count // 2
            leaves[COUNT, i + 1] = count // 2
            leaves[CREATED, i] = leaves[CREATED, i + 1] = epoch
            leaves[ACCESSED, i + 1] = leaves[ACCESSED, i]
            used += 1
            i += 1
        i += 1
    return used


@metered
def _merge(leaves: Words, used: int, idle: int, epoch: int, roots: Words) -> int:
    """Join neighbours that have both counted nothing for ``idle`` epochs, never across ``roots`` (int64[r] starts)."""
    kept = 0
    for i in range(used):
        joined = False
        if kept > 0:
            j = kept - 1
            at_root = False
            for root in roots:
                if root == leaves[START, i]:
                    at_root = True
            old = epoch - max(leaves[ACCESSED, i], leaves[ACCESSED, j]) >= idle
            if old and not at_root and leaves[COUNT, i] == 0 and leaves[COUNT, j] == 0:
                leaves[END, j] = leaves[END, i]
                joined = True
        if not joined:
            for row in range(leaves.shape[0]):
                leaves[row, kept] = leaves[row, i]
            kept += 1
    return kept


class RangeTree:
    """Leaves as columns of an int64[5, CAPACITY] table in order of address.

    ``roots``: the initial ranges as (start, end) gVA; ``floor``: smallest range in bytes.
    """

    def __init__(self, roots: list[tuple[int, int]], floor: int, book: Words) -> None:
        self._book = book
        self._floor = floor
        self._leaves = np.zeros((5, CAPACITY), np.int64)
        self.used = len(roots)
        for i, (start, end) in enumerate(sorted(roots)):
            self._leaves[:, i] = (start, end, 0, 0, 0)
        self._roots = self._leaves[START, : self.used].copy()
        self.epoch = 0

    @property
    def leaves(self) -> Words:
        """int64[5, used]: start, end, count, created, last access (view)."""
        return self._leaves[:, : self.used]

    def record(self, gvas: Words) -> int:
        """Count samples (int64[n]) into their leaves; returns how many lay in a range."""
        return int(_record(self._book, self._leaves, self.used, gvas, self.epoch))

    def advance(self, margin: int, eligible: int, *, both_neighbours: bool, decay: bool, merge_after: int) -> int:
        """End an epoch: halve the counts, split, merge (0 = never); returns the number of splits."""
        self.epoch += 1
        if decay:
            self.leaves[COUNT] >>= 1
        before = self.used
        self.used = int(_split(self._book, self._leaves, self.used, CAPACITY, self._floor, margin, eligible,
                               both_neighbours, self.epoch))  # fmt: skip
        splits = self.used - before
        if merge_after:
            self.used = int(_merge(self._book, self._leaves, self.used, merge_after, self.epoch, self._roots))
        return splits

    def ranking(self) -> Words:
        """Leaf numbers, hottest first: count per size, ties by newer creation (int64[used])."""
        leaves = self.leaves
        frequency = leaves[COUNT] * (1 << 20) // np.maximum(1, (leaves[END] - leaves[START]) >> 21)
        return np.lexsort((-leaves[CREATED], -frequency))
