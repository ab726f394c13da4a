"""What of a VM's data the last-level cache holds.

A socket's LLC is shared by all its VMs, and at each barrier the host says how much of it a VM has, by vCPUs
(hostd/core.py). Page-table lines come first in that share, being a VM's most popular ones; data has the rest
(`guestd.walk.price_walks`). Which accesses hit is decided where they are generated (`proto.trace.LLC_HIT`). A synthetic
workload hits with the probability that a line of its class is among the hottest that fit (`hit_cuts`): what LRU has
under uniform accesses, and an upper bound of it under skewed ones. A replay goes through a real set-associative LRU
cache (`LlcFilter`). Left out: the first misses of a synthetic workload, write-backs of lines that hits made dirty (a write
that misses pays its own at once), prefetchers, and bursts by which VMs evict each other within a quantum.
"""

import numpy as np

from guestd.jit import inline, kernel
from proto.arrays import Bytes, Words
from proto.trace import LLC_HIT
from proto.units import LINE_SIZE

WAYS = 16
"""Associativity of every modelled data cache; Ice Lake's LLC has 12 to 16."""
HIT_BITS = 24
"""Probabilities of a hit are whole multiples of 2**-24."""
RESIZE_SHARE = 16
"""A filter follows its share in steps of a sixteenth (one way), so that not each page fault rebuilds it."""
LINE_SHIFT = LINE_SIZE.bit_length() - 1

_MIX = np.uint64(0x9E3779B97F4A7C15)
_32, _COIN_SHIFT = np.uint64(32), np.uint64(64 - HIT_BITS)


def hit_cuts(share_bytes: int, before: Words, lines: Words) -> Words:
    """Thresholds for `draws_hit` (int64[classes]) of classes of equally hot lines that fill the cache in order.

    ``lines``: int64[classes], lines of each class, at least 1; ``before``: int64[classes], lines that are hotter.
    """
    fit = np.clip(share_bytes // LINE_SIZE - before, 0, lines)
    return np.asarray((fit << HIT_BITS) // lines, np.int64)


@inline
def draws_hit(r: np.uint64, cut: int) -> bool:
    """Does the access that was made of the random number ``r`` hit? True with the probability cut / 2**24.

    The product's upper bits depend on all bits of ``r``, of which an address and its class leave some 30 undecided, so
    the draw is independent of both.
    """
    return bool(np.int64((r * _MIX) >> _COIN_SHIFT) < cut)


@inline
def use_line(row: Words, line: int) -> bool:
    """Reference ``line`` in its set (int64[WAYS], most recently used first, -1 = empty); did it hit?"""
    way = 0
    while way < row.size - 1 and row[way] != line:
        way += 1
    hit = row[way] == line
    while way > 0:
        row[way] = row[way - 1]
        way -= 1
    row[0] = line
    return bool(hit)


@inline
def _set_of(line: int, sets: int) -> int:
    # Hashed, as the slices of an LLC are, and so good for any number of sets.
    return int((np.int64((np.uint64(line) * _MIX) >> _32) * sets) >> 32)


@kernel
def _mark(tags: Words, address: Words, kind: Bytes) -> None:
    sets = tags.shape[0]
    for i in range(address.size):
        line = address[i] >> LINE_SHIFT
        if use_line(tags[_set_of(line, sets)], line):
            kind[i] |= LLC_HIT


@kernel
def _move(old: Words, new: Words) -> None:
    """Fill ``new`` with the lines of ``old``, the least recently used of each set first."""
    sets = new.shape[0]
    for back in range(old.shape[1]):
        way = old.shape[1] - 1 - back
        for index in range(old.shape[0]):
            line = old[index, way]
            if line >= 0:
                use_line(new[_set_of(line, sets)], line)


class LlcFilter:
    """One VM's part of the LLC, reference by reference: write-allocate, LRU in hashed sets of 16 lines."""

    def __init__(self) -> None:
        self._tags = np.full((0, WAYS), -1, np.int64)

    @property
    def size_bytes(self) -> int:
        """What it holds now."""
        return self._tags.size * LINE_SIZE

    def resize(self, share_bytes: int) -> None:
        """Hold about ``share_bytes`` from now on; what is in the cache stays there as far as it fits."""
        sets = share_bytes // (WAYS * LINE_SIZE)
        now = self._tags.shape[0]
        if sets == now or (sets and abs(sets - now) * RESIZE_SHARE < now):
            return
        tags = np.full((sets, WAYS), -1, np.int64)
        if sets and now:
            _move(self._tags, tags)
        self._tags = tags

    def mark(self, address: Words, kind: Bytes) -> None:
        """Reference the lines of ``address`` (int64[n], bytes) in order, and flag the ``kind`` (uint8[n]) of hits."""
        if self._tags.size:
            _mark(self._tags, address, kind)
