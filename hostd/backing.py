"""How the host serves EPT violations: frames for what was never backed, of 4 KiB or 2 MiB, and mappings for the rest.

A guest-delegated design's gPA node says the tier; a flat guest's memory comes from the fast tier until the low
watermark (Linux allocation order). With huge pages the first touch of 2 MiB of gPA, of which there is no table yet,
takes a block of frames for all of it (mm/huge_memory.c), which KVM maps with one entry.
"""

from typing import NamedTuple

from guestd.jit import inline, int64, kernel
from guestd.mm.nodes import (
    F_HUGE,
    FAST,
    NO_PAGE,
    SLOW,
    WMARK_LOW,
    WMARK_MIN,
    Nodes,
    allocate,
    lru_add,
    take_free,
    take_free_block,
)
from proto.arrays import Bytes, Words
from proto.counters import C, Counters
from proto.entry import FRAME_SHIFT, HUGE, PRESENT, PROTNONE, WRITABLE
from proto.layout import VmMemory
from proto.units import TABLE_PAGES, TABLE_SHIFT

BACKED = WRITABLE
"""Set in every EPT entry that has a frame, mapped or zapped."""


class Prices(NamedTuple):
    """What an EPT violation costs that finds the page there, allocates it, swaps it in, allocates a huge page; ps."""

    mapped_ps: int
    allocated_ps: int
    swapped_ps: int
    huge_ps: int


@inline
def _take_block(nodes: Nodes, gpfn: int, flat: bool, needed: int) -> int:
    """A block to back the 2 MiB from ``gpfn`` on, which leaves ``needed`` frames for others, or NO_PAGE.

    QEMU asks for huge pages (madvise), so the host's kernel looks on both nodes, in the order of other allocations.
    """
    half = nodes.page.size // 2
    frame = NO_PAGE
    if not flat:
        node = 1 if gpfn >= half else 0
        # A huge page lies in what the guest may use of the node, as in a VMA.
        if gpfn - node * half + TABLE_PAGES <= nodes.managed[node]:
            frame = take_free_block(nodes, node, needed)
    elif gpfn + TABLE_PAGES <= half and nodes.free_count[FAST] + nodes.free_count[SLOW] - TABLE_PAGES >= needed:
        for mark in (WMARK_LOW, WMARK_MIN):
            for node in (FAST, SLOW):
                if frame == NO_PAGE:
                    frame = take_free_block(nodes, node, nodes.watermark[node, mark])
    return frame


@inline
def _run(gpfns: Words, start: int) -> int:
    """How many faults from ``start`` on, one after the other, lie in one 2 MiB of gPA."""
    end = start + 1
    while end < gpfns.size and gpfns[end] >> TABLE_SHIFT == gpfns[start] >> TABLE_SHIFT:
        end += 1
    return end - start


@kernel
def _back_huge(memory: VmMemory, nodes: Nodes, head: int, flat: bool, needed: int) -> bool:
    """Back the 2 MiB of gPA from ``head`` on, where there is no table yet, with one huge page, clear; false if none."""
    frame = _take_block(nodes, head, flat, needed)
    if frame == NO_PAGE:
        return False
    for i in range(TABLE_PAGES):
        if flat:
            nodes.page[frame + i] = head + i
        memory.ept[head + i] = (int64(frame + i) << FRAME_SHIFT) | PRESENT | WRITABLE
        memory.stamps[frame + i] = 0
    nodes.flags[frame] = F_HUGE
    if flat:
        lru_add(nodes, frame, 0)
    memory.ept_pde[head >> TABLE_SHIFT] = PRESENT | HUGE
    return True


@kernel
def back(
    memory: VmMemory, nodes: Nodes, gpfns: Words, flat: bool, huge: bool, content: Words, away: Bytes,
    prices: Prices, hints: Words, out: Words, counters: Counters,
) -> int:  # fmt: skip
    """Serve EPT violations, for which there are frames enough; returns the hint faults listed in ``hints``.

    ``huge``: with huge pages; ``content``, ``away``: of `hostd.swap.Swap`, or empty; ``out``: int64[n] cost of each,
    0 for a page that another one's huge page brought along.
    """
    hinted = 0
    half = nodes.page.size // 2
    ept, pde = memory.ept, memory.ept_pde
    fast_needed = slow_needed = 0
    if huge:
        for gpfn in gpfns:
            if (ept[gpfn] & BACKED) == 0:
                if flat or gpfn < half:
                    fast_needed += 1
                else:
                    slow_needed += 1
    i = -1
    while i + 1 < gpfns.size:
        i += 1
        gpfn = gpfns[i]
        number = gpfn >> TABLE_SHIFT
        on_fast = flat or gpfn < half
        if huge and pde[number] == 0:
            run = _run(gpfns, i)
            needed = (fast_needed if on_fast else slow_needed) - run
            if _back_huge(memory, nodes, number << TABLE_SHIFT, flat, needed):
                counters[C.vmstat__thp_fault_alloc] += 1
                memory.ept_pdpte[number >> TABLE_SHIFT] |= PRESENT
                out[i : i + run] = 0
                out[i] = prices.huge_ps
                fast_needed -= run if on_fast else 0
                slow_needed -= 0 if on_fast else run
                i += run - 1
                continue
            counters[C.vmstat__thp_fault_fallback] += 1
        entry = ept[gpfn]
        whole = (pde[number] & HUGE) != 0
        if (entry & BACKED) == 0:
            frame = allocate(nodes, FAST) if flat else take_free(nodes, 1 if gpfn >= half else 0, 0)
            if frame == NO_PAGE and flat:
                # What is left is the reserve below the watermarks: moves under way hold their frames twice.
                frame = take_free(nodes, FAST, 0) if nodes.free_count[FAST] > 0 else take_free(nodes, SLOW, 0)
            if flat:
                nodes.page[frame] = gpfn
                lru_add(nodes, frame, 0)
            ept[gpfn] = (int64(frame) << FRAME_SHIFT) | PRESENT | WRITABLE
            pde[number] |= PRESENT
            memory.ept_pdpte[number >> TABLE_SHIFT] |= PRESENT
            fast_needed -= 1 if on_fast else 0
            slow_needed -= 0 if on_fast else 1
            # A new page is clear: whatever the frame held is gone.
            memory.stamps[frame] = 0
            out[i] = prices.allocated_ps
            if away.size > 0 and away[gpfn] != 0:
                memory.stamps[frame] = content[gpfn]
                away[gpfn] = 0
                out[i] = prices.swapped_ps
        elif (entry & PROTNONE) != 0:
            hints[hinted] = i
            hinted += 1
            out[i] = prices.mapped_ps
        elif whole and (entry & PRESENT) != 0:
            out[i] = 0
        else:
            head = number << TABLE_SHIFT if whole else gpfn
            for leaf in range(head, head + (TABLE_PAGES if whole else 1)):
                ept[leaf] |= PRESENT
            out[i] = prices.mapped_ps
    return hinted
