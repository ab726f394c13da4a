"""Scans that walk a page table as the tree that it is, from the root down: what is absent is not looked at.

A scan for accessed pages also passes over each subtree whose entry was not accessed since the last one. The processor
sets A in the entries above the leaves too, whenever a walk reads them; Linux's multi-generational LRU uses it
(mm/vmscan.c, walk_pmd_range_locked; arch_has_nonleaf_pmd_young). What it cannot see is real: while a paging-structure
cache holds an entry, walks do not read it, and so do not set its A bit again until it is flushed or evicted; pages
below it that are accessed meanwhile look idle.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline
from guestd.meter import metered
from guestd.tiering.pages import Pdes
from proto.arrays import Bytes, Ints, Words
from proto.entry import ACCESSED, DIRTY, HUGE, YOUNG
from proto.units import TABLE_PAGES, TABLE_SHIFT

LEVELS = 5
"""Most levels above the leaves, the root's included."""


class Radix(NamedTuple):
    """The shape of a page table above its leaves. T = PDEs, which are the entries [0, T); the root is the last.

    The other entries follow level by level, each level in order of address.
    """

    upper: Pdes
    """int64 or uint8: the entries themselves; of the root there need be none."""
    first: Ints
    """int32[u - T]: the first entry of the table that each of the others maps."""
    end: Ints
    """int32[u - T]: the entry after its last."""
    low: Ints
    """int32[u - T]: the first PDE below it."""
    high: Ints
    """int32[u - T]: the PDE after its last."""
    stack: Words
    """int64[2, LEVELS]: scratch."""


def radix_of(upper: Pdes, parent: Ints, tables: int) -> Radix:
    """From the number of the entry that maps each entry's table (int32[u]); the root's is its own."""
    above = np.arange(tables, parent.size)
    first = np.searchsorted(parent[:-1], above, side="left")
    end = np.searchsorted(parent[:-1], above, side="right")
    low, high = first.copy(), end.copy()
    for i in range(above.size):
        if first[i] >= tables:
            low[i], high[i] = low[first[i] - tables], high[end[i] - 1 - tables]
    shape = [array.astype(np.int32) for array in (first, end, low, high)]
    return Radix(upper, shape[0], shape[1], shape[2], shape[3], np.zeros((2, LEVELS), np.int64))


def ept_radix(upper: Bytes, tables: int) -> Radix:
    """Of an EPT (`proto.layout.VmMemory.ept_upper`), where every entry has its place; one root above the PDPTEs."""
    numbers = np.arange(upper.size)
    parent = np.where(numbers < tables, tables + (numbers >> TABLE_SHIFT), upper.size)
    return radix_of(upper, np.append(parent, upper.size).astype(np.int32), tables)


@inline
def _scan_table(table: Words, pde: Pdes, number: int, first: int, end: int, bits: int, out: Words,
                found: int) -> tuple[int, int]:  # fmt: skip
    """Pages of PDE ``number`` in [first, end) with one of ``bits``, which it clears: (found so far, leaves visited)."""
    head = number << TABLE_SHIFT
    visited = 0
    if (pde[number] & HUGE) != 0:
        if first <= head < end:
            if (pde[number] & bits) != 0 or (table[head] & bits & YOUNG) != 0:
                out[found] = head
                found += 1
            pde[number] &= ~(bits & (ACCESSED | DIRTY))
            table[head] &= ~(bits & YOUNG)
    else:
        for page in range(max(first, head), min(end, head + TABLE_PAGES)):
            visited += 1
            if (table[page] & bits) != 0:
                table[page] &= ~bits
                out[found] = page
                found += 1
    return found, visited


@metered
def scan_young(table: Words, radix: Radix, first: int, count: int, out: Words) -> tuple[int, int]:
    """Accessed pages of [first, first + count), whose bits are cleared, at all levels that lie wholly in the range.

    In order of address, a huge page by its head: (how many are in ``out``, entries visited).
    """
    tables = radix.upper.size if radix.first.size == 0 else radix.high[radix.first.size - 1]
    begin, end = first >> TABLE_SHIFT, (first + count + TABLE_PAGES - 1) >> TABLE_SHIFT
    last = first + count
    at, until = radix.stack[0], radix.stack[1]
    root = radix.first.size - 1
    at[0], until[0] = radix.first[root], radix.end[root]
    found = visited = depth = 0
    while depth >= 0:
        number = at[depth]
        if number == until[depth]:
            depth -= 1
            continue
        at[depth] = number + 1
        low, high = number, number + 1
        if number >= tables:
            low, high = radix.low[number - tables], radix.high[number - tables]
        if high <= begin or low >= end:
            continue
        visited += 1
        young = (radix.upper[number] & ACCESSED) != 0
        whole = first <= low << TABLE_SHIFT and high << TABLE_SHIFT <= last
        if number < tables:
            huge = (radix.upper[number] & HUGE) != 0
            if huge or young:
                found, leaves = _scan_table(table, radix.upper, number, first, last, ACCESSED | YOUNG, out, found)
                visited += leaves
                if whole and not huge:
                    radix.upper[number] &= ~ACCESSED
        elif young:
            if whole:
                radix.upper[number] &= ~ACCESSED
            depth += 1
            at[depth], until[depth] = radix.first[number - tables], radix.end[number - tables]
    return found, visited


@metered
def scan_dirty(table: Words, pde: Pdes, first: int, count: int, out: Words) -> tuple[int, int]:
    """Dirty pages of [first, first + count), whose bits are cleared: (how many are in ``out``, entries visited).

    Only what maps a page has a D bit, so every table that there is is looked through.
    """
    last = first + count
    found = visited = 0
    for number in range(first >> TABLE_SHIFT, (last + TABLE_PAGES - 1) >> TABLE_SHIFT):
        visited += 1
        if pde[number] != 0:
            found, leaves = _scan_table(table, pde, number, first, last, DIRTY, out, found)
            visited += leaves
    return found, visited
