"""`PageView`: what a tiering algorithm sees of memory, whoever runs it (architecture 1).

The guest's view translates gVA pages to gPA frames (GPT), the host's gPA pages to hPA frames (EPT). An algorithm is
written once against the operations below; what an operation costs, which flushes it needs and what it counts is the
view's business. All operations take and return arrays, work in compiled kernels that book themselves to the current
stage, and charge the modelled cost of the same work to the same stage.

A *page* is an index into the view's table, a *frame* what it maps to; node 0 is fast, node 1 slow.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from guestd.meter import Meter, metered
from guestd.mm.nodes import (
    ACTIVE,
    F_ACTIVE,
    F_BUSY,
    F_DEMOTED,
    F_LRU,
    FAST,
    NO_PAGE,
    SLOW,
    Nodes,
    isolate_tail,
    lru_add,
    lru_remove,
    mark_accessed,
    mark_inactive_accessed,
    put_back,
    take_free,
)
from proto.arrays import Ints, Mask, Words
from proto.costs import Costs, copy_ps
from proto.counters import C, Counters
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, WRITABLE, YOUNG, Entries

_MAPPED = PRESENT | PROTNONE | WRITABLE
"""Any of them set: the page has a frame (a zapped or PROT_NONE entry keeps it)."""


@metered
def _test_and_clear_young(table: Words, pages: Words, out: Mask) -> None:
    for i in range(pages.size):
        entry = table[pages[i]]
        out[i] = (entry & (ACCESSED | YOUNG)) != 0
        table[pages[i]] = entry & ~(ACCESSED | YOUNG)


@metered
def _test_young(table: Words, pages: Words, out: Mask) -> None:
    for i in range(pages.size):
        out[i] = (table[pages[i]] & (ACCESSED | YOUNG)) != 0


@metered
def _test_and_clear_dirty(table: Words, pages: Words, out: Mask) -> None:
    for i in range(pages.size):
        entry = table[pages[i]]
        out[i] = (entry & DIRTY) != 0
        table[pages[i]] = entry & ~DIRTY


@metered
def _on_node(table: Words, half: int, first: int, count: int, node: int, out: Words) -> tuple[int, int]:
    """Pages of [first, first + count) on ``node``, in order of address: (how many are in ``out``, pages visited)."""
    found = 0
    for page in range(first, first + count):
        entry = table[page]
        if (entry & _MAPPED) != 0:
            slow = 1 if ((entry & FRAME_MASK) >> FRAME_SHIFT) >= half else 0
            if slow == node:
                if found == out.size:
                    return found, page - first
                out[found] = page
                found += 1
    return found, count


@metered
def _count_mapped(table: Words, first: int, count: int) -> int:
    mapped = 0
    for page in range(first, first + count):
        if (table[page] & _MAPPED) != 0:
            mapped += 1
    return mapped


@metered
def _frames(table: Words, pages: Words, out: Ints) -> None:
    for i in range(pages.size):
        entry = table[pages[i]]
        out[i] = (entry & FRAME_MASK) >> FRAME_SHIFT if (entry & _MAPPED) != 0 else NO_PAGE


@metered
def _unprotect(table: Words, pages: Words, present: int) -> None:
    for page in pages:
        table[page] = (table[page] & ~PROTNONE) | present


@metered
def _pick_targets(nodes: Nodes, frames: Ints, node: int, keep: int, out: Ints) -> int:
    """Take a free frame of ``node`` for each movable frame; NO_PAGE where there is none. Returns how many."""
    taken = 0
    half = nodes.page.size // 2
    for i in range(frames.size):
        frame = frames[i]
        out[i] = NO_PAGE
        if frame == NO_PAGE or (nodes.flags[frame] & F_BUSY) != 0 or (1 if frame >= half else 0) == node:
            continue
        out[i] = take_free(nodes, node, keep)
        if out[i] != NO_PAGE:
            taken += 1
    return taken


@metered
def _relink(nodes: Nodes, frames: Ints, targets: Ints, node: int) -> None:
    """The pages of ``frames`` now live in ``targets``: reverse map, flags and LRU list follow."""
    for i in range(frames.size):
        frame, target = frames[i], targets[i]
        flags = nodes.flags[frame]
        if flags & F_LRU:
            lru_remove(nodes, frame)
        nodes.page[target] = nodes.page[frame]
        nodes.page[frame] = NO_PAGE
        nodes.flags[frame] = 0
        nodes.flags[target] = F_DEMOTED if node == SLOW else 0
        lru_add(nodes, target, ACTIVE if (flags & F_ACTIVE) and node == FAST else 0)


@metered
def _relink_pairs(nodes: Nodes, first: Ints, second: Ints) -> None:
    """The pages of both frames of each pair trade places, each keeping its active bit."""
    for i in range(first.size):
        a, b = first[i], second[i]
        flags_a, flags_b = nodes.flags[a], nodes.flags[b]
        for frame in (a, b):
            if nodes.flags[frame] & F_LRU:
                lru_remove(nodes, frame)
        nodes.page[a], nodes.page[b] = nodes.page[b], nodes.page[a]
        lru_add(nodes, a, 1 if flags_b & F_ACTIVE else 0)
        lru_add(nodes, b, 1 if flags_a & F_ACTIVE else 0)


_isolate = metered(isolate_tail)
_put_back = metered(put_back)
_mark_accessed = metered(mark_accessed)
_mark_inactive_accessed = metered(mark_inactive_accessed)


class PageView(ABC):
    """See the module. ``pages``: size of the page index; ``vcpus``: vCPUs of the VM."""

    def __init__(self, nodes: Nodes, table: Entries, meter: Meter, costs: Costs, counters: Counters, vcpus: int,
                 pages: int, schedule: Callable[[str, int], None]) -> None:  # fmt: skip
        self.nodes = nodes
        self._table = table
        self.meter = meter
        self.costs = costs
        self.counters = counters
        self.vcpus = vcpus
        self.pages = pages
        self.schedule = schedule
        """``schedule(name, at_ps)``: ask for `Tiering.on_timer(name)` at a virtual time."""
        self._half = nodes.page.size // 2
        self.hint_fault_ps = costs.hint_fault_ps
        """What a NUMA hint fault costs in this view, without migration."""

    @property
    def now(self) -> int:
        """Virtual time of the thread at work, ps."""
        return self.meter.now

    # -- observations -------------------------------------------------------------------------------------------

    def test_and_clear_young(self, pages: Words) -> Mask:
        """Read and clear the accessed bits of ``pages`` (int64[n]) found through the reverse map; bool[n].

        The kernel's ageing in reclaim, ptep_clear_flush_young_notify; in KVM ``clear_flush_young``
        (virt/kvm/kvm_main.c). Costs a reverse-map walk and a PTE each; in the host also a flush request per young page
        (`remote_tlb_flush_requests`), in a guest on x86 none.
        """
        young = self.clear_young(pages)
        self._flush_young(int(young.sum()))
        return young

    def test_young(self, pages: Words) -> Mask:
        """Read the accessed bits of ``pages`` (int64[n]) and leave them; bool[n].

        DAMON's look, idle checks; in KVM ``test_young``. Costs a reverse-map walk and a PTE each; flushes nothing.
        """
        young = np.zeros(pages.size, np.bool_)
        _test_young(self.meter.book, self._table, pages, young)
        self.meter.charge((self.costs.rmap_walk_ps + self.costs.scan_pte_ps) * pages.size)
        return young

    def clear_young(self, pages: Words) -> Mask:
        """Read and clear the accessed bits of ``pages`` (int64[n]) without any flush; bool[n].

        DAMON's preparation, idle page tracking, MGLRU's walks; in KVM ``clear_young``. Costs a reverse-map walk and a
        PTE each. A page that a TLB still translates looks idle the next time, however often it is accessed.
        """
        young = np.zeros(pages.size, np.bool_)
        _test_and_clear_young(self.meter.book, self._table, pages, young)
        self.meter.charge((self.costs.rmap_walk_ps + self.costs.scan_pte_ps) * pages.size)
        return young

    def test_and_clear_dirty(self, pages: Words) -> Mask:
        """Read and clear the dirty bits of ``pages`` (int64[n]) in order of address; bool[n].

        Dirty logging by D bits, RAMinate's scan; in KVM kvm_arch_mmu_enable_log_dirty_pt_masked. Costs a PTE each, and
        one flush for the batch if any was set: a translation that is dirty in a TLB sets no D bit. In the host that is
        one request for the whole VM, in a guest one shootdown.
        """
        dirty = np.zeros(pages.size, np.bool_)
        _test_and_clear_dirty(self.meter.book, self._table, pages, dirty)
        self.meter.charge(self.costs.scan_pte_ps * pages.size)
        if dirty.any():
            self._flush_dirty(pages[dirty])
        return dirty

    def on_node(self, first: int, count: int, node: int, limit: int) -> Words:
        """Up to ``limit`` pages of [first, first + count) that lie on ``node``, in order of address (int64[n])."""
        count = self._clip(first, count)
        out = np.empty(min(limit, count), np.int64)
        found, visited = _on_node(self.meter.book, self._table, self._half, first, count, node, out)
        self.meter.charge(self.costs.scan_pte_ps * visited)
        return out[:found]

    def count_mapped(self, first: int, count: int) -> int:
        """Mapped pages in [first, first + count)."""
        count = self._clip(first, count)
        self.meter.charge(self.costs.scan_pte_ps * count)
        return int(_count_mapped(self.meter.book, self._table, first, count))

    def _clip(self, first: int, count: int) -> int:
        """``count`` cut to the pages that there are; raises ValueError for a range that begins outside them."""
        if not 0 <= first <= self.pages or count < 0:
            raise ValueError(f"pages [{first}, {first + count}) of a view of {self.pages}")
        return min(count, self.pages - first)

    def frames(self, pages: Words) -> Ints:
        """Frame of each page (int32[n]), NO_PAGE where unmapped."""
        out = np.empty(pages.size, np.int32)
        _frames(self.meter.book, self._table, pages, out)
        return out

    def free(self, node: int) -> int:
        """Free frames of a node."""
        return int(self.nodes.free_count[node])

    def watermark(self, node: int, mark: int) -> int:
        """A watermark of a node, frames."""
        return int(self.nodes.watermark[node, mark])

    @abstractmethod
    def page_range(self, start: int, end: int) -> tuple[int, int]:
        """(first page, count) of the pages at addresses [start, end), which must be multiples of 2 MiB."""

    @abstractmethod
    def address_bounds(self) -> tuple[int, int]:
        """Lowest and highest address that is mapped."""

    # -- LRU ----------------------------------------------------------------------------------------------------

    def isolate(self, node: int, active: int, limit: int) -> Ints:
        """Up to ``limit`` frames off the tail of a list (int32[n])."""
        out = np.empty(limit, np.int32)
        count = _isolate(self.meter.book, self.nodes, node, active, out)
        self.meter.charge(self.costs.lru_page_ps * count)
        return out[:count]

    def put_back(self, frames: Ints, active: Mask, referenced: Mask) -> None:
        """Put isolated frames back on the head of their lists."""
        _put_back(self.meter.book, self.nodes, frames, active.view(np.uint8), referenced.view(np.uint8))
        self.meter.charge(self.costs.lru_page_ps * frames.size)

    def pages_of(self, frames: Ints) -> Words:
        """The page in each frame (int64[n])."""
        return self.nodes.page[frames].astype(np.int64)

    def mark_accessed(self, frames: Ints) -> None:
        """mark_page_accessed on each frame."""
        activated = _mark_accessed(self.meter.book, self.nodes, frames)
        self.counters[C.vmstat__pgactivate] += activated
        self.meter.charge(self.costs.lru_page_ps * frames.size)

    def mark_inactive_accessed(self, frames: Ints) -> Mask:
        """`mark_accessed` on the frames that are on no active list; which were active already (bool[n])."""
        active = np.empty(frames.size, np.bool_)
        self.counters[C.vmstat__pgactivate] += _mark_inactive_accessed(self.meter.book, self.nodes, frames, active)
        self.meter.charge(self.costs.lru_page_ps * (frames.size - int(active.sum())))
        return active

    def is_active(self, frames: Ints) -> Mask:
        """Whether each frame is on an active list."""
        return (self.nodes.flags[frames] & F_ACTIVE) != 0

    def was_demoted(self, frames: Ints) -> Mask:
        """Whether the page in each frame was demoted before."""
        return (self.nodes.flags[frames] & F_DEMOTED) != 0

    # -- changes ------------------------------------------------------------------------------------------------

    @abstractmethod
    def protect(self, first: int, count: int) -> int:
        """Put slow pages of [first, first + count) under PROT_NONE; returns how many; one flush for the range."""

    def unprotect(self, pages: Words) -> None:
        """Take PROT_NONE off pages (a fault resolves it; no flush is needed)."""
        _unprotect(self.meter.book, self._table, pages, PRESENT)

    def move(self, pages: Words, node: int, keep: int, *, sync: bool = False, protect: bool = False) -> Mask:
        """Migrate pages to ``node``, leaving ``keep`` frames free there; ``sync``: in the fault path.

        ``protect``: their new entries are PROT_NONE, so that the next access is a hint fault.

        Returns bool[n], false where there was no frame or the page was already there. Content moves along.
        """
        moved = np.zeros(pages.size, np.bool_)
        if pages.size == 0:
            return moved
        frames = self.frames(pages)
        targets = np.empty(pages.size, np.int32)
        _pick_targets(self.meter.book, self.nodes, frames, node, keep, targets)
        moved = targets != NO_PAGE
        count = int(moved.sum())
        if count == 0:
            return moved
        pages, frames, targets = pages[moved], frames[moved], targets[moved]
        _relink(self.meter.book, self.nodes, frames, targets, node)
        each = self.costs.migrate_page_ps + copy_ps(self.costs, node == FAST, node == SLOW)
        self._migrate(pages, frames, targets, node, each + (self.costs.migrate_sync_ps if sync else 0), protect)
        self.counters[C.vmstat__pgmigrate_success] += count
        self.counters[C.bytes__migrated] += count << 12
        return moved

    def exchange(self, slow_pages: Words, fast_pages: Words, *, batched: bool) -> int:
        """Swap the places of pages pairwise, without a free frame; returns the number of pairs swapped.

        ``batched``: one flush for the batch instead of one per page.
        """
        count = min(slow_pages.size, fast_pages.size)
        slow_pages, fast_pages = slow_pages[:count], fast_pages[:count]
        slow_frames, fast_frames = self.frames(slow_pages), self.frames(fast_pages)
        good = (slow_frames >= self._half) & (fast_frames != NO_PAGE) & (fast_frames < self._half)
        good &= ((self.nodes.flags[slow_frames] | self.nodes.flags[fast_frames]) & F_BUSY) == 0
        self.counters[C.vmstat__pgmigrate_fail] += 2 * int(count - good.sum())
        slow_pages, fast_pages = slow_pages[good], fast_pages[good]
        slow_frames, fast_frames = slow_frames[good], fast_frames[good]
        count = int(good.sum())
        if count:
            _relink_pairs(self.meter.book, self.nodes, slow_frames, fast_frames)
            self._swap(slow_pages, slow_frames, fast_pages, fast_frames, batched)
            self.counters[C.vmstat__pgexchange_success] += count
            self.counters[C.bytes__migrated] += count << 13
        return count

    # -- what the views differ in -------------------------------------------------------------------------------

    @abstractmethod
    def _flush_young(self, young: int) -> None:
        """After clearing accessed bits, ``young`` of which were set."""

    @abstractmethod
    def _flush_dirty(self, pages: Words) -> None:
        """After clearing the dirty bits of ``pages``, all of which were set (int64[n], n > 0)."""

    @abstractmethod
    def _migrate(self, pages: Words, frames: Ints, targets: Ints, node: int, cost_ps: int, protect: bool) -> None:
        """Unmap, flush, copy, remap; free the old frames. ``cost_ps``: work per page without flushes."""

    @abstractmethod
    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, batched: bool) -> None:
        """Unmap both, flush, swap contents, remap."""
