"""What `btree` and `silo` share: a program that loads records under a B+ tree, and then searches it for keys.

A search descends the stored tree (guestd/workloads/bptree.py). The lines that it touches in a node follow from the
number of keys there and the slot where it ends, since a binary search with that outcome compares at the same places.
"""

from abc import abstractmethod

import numpy as np

from guestd.jit import inline, int64, kernel, prefetch
from guestd.random import streams
from guestd.workloads.base import BuiltWorkload
from guestd.workloads.bptree import (
    BATCH,
    EMPTY,
    HEIGHT,
    INNERS,
    KEYS,
    LEAVES,
    MAX_HEIGHT,
    ROOT,
    Touch,
    Tree,
    count_up_to,
    insert,
    step_of,
)
from guestd.workloads.scramble import Scrambler, scramble
from proto.arrays import Words
from proto.config import GuestConfig
from proto.units import PAGE_SHIFT, PAGE_SIZE

STEP_ACCESSES = 10
"""Most accesses of a step: header, 8 compared keys, pointer."""
SEARCH_ACCESSES = (MAX_HEIGHT + 1) * STEP_ACCESSES
_LINE_SHIFT = 6
NEXT, DRAWN, OPERATIONS = 0, 1, 2
"""Fields of a vCPU's state: the next operation of the batch, how many it has; operations drawn so far."""


@kernel
def _load(tree: Tree, names: Scrambler, shuffled: bool, count: int, pages: int, touch: Touch, record_bytes: int,
         paths: Words) -> bool:  # fmt: skip
    """Insert keys until ``pages`` first touches are known; returns whether no more will be inserted.

    The i-th of ``count`` keys is i, or where ``names`` sends i if the program shuffled them. It ends before the last
    one if the tree might need more nodes than there is room for.
    """
    keys = paths[BATCH + 2]
    state = tree.state
    while touch.known[0] < pages:
        first = state[KEYS]
        room = (tree.nodes - state[LEAVES] - state[INNERS]) // (state[HEIGHT] + 2)
        batch = min(BATCH, count - first, room)
        if batch <= 0:
            return True
        for i in range(batch):
            keys[i] = scramble(names, first + i) if shuffled else first + i
        insert(tree, keys[:batch], touch, record_bytes, paths)
    return False


@inline
def emit_step(tree: Tree, step: int, leaf: bool, address: Words, at: int) -> int:
    """Write what a step of a search touches behind ``address[:at]``; returns the new end.

    Header, the keys that a binary search compares, the pointer; a line that was touched just before is not repeated.
    """
    slot = step & 0xFF
    node = tree.base + (step >> 16) * tree.node_bytes
    address[at] = node
    low, high = 0, (step >> 8) & 0xFF
    while low < high:
        middle = (low + high) >> 1
        key = node + tree.keys_at + 8 * middle
        if key >> _LINE_SHIFT != address[at] >> _LINE_SHIFT:
            at += 1
            address[at] = key
        if middle < slot:
            low = middle + 1
        else:
            high = middle
    pointer = node + tree.pointers_at + 8 * (slot - 1 if leaf else slot)
    if pointer >> _LINE_SHIFT != address[at] >> _LINE_SHIFT:
        at += 1
        address[at] = pointer
    return at + 1


@inline
def heat_step(tree: Tree, step: int, leaf: bool, weight: int, heat: Words, scratch: Words) -> None:
    """Add ``weight`` to the pages of all that a step touches. ``scratch``: int64[STEP_ACCESSES]."""
    for i in range(emit_step(tree, step, leaf, scratch, 0)):
        heat[scratch[i] >> PAGE_SHIFT] += weight


@kernel
def _heat_inner(tree: Tree, leaf_weight: Words, heat: Words, scratch: Words) -> None:
    """Add to ``heat`` (int64[pages]) what searches touch above the leaves.

    ``leaf_weight``: int64[leaves], how often a leaf is searched. ``scratch``: int64[3 * MAX_HEIGHT + STEP_ACCESSES].
    """
    height, order = tree.state[HEIGHT], tree.order
    width = order - 1
    inners, slots, weights = scratch[:MAX_HEIGHT], scratch[MAX_HEIGHT:], scratch[2 * MAX_HEIGHT :]
    lines = scratch[3 * MAX_HEIGHT :]
    level = 0
    inners[0], slots[0], weights[0] = tree.state[ROOT], 0, 0
    while level >= 0 and height > 0:
        row = inners[level] * 2 * order
        count = count_up_to(tree.inners, row, width, EMPTY - 1)
        weight = int64(-1)
        if slots[level] > count:
            weight = weights[level]
            level -= 1
        else:
            child = int64(tree.inners[row + order + slots[level]])
            if level + 1 == height:
                weight = leaf_weight[child]
            else:
                level += 1
                inners[level], slots[level], weights[level] = child, 0, 0
                # The node's children are what comes next; their cache misses can overlap.
                for i in range(order):
                    ahead = int64(tree.inners[child * 2 * order + order + i])
                    if level + 1 == height:
                        prefetch(leaf_weight, ahead)
                    else:
                        prefetch(tree.inners, ahead * 2 * order)
        if weight >= 0 and level >= 0:
            row = inners[level] * 2 * order
            step = step_of(tree.inners, row, width, slots[level])
            heat_step(tree, step, False, weight, heat, lines)
            weights[level] += weight
            slots[level] += 1


class Indexed(BuiltWorkload):
    """``count`` records of ``record_bytes`` from ``records`` (dense byte address) on, and ``tree`` above them.

    ``filled``: dense pages that the program fills before it loads. ``names``: how it shuffled the keys, if it did.
    """

    def __init__(self, config: GuestConfig, tree: Tree, records: int, record_bytes: int, count: int,
                 names: Scrambler, shuffled: bool, filled: Words) -> None:  # fmt: skip
        super().__init__()
        self.tree, self.records, self.record_bytes, self.count = tree, records, record_bytes, count
        self.names, self.shuffled = names, shuffled
        bytes_ = (tree.nodes * tree.node_bytes, count * record_bytes)
        self.first_touch = np.zeros(filled.size + sum(-(-size // PAGE_SIZE) for size in bytes_), np.int32)
        self.first_touch[: filled.size] = filled
        first = np.array([tree.base >> PAGE_SHIFT, records >> PAGE_SHIFT], np.int64)
        self._touch = Touch(self.first_touch, np.array([filled.size], np.int64), first, np.zeros(2, np.int64))
        self._loaded = False
        self._scratch = np.zeros((BATCH + 3, MAX_HEIGHT + 2), np.int64)
        self.rng = streams(config.seed, config.vcpus)
        self.state = np.zeros((config.vcpus, 3), np.int64)
        self.paths = np.zeros((config.vcpus, BATCH + 1, MAX_HEIGHT + 2), np.int64)
        """For each vCPU the steps of a batch of searches, and in the last row their keys."""

    def build(self, pages: int) -> int:
        """Load until so many pages are touched."""
        if not self._loaded:
            self._loaded = bool(_load(self.tree, self.names, self.shuffled, self.count, pages, self._touch,
                                      self.record_bytes, self._scratch))  # fmt: skip
        return min(pages, int(self._touch.known[0]))

    @abstractmethod
    def leaf_heat(self, weight: Words, heat: Words, scratch: Words) -> None:
        """Add to ``heat`` (int64[pages]) what searches touch in leaves and below.

        ``weight``: int64[leaves], to be filled with how often each leaf is searched; ``scratch``: int64[STEP_ACCESSES].
        """

    def tree_heat(self) -> Words:
        """All that searches touch: int64[pages]."""
        self.finish()
        heat = np.zeros(self.space.pages, np.int64)
        weight = np.zeros(int(self.tree.state[LEAVES]), np.int64)
        scratch = np.zeros(3 * MAX_HEIGHT + STEP_ACCESSES, np.int64)
        self.leaf_heat(weight, heat, scratch)
        _heat_inner(self.tree, weight, heat, scratch)
        return heat
