"""What a `PageView` reads and clears in its page table: accessed and dirty bits, protection, places.

``table`` are the leaves, ``pde`` the entries above them, one for 512 leaves. Where a PDE has HUGE, it maps 2 MiB: A and
D are in it, and its leaves only keep books (frame, PRESENT or PROTNONE, the emulator's version). The page that stands
for such a unit is its first, the head. Ranges are looked through from the PDEs down: an absent table costs one entry, a
huge page one, any other table one and its leaves; a huge page belongs to the range that its head is in.
"""

import numpy as np

from guestd.jit import inline
from guestd.meter import metered
from guestd.mm.nodes import NO_PAGE
from proto.arrays import Bytes, Ints, Mask, Words
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT, PROTNONE, WRITABLE, YOUNG
from proto.units import TABLE_PAGES, TABLE_SHIFT

MAPPED = PRESENT | PROTNONE | WRITABLE
"""Any of them set: the page has a frame (a zapped or PROT_NONE entry keeps it)."""
Pdes = Words | Bytes
"""int64 in a guest, uint8 in the host; of both the low eight bits are alike."""


@inline
def is_huge(pde: Pdes, page: int) -> bool:
    """Whether a page is part of a huge one."""
    return (pde[page >> TABLE_SHIFT] & HUGE) != 0


@inline
def head_of(pde: Pdes, page: int) -> int:
    """The page that stands for the unit of ``page``."""
    return page & ~(TABLE_PAGES - 1) if is_huge(pde, page) else page


@inline
def frame_of(entry: int) -> int:
    """The frame in an entry."""
    return (entry & FRAME_MASK) >> FRAME_SHIFT


@metered
def heads(pde: Pdes, pages: Words, out: Words) -> None:
    """The head of each page's unit."""
    for i in range(pages.size):
        out[i] = head_of(pde, pages[i])


@metered
def sizes(pde: Pdes, pages: Words, out: Words) -> None:
    """Pages of each page's unit: 1 or 512."""
    for i in range(pages.size):
        out[i] = TABLE_PAGES if is_huge(pde, pages[i]) else 1


@inline
def _young(table: Words, pde: Pdes, page: int) -> bool:
    if is_huge(pde, page):
        young = (pde[page >> TABLE_SHIFT] & ACCESSED) != 0 or (table[page & ~(TABLE_PAGES - 1)] & YOUNG) != 0
    else:
        young = (table[page] & (ACCESSED | YOUNG)) != 0
    return young


@metered
def test_young(table: Words, pde: Pdes, pages: Words, out: Mask) -> None:
    """The accessed bit of each page's unit."""
    for i in range(pages.size):
        out[i] = _young(table, pde, pages[i])


@metered
def clear_young(table: Words, pde: Pdes, pages: Words, out: Mask) -> int:
    """The accessed bit of each page's unit, which is cleared: of a unit that is named twice, the first says so.

    Returns how many had it in an entry that maps them, and so may be in a TLB: not those that were young when zapped.
    """
    mapped = 0
    for i in range(pages.size):
        page = pages[i]
        out[i] = _young(table, pde, page)
        if is_huge(pde, page):
            mapped += 1 if (pde[page >> TABLE_SHIFT] & ACCESSED) != 0 else 0
            pde[page >> TABLE_SHIFT] &= ~ACCESSED
            table[page & ~(TABLE_PAGES - 1)] &= ~YOUNG
        else:
            mapped += 1 if (table[page] & ACCESSED) != 0 else 0
            table[page] &= ~(ACCESSED | YOUNG)
    return mapped


@metered
def clear_dirty(table: Words, pde: Pdes, pages: Words, out: Mask) -> None:
    """The dirty bit of each page's unit, which is cleared."""
    for i in range(pages.size):
        page = pages[i]
        if is_huge(pde, page):
            out[i] = (pde[page >> TABLE_SHIFT] & DIRTY) != 0
            pde[page >> TABLE_SHIFT] &= ~DIRTY
        else:
            out[i] = (table[page] & DIRTY) != 0
            table[page] &= ~DIRTY


@metered
def on_node(table: Words, pde: Pdes, half: int, first: int, count: int, node: int, limit: int,
            out: Words) -> tuple[int, int]:  # fmt: skip
    """Units of [first, first + count) on ``node``, in order of address, until they have ``limit`` pages.

    Returns how many are in ``out``, and entries visited.
    """
    found = covered = visited = 0
    page, end = first, first + count
    while page < end:
        number = page >> TABLE_SHIFT
        table_end = min(end, (number + 1) << TABLE_SHIFT)
        visited += 1
        entry = pde[number]
        if (entry & HUGE) != 0:
            head = number << TABLE_SHIFT
            if page == head and (1 if frame_of(table[head]) >= half else 0) == node:
                if covered >= limit:
                    return found, visited
                out[found] = head
                found += 1
                covered += TABLE_PAGES
        elif entry != 0:
            for leaf in range(page, table_end):
                if (table[leaf] & MAPPED) != 0 and (1 if frame_of(table[leaf]) >= half else 0) == node:
                    if covered >= limit:
                        return found, visited + leaf - page
                    out[found] = leaf
                    found += 1
                    covered += 1
            visited += table_end - page
        page = table_end
    return found, visited


@metered
def count_mapped(table: Words, pde: Pdes, first: int, count: int) -> tuple[int, int]:
    """Mapped pages of [first, first + count), and entries visited."""
    mapped = visited = 0
    page, end = first, first + count
    while page < end:
        number = page >> TABLE_SHIFT
        table_end = min(end, (number + 1) << TABLE_SHIFT)
        visited += 1
        if (pde[number] & HUGE) != 0:
            mapped += table_end - page
        elif pde[number] != 0:
            for leaf in range(page, table_end):
                if (table[leaf] & MAPPED) != 0:
                    mapped += 1
            visited += table_end - page
        page = table_end
    return mapped, visited


@metered
def frames(table: Words, pde: Pdes, pages: Words, out: Ints) -> None:
    """The frame that stands for each page's unit, or NO_PAGE."""
    for i in range(pages.size):
        entry = table[head_of(pde, pages[i])]
        out[i] = frame_of(entry) if (entry & MAPPED) != 0 else NO_PAGE


@metered
def note_time(table: Words, pde: Pdes, half: int, first: int, count: int, now: int, out: Words) -> None:
    """``out[page] = now`` for the units in slow memory that are mapped and not under PROT_NONE."""
    page, end = first, first + count
    while page < end:
        number = page >> TABLE_SHIFT
        table_end = min(end, (number + 1) << TABLE_SHIFT)
        if is_huge(pde, page):
            head = number << TABLE_SHIFT
            if page == head and (table[head] & PROTNONE) == 0 and frame_of(table[head]) >= half:
                out[head] = now
        elif pde[number] != 0:
            for leaf in range(page, table_end):
                entry = table[leaf]
                if (entry & MAPPED) != 0 and (entry & PROTNONE) == 0 and frame_of(entry) >= half:
                    out[leaf] = now
        page = table_end


@metered
def unprotect(table: Words, pde: Pdes, pages: Words) -> None:
    """Make each page's unit accessible."""
    for page in pages:
        if is_huge(pde, page):
            number = page >> TABLE_SHIFT
            pde[number] = (pde[number] & ~PROTNONE) | PRESENT
            for leaf in range(number << TABLE_SHIFT, (number + 1) << TABLE_SHIFT):
                table[leaf] = (table[leaf] & ~PROTNONE) | PRESENT
        else:
            table[page] = (table[page] & ~PROTNONE) | PRESENT


def expand(units: Words | Ints, sizes: Words) -> Words:
    """Every page (or frame) of units that begin at ``units`` and have ``sizes`` of them, in order (int64)."""
    ends = np.cumsum(sizes)
    return np.repeat(units - ends + sizes, sizes) + np.arange(int(ends[-1]) if ends.size else 0)
