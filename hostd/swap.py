"""Host swap: a kernel thread per VM that takes cold guest memory away, and the area that holds it meanwhile.

A clock hand goes round the VM's gPA space (second chance: Corbato, 1968; what mm/vmscan.c approximates with two lists).
A page whose EPT A bit is set loses it, with the flush that KVM makes of that (clear_flush_young), and is spared; one
that is not accessed until the hand comes round is unmapped and swapped out. An EPT fault on it brings it back. A page
that is accessed between its unmapping and the next barrier is found in the swap cache, and nothing was lost but the
fault. The host does not know what a page is for: page tables and the PMU's buffers go like any other. What sets the
pace is a rate, not memory pressure: shares are static here. Left out: the device's queue; writes that are not needed.
"""

import numpy as np

from guestd.jit import kernel
from guestd.meter import Meter, metered
from guestd.mm.nodes import F_BUSY, F_LRU, Nodes, give_free, lru_remove
from guestd.tiering.pages import expand, head_of
from hostd.host_view import HostView
from proto.arrays import Bytes, Words
from proto.entry import FRAME_MASK, FRAME_SHIFT, PRESENT, WRITABLE, Entries
from proto.layout import VmMemory
from proto.units import PS_PER_S

CLUSTER = 32
"""Pages looked at in a row (SWAP_CLUSTER_MAX)."""


@metered
def _advance_hand(ept: Words, ept_pde: Bytes, nodes: Nodes, hand: int, out: Words) -> tuple[int, int]:
    """The next units under the hand that have a frame which nobody moves: (how many, where the hand is then)."""
    found = 0
    for step in range(ept.size):
        gpfn = (hand + step) % ept.size
        entry = ept[gpfn]
        if head_of(ept_pde, gpfn) != gpfn:
            continue
        if (entry & WRITABLE) != 0 and (nodes.flags[(entry & FRAME_MASK) >> FRAME_SHIFT] & F_BUSY) == 0:
            out[found] = gpfn
            found += 1
            if found == out.size:
                return found, gpfn + 1
    return found, hand


@kernel
def _write_out(ept: Words, stamps: Words, nodes: Nodes, gpfns: Words, content: Words, away: Bytes) -> int:
    """Save what unmapped pages hold and free their frames; returns how many had not come back meanwhile."""
    written = 0
    for gpfn in gpfns:
        entry = ept[gpfn]
        frame = (entry & FRAME_MASK) >> FRAME_SHIFT
        nodes.flags[frame] &= ~F_BUSY
        if (entry & PRESENT) == 0:
            content[gpfn], away[gpfn] = stamps[frame], 1
            stamps[frame] = 0
            ept[gpfn] = 0
            if nodes.flags[frame] & F_LRU:
                lru_remove(nodes, frame)
            give_free(nodes, frame)
            written += 1
    return written


class Swap:
    """A VM's swap thread and area.

    ``content``: int64[gpa_pages], the stamp of each page in the area; ``away``: uint8[gpa_pages], 1 for those pages.
    """

    def __init__(self, memory: VmMemory, nodes: Nodes, pages_per_s: int, start_ps: int, view: HostView) -> None:
        self.content: Words = np.zeros(memory.ept.size, np.int64)
        self.away: Bytes = np.zeros(memory.ept.size, np.uint8)
        self.scanned_pages = 0
        self.out_pages = 0
        self.in_pages = 0
        self._ept: Entries = memory.ept
        self._ept_pde = memory.ept_pde
        self._stamps = memory.stamps
        self._nodes = nodes
        self.view = view
        self._hand = 0
        self._pages = np.empty(CLUSTER, np.int64)
        self._period_ps = max(1, CLUSTER * PS_PER_S // pages_per_s)
        self._next_ps = start_ps
        """When the next cluster is due; the thread paces itself, so that the quantum does not pace its flushes."""
        self._unmapped: list[tuple[Words, Words]] = []
        """Unmappings to come: (times, gPA pages), each in order of time."""

    @property
    def meter(self) -> Meter:
        """The thread's own accounts."""
        return self.view.meter

    def settle(self, now_ps: int) -> None:
        """The VM has come to ``now_ps``: pages unmapped before that are written out, unless they came back."""
        left = []
        for times, pages in self._unmapped:
            done = int(np.searchsorted(times, now_ps))
            self.out_pages += int(
                _write_out(self._ept, self._stamps, self._nodes, pages[:done], self.content, self.away)
            )
            if done < times.size:
                left.append((times[done:], pages[done:]))
        self._unmapped = left

    def run(self, now_ps: int, until_ps: int) -> None:
        """Look at the clusters that are due in the quantum to come, or those of them that the thread has time for."""
        meter = self.meter
        while self._next_ps < until_ps:
            meter.now = max(now_ps, self._next_ps)
            found, self._hand = _advance_hand(
                meter.book, self._ept, self._ept_pde, self._nodes, self._hand, self._pages
            )
            if found:
                self._look_at(self._pages[:found].copy())
            # What it had no time for is not made up for.
            self._next_ps = max(self._next_ps + self._period_ps, meter.now)

    def _look_at(self, pages: Words) -> None:
        """Spare those that were accessed, and swap out the others; a huge page in pieces."""
        sizes = self.view.sizes(pages)
        self.scanned_pages += int(sizes.sum())
        spared = self.view.test_and_clear_young(pages)
        cold = expand(pages[~spared], sizes[~spared])
        if cold.size:
            self._unmapped.append((self.view.unmap(cold, self.view.costs.swap_out_ps), cold))

    def report(self) -> dict[str, float]:
        """`swap` of a VM in summary.json."""
        return {
            "scanned_pages": self.scanned_pages,
            "out_pages": self.out_pages,
            "in_pages": self.in_pages,
            "modelled_s": sum(self.meter.modelled_s().values()),
        }
