"""Set-associative translation caches of a vCPU: the TLB proper and the small caches that shorten a page walk.

A TLB entry carries the translation: tag (dense page number + 1), frame, writable, dirty. A hit uses the entry and never
the tables, so a missing shootdown reads a stale frame, as on hardware (architecture 3.1). Replacement is bit-PLRU: one
"recently used" bit a way, cleared but for the newest when all are set; the victim is the first way without the bit.
What is left out until the hardware is deepened: the L1 dTLB in front, 2 MiB entries.
"""

from typing import Any, cast

from numba.cpython.unsafe.numbers import trailing_zeros

from guestd.jit import assume, inline, kernel
from proto.arrays import Words
from proto.entry import FRAME_BITS

_trailing_zeros = cast(Any, trailing_zeros)

TLB_DIRTY = 2
TLB_FRAME_SHIFT = 8
TLB_FRAME_MASK = (1 << FRAME_BITS) - 1
TLB_TAG_SHIFT = TLB_FRAME_SHIFT + FRAME_BITS
WALK_WAYS = 4
"""Associativity of the paging-structure caches and the nested TLB."""


@inline
def find(tags: Words, base: int, ways: int, tag: int, shift: int) -> int:
    """The way of the set at ``base`` that holds ``tag``, or -1. Branch-free, so that a hit costs no misprediction."""
    assume(base >= 0)
    hit = -1
    for way in range(ways):
        if (tags[base + way] >> shift) == tag:
            hit = way
    return hit


@inline
def touch(recent: Words, index: int, way: int, ways: int) -> None:
    """Mark a way of set ``index`` as recently used."""
    mask = recent[index] | (1 << way)
    if mask == (1 << ways) - 1:
        mask = 1 << way
    recent[index] = mask


@inline
def victim(recent: Words, index: int) -> int:
    """The way of set ``index`` to be replaced next."""
    return int(_trailing_zeros(~recent[index]))


@inline
def lookup_or_insert(tags: Words, recent: Words, key: int) -> bool:
    """Look ``key`` up in a 4-way cache of tags (int64[entries], recent: int64[entries/4]); insert it on a miss."""
    index = key & (recent.size - 1)
    assume(index >= 0)
    base = index * WALK_WAYS
    way = find(tags, base, WALK_WAYS, key + 1, 0)
    hit = way >= 0
    if not hit:
        way = victim(recent, index)
        tags[base + way] = key + 1
    touch(recent, index, way, WALK_WAYS)
    return hit


@kernel
def drop_page(tlb: Words, sets: int, ways: int, page: int) -> int:
    """Drop ``page`` from every vCPU's TLB (tlb: int64[vcpus, sets*ways]); returns how many held it."""
    dropped = 0
    base = (page & (sets - 1)) * ways
    for vcpu in range(tlb.shape[0]):
        way = find(tlb[vcpu], base, ways, page + 1, TLB_TAG_SHIFT)
        if way >= 0:
            tlb[vcpu, base + way] = 0
            dropped += 1
    return dropped
