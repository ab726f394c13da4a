"""The TLBs of a vCPU: L1 dTLBs for 4 KiB and for 2 MiB pages, and one STLB for both sizes behind them.

An entry carries the translation (frame, dirty), and a hit uses it and never the tables, so a missing shootdown reads a
stale frame, as on hardware (architecture 3.1). A tag is page number + 1, page size and *context*: the vCPU's number for
the EPTP, VPID and PCID under which the entry was filled (`guestd.instructions`); a look-up only hits entries of the
current context. Sets lie in arrays of int32 padded to eight lanes, which one vector comparison searches. Replacement is
bit-PLRU: one "recently used" bit a way, cleared but for the newest when all are set; the victim is the first way
without the bit. A fill from a walk goes to both levels, a hit in the STLB to the L1; neither level includes the other.
Left out: the separate store L1 dTLB (16 entries) and 1 GiB pages.
"""

from typing import NamedTuple

from guestd.jit import assume, inline, int32, int64, kernel, match8, match16, trailing_zeros
from proto.arrays import Ints, Words
from proto.costs import Costs
from proto.entry import FRAME_BITS
from proto.units import TABLE_PAGES

LANES = 8
L1_LANES = 4
CONTEXT_BITS = 4
CONTEXT_MASK = (1 << CONTEXT_BITS) - 1
SIZE_2M = 1 << 27
"""Added to the page number of a tag: an entry of 2 MiB, numbered by leaf table."""

TLB_DIRTY = 1
TLB_FRAME_SHIFT = 4
TLB_FRAME_MASK = (1 << FRAME_BITS) - 1
MISS = -1
ENTRY_MASK = (1 << 32) - 1


class TlbGeometry(NamedTuple):
    """Sets - 1, padded ways of a set, and the bits of all its ways, for each array."""

    l1_mask: int
    l1_stride: int
    l1_ways: int
    l1_2m_mask: int
    l1_2m_stride: int
    l1_2m_ways: int
    stlb_mask: int
    stlb_stride: int
    stlb_ways: int
    stlb_ways_2m: int
    """The bits of those ways that a 2 MiB entry may take."""


def tlb_geometry(costs: Costs) -> TlbGeometry:
    """Geometry from a host profile, which was checked to give powers of two of sets."""

    def array(entries: int, ways: int, lanes: int) -> tuple[int, int, int]:
        return entries // ways - 1, -(-ways // lanes) * lanes, (1 << ways) - 1

    return TlbGeometry(
        *array(costs.l1_dtlb_4k_entries, costs.l1_dtlb_4k_ways, L1_LANES),
        *array(costs.l1_dtlb_2m_entries, costs.l1_dtlb_2m_ways, L1_LANES),
        *array(costs.stlb_entries, costs.stlb_ways, LANES),
        stlb_ways_2m=(1 << costs.stlb_2m_ways) - 1,
    )


class Tlb(NamedTuple):
    """The arrays of one vCPU. ``*_tag``, ``*_data``: int32[sets * stride]; ``*_recent``: int64[sets]."""

    l1_tag: Ints
    l1_data: Ints
    l1_recent: Words
    l1_2m_tag: Ints
    l1_2m_data: Ints
    l1_2m_recent: Words
    stlb_tag: Ints
    stlb_data: Ints
    stlb_recent: Words


@inline
def tag_4k(page: int, context: int) -> int:
    """Tag of a 4 KiB page (its low 32 bits count)."""
    return ((page + 1) << CONTEXT_BITS) | context


@inline
def tag_2m(table: int, context: int) -> int:
    """Tag of a 2 MiB page, the region of leaf table ``table``."""
    return ((SIZE_2M + table + 1) << CONTEXT_BITS) | context


@inline
def find(tags: Ints, base: int, stride: int, key: int) -> int:
    """The slot of the set at ``base`` of an STLB that holds ``key``, or MISS."""
    assume(base >= 0)
    slot = MISS
    if stride == 2 * LANES:
        hit = match16(tags, base, key)
        if hit != 0:
            slot = base + trailing_zeros(hit)
    else:
        for lane in range(0, stride, LANES):
            hit = match8(tags, base + lane, key)
            if hit != 0:
                slot = base + lane + trailing_zeros(hit)
    return slot


@inline
def find_in_l1(tags: Ints, base: int, stride: int, key: int) -> int:
    """The same for an L1, whose few sets are written all the time: it loads tags one by one (`guestd.jit.match8`)."""
    assume(base >= 0)
    slot = MISS
    for lane in range(base, base + stride, L1_LANES):
        assume(lane >= 0)
        if tags[lane] == key:
            slot = lane
        if tags[lane + 1] == key:
            slot = lane + 1
        if tags[lane + 2] == key:
            slot = lane + 2
        if tags[lane + 3] == key:
            slot = lane + 3
    return slot


@inline
def touch(recent: Words, index: int, way: int, ways: int) -> None:
    """Mark a way of set ``index`` as recently used; ``ways``: the bits of all of them."""
    assume(index >= 0)
    mask = recent[index] | (1 << way)
    recent[index] = (1 << way) if mask == ways else mask


@inline
def victim(recent: Words, index: int, ways: int) -> int:
    """The way of set ``index``, among the bits ``ways``, to be replaced next; if all are recent, they start anew."""
    assume(index >= 0)
    free = ~recent[index] & ways
    if free == 0:
        recent[index] &= ~ways
        free = ways
    return int(trailing_zeros(free))


@inline
def enter(tags: Ints, data: Ints, recent: Words, index: int, stride: int, ways: int, allowed: int, key: int,
          entry: int) -> None:  # fmt: skip
    """Enter a translation that set ``index`` does not hold, over the victim among the ``allowed`` ways."""
    way = victim(recent, index, allowed)
    slot = index * stride + way
    assume(slot >= 0)
    tags[slot] = key
    data[slot] = entry
    touch(recent, index, way, ways)


@inline
def _look_up(tlb: Tlb, geometry: TlbGeometry, tags: Ints, data: Ints, recent: Words, mask: int, stride: int, ways: int,
             number: int, tag: int) -> int:  # fmt: skip
    """Look page ``number`` up in the L1 of its size (``tags`` to ``ways``), then in the STLB: as `look_up_4k`."""
    key = int32(tag)
    index = number & mask
    base = index * stride
    slot = find_in_l1(tags, base, stride, key)
    found = MISS
    if slot != MISS:
        touch(recent, index, slot - base, ways)
        found = (int64(data[slot]) & ENTRY_MASK) << 1
    else:
        index2 = number & geometry.stlb_mask
        base2 = index2 * geometry.stlb_stride
        slot2 = find(tlb.stlb_tag, base2, geometry.stlb_stride, key)
        if slot2 != MISS:
            touch(tlb.stlb_recent, index2, slot2 - base2, geometry.stlb_ways)
            enter(tags, data, recent, index, stride, ways, ways, key, tlb.stlb_data[slot2])
            found = ((int64(tlb.stlb_data[slot2]) & ENTRY_MASK) << 1) | 1
    return found


@inline
def look_up_4k(tlb: Tlb, geometry: TlbGeometry, page: int, context: int) -> int:
    """Look a 4 KiB page up: MISS, or ``data << 1 | 1 if the STLB had to serve it`` (the entry moves to the L1)."""
    return _look_up(tlb, geometry, tlb.l1_tag, tlb.l1_data, tlb.l1_recent, geometry.l1_mask, geometry.l1_stride,
                    geometry.l1_ways, page, tag_4k(page, context))  # fmt: skip


@kernel
def look_up_2m(tlb: Tlb, geometry: TlbGeometry, table: int, context: int) -> int:
    """Look the 2 MiB page of leaf table ``table`` up; as `look_up_4k`, the frame being its first."""
    return _look_up(tlb, geometry, tlb.l1_2m_tag, tlb.l1_2m_data, tlb.l1_2m_recent, geometry.l1_2m_mask,
                    geometry.l1_2m_stride, geometry.l1_2m_ways, table, tag_2m(table, context))  # fmt: skip


@inline
def fill_4k(tlb: Tlb, geometry: TlbGeometry, page: int, context: int, frame: int, dirty: int) -> None:
    """What a walk to a 4 KiB page (or to a part of a fractured 2 MiB page) enters; neither level holds it."""
    key = int32(tag_4k(page, context))
    entry = int32((frame << TLB_FRAME_SHIFT) | dirty)
    enter(tlb.l1_tag, tlb.l1_data, tlb.l1_recent, page & geometry.l1_mask, geometry.l1_stride, geometry.l1_ways,
          geometry.l1_ways, key, entry)  # fmt: skip
    enter(tlb.stlb_tag, tlb.stlb_data, tlb.stlb_recent, page & geometry.stlb_mask, geometry.stlb_stride,
          geometry.stlb_ways, geometry.stlb_ways, key, entry)  # fmt: skip


@kernel
def fill_2m(tlb: Tlb, geometry: TlbGeometry, table: int, context: int, frame: int, dirty: int) -> None:
    """What a walk enters when both levels map 2 MiB; ``frame``: the first of the page."""
    key = int32(tag_2m(table, context))
    entry = int32((frame << TLB_FRAME_SHIFT) | dirty)
    enter(tlb.l1_2m_tag, tlb.l1_2m_data, tlb.l1_2m_recent, table & geometry.l1_2m_mask, geometry.l1_2m_stride,
          geometry.l1_2m_ways, geometry.l1_2m_ways, key, entry)  # fmt: skip
    enter(tlb.stlb_tag, tlb.stlb_data, tlb.stlb_recent, table & geometry.stlb_mask, geometry.stlb_stride,
          geometry.stlb_ways, geometry.stlb_ways_2m, key, entry)  # fmt: skip


@inline
def _renew(data: Ints, slot: int, entry: int) -> None:
    if slot != MISS:
        assume(slot >= 0)
        data[slot] = entry


@kernel
def renew(tlb: Tlb, geometry: TlbGeometry, page: int, table: int, context: int, frame: int, dirty: int) -> None:
    """A walk renews the entry that a write found clean, in both levels as far as they hold it; of either size."""
    small, large = int32(tag_4k(page, context)), int32(tag_2m(table, context))
    entry = int32((frame << TLB_FRAME_SHIFT) | dirty)
    base_entry = int32(((frame - (page & (TABLE_PAGES - 1))) << TLB_FRAME_SHIFT) | dirty)
    l1, l1_2m = (page & geometry.l1_mask) * geometry.l1_stride, (table & geometry.l1_2m_mask) * geometry.l1_2m_stride
    stlb, stlb_2m = (
        (page & geometry.stlb_mask) * geometry.stlb_stride,
        (table & geometry.stlb_mask) * geometry.stlb_stride,
    )
    _renew(tlb.l1_data, find_in_l1(tlb.l1_tag, l1, geometry.l1_stride, small), entry)
    _renew(tlb.stlb_data, find(tlb.stlb_tag, stlb, geometry.stlb_stride, small), entry)
    _renew(tlb.l1_2m_data, find_in_l1(tlb.l1_2m_tag, l1_2m, geometry.l1_2m_stride, large), base_entry)
    _renew(tlb.stlb_data, find(tlb.stlb_tag, stlb_2m, geometry.stlb_stride, large), base_entry)
