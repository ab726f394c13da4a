"""The hypervisor's own means in a VM's tiering (`guestd.tiering.host_help`): as operations that the VM executes.

A batch that stops the VM is one pause, with one flush request, and one operation a page at the pause's time; the thread
works for as long as the pause lasts, but for `vm_pause`, in which it waits.
"""

import numpy as np

from guestd.meter import metered
from guestd.mm.nodes import F_BUSY, FAST
from guestd.tiering import units
from guestd.tiering.host_help import HostHelp
from guestd.tiering.pages import Pdes, expand, is_huge
from hostd.host_view import HostView, take_bitmap
from proto.arrays import Bytes, Ints, Mask, Words
from proto.costs import copy_ps
from proto.counters import C
from proto.entry import ACCESSED, HUGE, YOUNG
from proto.layout import (
    NARROW,
    OP_COPY,
    OP_PAUSE,
    OP_SWITCH,
    OP_TRADE,
    OP_WALK_GPT,
    W_LEAVE,
    W_VISITED,
    W_YOUNG,
)
from proto.units import PAGE_SHIFT, TABLE_SHIFT


@metered
def _scan_list(ept: Words, pde: Pdes, ranges: Words, bits: Bytes) -> tuple[int, int]:
    """See `HostTools.scan_list`; (A bits that were set in entries that map, entries looked at)."""
    at = found = visited = 0
    huge, young = -1, False
    for i in range(ranges.shape[0]):
        for page in range(ranges[i, 0], ranges[i, 0] + ranges[i, 1]):
            number = page >> TABLE_SHIFT
            if is_huge(pde, page):
                # One entry, however many ranges name pages of it.
                if number != huge:
                    head = number << TABLE_SHIFT
                    mapped = (pde[number] & ACCESSED) != 0
                    young = mapped or (ept[head] & YOUNG) != 0
                    pde[number] &= ~ACCESSED
                    ept[head] &= ~YOUNG
                    huge = number
                    visited += 1
                    found += 1 if mapped else 0
                accessed = young
            else:
                visited += 1
                accessed = (ept[page] & (ACCESSED | YOUNG)) != 0
                found += 1 if (ept[page] & ACCESSED) != 0 else 0
                ept[page] &= ~(ACCESSED | YOUNG)
            if accessed:
                bits[at >> 3] |= 1 << (at & 7)
            at += 1
    return found, visited


class HostTools(HostView, HostHelp):
    """See the module."""

    def _pause(self, lasts_ps: int) -> None:
        one = np.array([self.now], np.int64)
        self._emit(OP_PAUSE, one, np.zeros(1, np.int64), np.array([lasts_ps], np.int64))

    def exchange_stopped(self, slow_pages: Words, fast_pages: Words) -> int:
        slow_pages, slow_frames, fast_pages, fast_frames, sizes = self._pairs(slow_pages, fast_pages)
        count = int(sizes.sum())
        if count:
            costs = self.costs
            copies = copy_ps(costs, True, False) + copy_ps(costs, False, True) + copy_ps(costs, False, False)
            work_ps = 2 * costs.zap_pte_ps * sizes.size + copies * count + self._request_ps()
            self._pause(costs.vm_pause_ps + work_ps)
            times = np.full(sizes.size, self.now, np.int64)
            self._emit(OP_TRADE, times, slow_pages, fast_pages, np.where(sizes > 1, HUGE, 0))
            self.meter.now += costs.vm_pause_ps
            self.meter.charge(work_ps)
            both = expand(np.stack([slow_frames, fast_frames], axis=1).reshape(-1), np.repeat(sizes, 2))
            self._busy(np.full(both.size, times[0], np.int64), both[:0], both)
            self._events.add(self.now, "promote", expand(slow_pages, sizes) << PAGE_SHIFT, 1, FAST)
            self._events.add(self.now, "demote", expand(fast_pages, sizes) << PAGE_SHIFT, FAST, 1)
        return count

    # -- the guest's page table -----------------------------------------------------------------------------------

    def request_guest_walk(self, *, narrow: bool = False, leave: Words | None = None) -> None:
        row = self._walk[W_LEAVE]
        row[:] = 0
        if leave is not None and leave.size:
            np.bitwise_or.at(row, leave >> 6, np.left_shift(np.int64(1), leave & 63))
        now, nothing = np.array([self.now], np.int64), np.zeros(1, np.int64)
        if narrow:
            self.request_harvest()
        else:
            self.meter.charge(self._request_ps())
        self._emit(OP_WALK_GPT, now, nothing, nothing, NARROW if narrow else 0)

    def accessed_in_guest(self) -> Words:
        out = np.empty(self._table.size, np.int64)
        count = int(take_bitmap(self.meter.book, self._walk[W_YOUNG], out))
        self.meter.charge(self.costs.scan_pte_ps * int(self._walk[W_VISITED, 0]))
        self._walk[W_VISITED, 0] = 0
        return out[:count].copy()

    def scan_list(self, ranges: Words) -> Bytes:
        """Read and clear the A bits of a guest's list of gPA ranges (int64[n, 2]: first, count; rising, disjoint).

        A bit a page in the list's order, the lowest of a byte first (uint8[pages / 8, rounded up]); of a huge page each
        page that is listed. HeteroOS (ISCA'17). Costs a PTE an entry looked at, and one flush request if any was set.
        """
        bits = np.zeros(-(-int(ranges[:, 1].sum()) // 8), np.uint8)
        found, visited = _scan_list(self.meter.book, self._table, self._pde, ranges, bits)
        self.meter.charge(self.costs.scan_pte_ps * visited)
        if found:
            self._flush_scanned()
        return bits

    # -- copies ahead of a migration ------------------------------------------------------------------------------

    def copy_ahead(self, pages: Words, node: int, keep: int) -> tuple[Words, Ints]:
        pages = pages[self.sizes(pages) == 1]
        frames = self.frames(pages)
        targets = np.empty(pages.size, np.int32)
        units.pick_targets(self.meter.book, self.nodes, frames, node, keep, targets)
        taken = targets >= 0
        pages, targets = pages[taken], targets[taken]
        self.nodes.flags[targets] |= F_BUSY
        self.nodes.flags[frames[taken]] |= F_BUSY
        self.copy_again(pages, targets)
        return pages, targets

    def copy_again(self, pages: Words, targets: Ints) -> None:
        if pages.size:
            each = self._copy_ps(targets)
            self._emit(OP_COPY, self.now + np.cumsum(each) - each, pages, targets.astype(np.int64))
            self.meter.charge(int(each.sum()))

    def _copy_ps(self, targets: Ints) -> Words:
        costs, slow = self.costs, targets >= self._half
        return np.where(slow, copy_ps(costs, False, True), copy_ps(costs, True, False)).astype(np.int64)

    def switch(self, pages: Words, targets: Ints, stale: Mask) -> None:
        if pages.size == 0:
            return
        frames = self.frames(pages)
        node = int(targets[0] >= self._half)
        again_ps = self._copy_ps(targets)
        work_ps = self.costs.zap_pte_ps * pages.size + self._request_ps() + int(again_ps[stale].sum())
        self._pause(work_ps)
        times = np.full(pages.size, self.now, np.int64)
        self._emit(OP_COPY, times[stale], pages[stale], targets[stale].astype(np.int64))
        self._emit(OP_SWITCH, times, pages, targets.astype(np.int64), 0, again_ps)
        # The lists know a page by the frame that it is in: not busy while it changes lists, and busy again at once.
        self.nodes.flags[frames] &= np.uint8(0xFF ^ F_BUSY)
        units.relink(self.meter.book, self.nodes, frames, targets, node)
        self._busy(times, frames.astype(np.int64), targets.astype(np.int64))
        self.meter.charge(work_ps + self.costs.migrate_page_ps * pages.size)
        self.counters[C.vmstat__pgmigrate_success] += pages.size
        self.counters[C.bytes__migrated] += pages.size << PAGE_SHIFT
        self._events.add(self.now, "promote" if node == FAST else "demote", pages << PAGE_SHIFT, 1 - node, node)
