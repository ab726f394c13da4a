"""The host's view of a VM's memory: gPA pages to hPA frames through the EPT, with no gVA to invalidate by.

Every change asks for a flush of the whole VM (kvm_flush_remote_tlbs): a young page found while ageing, each at once; a
scanned range, whose leaf entries are all zapped; each migration (virt/kvm/kvm_main.c, mm/mprotect.c). The host works
while the VM is parked, for the quantum to come: what it does is emitted as timestamped operations that the VM's
hardware executes at their times. In an EPT fault the VM waits, so there it acts at once. A huge page is one entry: KVM
zaps all of it whatever part is named.
"""

from collections.abc import Callable

import numpy as np

from guestd.events import EventLog
from guestd.jit import int64
from guestd.meter import Meter, metered
from guestd.mm.nodes import F_BUSY, F_LRU, FAST, Nodes, give_all_free, give_free, lru_remove
from guestd.tiering.pages import Pdes, expand, frame_of
from guestd.tiering.radix import ept_radix
from guestd.tiering.view import PageView
from proto.arrays import Ints, Mask, Words
from proto.config import GuestConfig
from proto.costs import copy_ps
from proto.counters import C, Counters
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT, PROTNONE, WRITABLE, YOUNG
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_STALL, OP_SWAP, OP_ZAP, OPERATION, VmMemory
from proto.units import PAGE_SHIFT, PAGE_SIZE, TABLE_PAGES, TABLE_SHIFT

Operations = np.ndarray[tuple[int], np.dtype[np.void]]
"""OPERATION[n]"""
_MOST_RUNS = 64
"""Sorted runs of operations that may wait before they are merged."""
PUD_PAGES = 1 << 18
"""change_pmd_range notifies once per PUD-sized range: 1 GiB of 4 KiB pages (mm/mprotect.c)."""


@metered
def _count_slow(ept: Words, pde: Pdes, half: int, first: int, count: int) -> tuple[int, int, int]:
    """Backed slow pages of a range that are not under PROT_NONE yet, huge pages among them, entries visited."""
    slow = huge = visited = 0
    page, end = first, first + count
    while page < end:
        number = page >> TABLE_SHIFT
        table_end = min(end, (number + 1) << TABLE_SHIFT)
        visited += 1
        if (pde[number] & HUGE) != 0:
            if page == number << TABLE_SHIFT and (ept[page] & PROTNONE) == 0 and frame_of(ept[page]) >= half:
                slow += TABLE_PAGES
                huge += 1
        elif pde[number] != 0:
            for leaf in range(page, table_end):
                if (ept[leaf] & (WRITABLE | PROTNONE)) == WRITABLE and frame_of(ept[leaf]) >= half:
                    slow += 1
            visited += table_end - page
        page = table_end
    return slow, huge, visited


@metered
def _split_entries(ept: Words, pde: Pdes, heads: Words) -> None:
    """The leaves take over from the entries of huge pages, with A and D; of what was zapped, that it was young."""
    for head in heads:
        number = head >> TABLE_SHIFT
        bits = (int64(pde[number]) & (ACCESSED | DIRTY)) | (ept[head] & YOUNG)
        for leaf in range(head, head + TABLE_PAGES):
            ept[leaf] |= bits
        pde[number] = PRESENT | (bits & ACCESSED)


@metered
def take_bitmap(bitmap: Words, out: Words) -> int:
    """The numbers of the bits that are set, which are cleared; returns how many."""
    found = 0
    for word in range(bitmap.size):
        bits = bitmap[word]
        if bits != 0:
            bitmap[word] = 0
            for bit in range(64):
                if (bits >> bit) & 1:
                    out[found] = 64 * word + bit
                    found += 1
    return found


@metered
def _move_now(ept: Words, stamps: Words, nodes: Nodes, pages: Words, frames: Words, targets: Words) -> None:
    """Copy and remap pages that are not mapped (their VM waits in an EPT fault), and free the sources."""
    for i in range(pages.size):
        stamps[targets[i]] = stamps[frames[i]]
        keep = ~(FRAME_MASK | DIRTY | YOUNG)
        ept[pages[i]] = (ept[pages[i]] & keep) | (targets[i] << FRAME_SHIFT)
        give_free(nodes, frames[i])


@metered
def _give_unmapped(ept: Words, nodes: Nodes) -> None:
    """Free the busy frames that no EPT entry has."""
    for entry in ept:
        if (entry & WRITABLE) != 0:
            nodes.flags[frame_of(entry)] &= ~F_BUSY
    for frame in range(nodes.flags.size):
        if (nodes.flags[frame] & F_BUSY) != 0:
            if (nodes.flags[frame] & F_LRU) != 0:
                lru_remove(nodes, frame)
            give_free(nodes, frame)


def _in_order(operations: Operations) -> Operations:
    """Stably sorted by time."""
    return operations[np.argsort(operations["time_ps"], kind="stable")]


class HostView(PageView):
    """See the module.

    ``operations``: the queue of another view of the same VM, if this one's thread is not the only one at work on it.
    """

    def __init__(self, config: GuestConfig, memory: VmMemory, nodes: Nodes, meter: Meter, counters: Counters,
                 schedule: Callable[[str, int], None], events: EventLog,
                 operations: list[Operations] | None = None) -> None:  # fmt: skip
        shape = ept_radix(memory.ept_upper, memory.ept_pde.size)
        super().__init__(nodes, memory.ept, shape, meter, config.costs, counters, config.vcpus,
                         config.total_pages, schedule)  # fmt: skip
        self._thp = config.host.backs_huge
        self._stamps = memory.stamps
        self._dirty = memory.dirty
        self._walk = memory.walk
        self.hint_fault_ps = config.costs.host_hint_fault_ps
        self.operations: list[Operations] = [] if operations is None else operations
        self._moving: list[tuple[Words, Words, Words]] = []
        """Moves to come: (times, frames they leave, frames they go to), each in order of time."""
        self._events = events
        self.faulting: Words = np.zeros(0, np.int64)
        """Units that the VM waits for in an EPT fault; empty while it does not."""
        self.barrier_ps = 0
        """End of the quantum that the VM is in."""
        self.fault_bytes = np.zeros(4, np.int64)
        """What copies in faults moved: fast read, slow read, fast write, slow write; the VM's hardware books others."""
        self.kicked_permille = 1000
        """Share of the VM's vCPUs that a request kicked in the last quantum: how many the thread waits for."""

    # -- operations for the coming quantum ----------------------------------------------------------------------

    def _emit(self, kind: int, times: Words, a: Words, b: Words, flags: int | Words = 0,
              busy_ps: int | Words = 0) -> None:  # fmt: skip
        times = self._possible(times)
        records = np.zeros(times.size, OPERATION)
        records["time_ps"], records["kind"], records["flags"] = times, kind, flags
        records["a"], records["b"] = a, b
        records["hold_ps"], records["busy_ps"] = self._request_ps(), busy_ps
        self.operations.append(records if (times[1:] >= times[:-1]).all() else _in_order(records))

    def _possible(self, times: Words) -> Words:
        """In a fault, no operation before the next barrier: the VM has those of its quantum."""
        return np.maximum(times, self.barrier_ps) if self.faulting.size else times

    def stall(self, vcpu: int, start_ps: int, duration_ps: int) -> None:
        """The VM's thread for ``vcpu`` does the host's work (task context) instead of running the guest."""
        self._emit(OP_STALL, np.array([start_ps]), np.array([vcpu]), np.array([duration_ps]))

    def take_operations(self, until_ps: int) -> bytes:
        """Operations due before ``until_ps``, in order of time; later ones stay."""
        if not self.operations:
            return b""
        cuts = [int(np.searchsorted(run["time_ps"], until_ps)) for run in self.operations]
        due = np.concatenate([run[:cut] for run, cut in zip(self.operations, cuts, strict=True)])
        left = [run[cut:] for run, cut in zip(self.operations, cuts, strict=True) if cut < run.size]
        # A busy thread's operations reach far ahead, and each barrier comes by here: few runs, seldom merged.
        self.operations[:] = left if len(left) <= _MOST_RUNS else [_in_order(np.concatenate(left))]
        return _in_order(due).tobytes()

    def settle(self, now_ps: int) -> None:
        """The VM has come to ``now_ps``: moves due before that were executed and leave their old frames free."""
        left = []
        for times, frames, targets in self._moving:
            done = int(np.searchsorted(times, now_ps))
            give_all_free(self.nodes, frames[:done])
            self.nodes.flags[targets[:done]] &= np.uint8(0xFF ^ F_BUSY)
            if done < times.size:
                left.append((times[done:], frames[done:], targets[done:]))
        self._moving = left

    def call_off(self) -> None:
        """The VM executes no operation any more: frames that only moves under way hold are free."""
        _give_unmapped(self.meter.book, self._table, self.nodes)
        self._moving.clear()
        self.operations.clear()

    def free(self, node: int) -> int:
        """Free frames of a node, those among them that moves under way are about to leave."""
        leaving = sum(int(((frames >= self._half) == (node != FAST)).sum()) for _, frames, _ in self._moving)
        return super().free(node) + leaving

    def _request_ps(self) -> int:
        """What one flush request costs the thread that asks and waits for the kicked vCPUs."""
        return self.costs.kick_base_ps + self.costs.kick_target_ps * self.vcpus * self.kicked_permille // 1000

    def _flush_young(self, young: int) -> None:
        if young:
            each = self._request_ps()
            times = self.now + each * np.arange(young, dtype=np.int64)
            nothing = np.zeros(young, np.int64)
            self._emit(OP_FLUSH, times, nothing, nothing)
            self.meter.charge(each * young)

    def _flush_scanned(self) -> None:
        nothing = np.zeros(1, np.int64)
        self._emit(OP_FLUSH, np.array([self.now], np.int64), nothing, nothing)
        self.meter.charge(self._request_ps())

    def _flush_dirty(self, pages: Words) -> None:
        self._flush_scanned()

    def request_harvest(self) -> None:
        """Harvest the dirty log (PML) now: `harvest_dirty` has its pages after the barrier that follows.

        KVM_GET_DIRTY_LOG: all vCPUs are kicked, so that their logs are in the bitmap; its pages' D bits are cleared;
        one flush request. Without ``host.pml`` nothing is ever logged.
        """
        clear_ps = np.array([self.costs.scan_pte_ps])
        self._emit(OP_HARVEST, np.array([self.now], np.int64), np.zeros(1, np.int64), clear_ps)
        self.meter.charge(self._request_ps())

    def harvest_dirty(self) -> Words:
        """gPA pages (int64[n], rising) that harvests before this barrier took, page tables too; costs a PTE each."""
        out = np.empty(self._table.size, np.int64)
        count = int(take_bitmap(self.meter.book, self._dirty[1], out))
        self.meter.charge(self.costs.scan_pte_ps * count)
        return out[:count].copy()

    def unmap(self, pages: Words, cost_ps: int) -> Words:
        """Take pages (int64[n]) from the VM, each with a zap and flush of its own, and ``cost_ps`` more work.

        What reclaim does before it swaps out, and how a page that a balloon gave up leaves the EPT. Returns when each
        is zapped, ps (int64[n]). Until the caller has disposed of the frames they are busy: nobody moves them. A huge
        page is split first; what is taken is the pages that are named.
        """
        self.split(pages)
        each = cost_ps + self.costs.zap_pte_ps + self._request_ps()
        times = self.now + each * np.arange(pages.size, dtype=np.int64)
        self._emit(OP_ZAP, times, pages, np.ones(pages.size, np.int64))
        self.nodes.flags[self.frames(pages)] |= F_BUSY
        self.meter.charge(each * pages.size)
        return times

    def protect(self, first: int, count: int) -> int:
        count = self._clip(first, count)
        if self._thp:
            # task_numa_work rounds to whole huge pages.
            end = min(self.pages, (first + count + TABLE_PAGES - 1) & -TABLE_PAGES)
            first &= -TABLE_PAGES
            count = end - first
        total = 0
        for start in range(first, first + count, PUD_PAGES):
            length = min(PUD_PAGES, first + count - start)
            slow, huge, visited = _count_slow(self.meter.book, self._table, self._pde, self._half, start, length)
            one = np.array([self.now], np.int64)
            busy_ps = (self.costs.protect_pte_ps + self.costs.zap_pte_ps) * visited + self._request_ps()
            self._emit(OP_ZAP, one, np.array([start], np.int64), np.array([length], np.int64), PROTNONE, busy_ps)
            self.meter.charge(busy_ps)
            self.counters[C.vmstat__numa_pte_updates] += slow
            self.counters[C.vmstat__numa_huge_pte_updates] += huge
            total += slow
        return total

    def _busy(self, times: Words, frames: Words, targets: Words) -> None:
        """Until a move at its time is executed, nobody may move its page again, known by either frame."""
        self.nodes.flags[targets] |= F_BUSY
        self.nodes.flags[frames] |= F_BUSY
        self._moving.append((self._possible(times), frames, targets))

    def _migrate(self, pages: Words, frames: Ints, targets: Ints, sizes: Words, node: int, cost_ps: Words,
                 protect: bool, copied: bool) -> None:  # fmt: skip
        assert not copied, "no host-side policy write-protects"
        # What the VM waits for was not mapped and is in no TLB; a ranking in the fault may move other pages, too.
        now = np.isin(pages, self.faulting)
        for part, migrate in ((now, self._migrate_now), (~now, self._migrate_later)):
            if part.any():
                migrate(pages[part], frames[part], targets[part], sizes[part], node, cost_ps[part], protect)
        leaves = expand(pages, sizes)
        self._events.add(self.now, "promote" if node == FAST else "demote", leaves << PAGE_SHIFT, 1 - node, node)

    def _migrate_now(self, pages: Words, frames: Ints, targets: Ints, sizes: Words, node: int, cost_ps: Words,
                     protect: bool) -> None:  # fmt: skip
        leaves, sources, places = expand(pages, sizes), expand(frames, sizes), expand(targets, sizes)
        slow = int((sources >= self._half).sum())
        self.fault_bytes[:2] += PAGE_SIZE * np.array((sources.size - slow, slow))
        self.fault_bytes[2 + node] += PAGE_SIZE * sources.size
        _move_now(self.meter.book, self._table, self._stamps, self.nodes, leaves, sources, places)
        self.meter.charge(int(cost_ps.sum()))

    def _migrate_later(self, pages: Words, frames: Ints, targets: Ints, sizes: Words, node: int, cost_ps: Words,
                       protect: bool) -> None:  # fmt: skip
        each = cost_ps + self._request_ps()
        times = self.now + np.cumsum(each) - each
        flags = np.where(sizes > 1, HUGE, 0) | (PROTNONE if protect else 0)
        self._emit(OP_MOVE, times, pages, targets.astype(np.int64), flags, each)
        self._busy(np.repeat(times, sizes), expand(frames, sizes), expand(targets, sizes))
        self.meter.charge(int(each.sum()))

    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, sizes: Words,
              batched: bool) -> None:  # fmt: skip
        """Each pair has a flush of its own: the host has no address to batch by (``batched`` changes nothing)."""
        costs = self.costs
        copies = (copy_ps(costs, True, False) + copy_ps(costs, False, True)) * sizes
        each = 2 * costs.migrate_page_ps + copies + self._request_ps()
        times = self.now + np.cumsum(each) - each
        self._emit(OP_SWAP, times, slow_pages, fast_pages, np.where(sizes > 1, HUGE, 0), each)
        both = expand(np.stack([slow_frames, fast_frames], axis=1).reshape(-1), np.repeat(sizes, 2))
        self._busy(np.repeat(times, 2 * sizes), both[:0], both)
        self.meter.charge(int(each.sum()))
        self._events.add(self.now, "promote", expand(slow_pages, sizes) << PAGE_SHIFT, 1, FAST)
        self._events.add(self.now, "demote", expand(fast_pages, sizes) << PAGE_SHIFT, FAST, 1)

    def _split(self, heads: Words) -> Mask:
        """The EPT follows at once; what it maps of them is zapped at its time, as split_huge_pmd notifies KVM."""
        mapped = heads[(self._table[heads] & PRESENT) != 0]
        each = self.costs.split_huge_ps + self.costs.zap_pte_ps + self._request_ps()
        times = self.now + each * np.arange(mapped.size, dtype=np.int64)
        _split_entries(self.meter.book, self._table, self._pde, heads)
        self._emit(OP_ZAP, times, mapped, np.full(mapped.size, TABLE_PAGES), 0, each)
        self.meter.charge(each * mapped.size + self.costs.split_huge_ps * (heads.size - mapped.size))
        return np.ones(heads.size, np.bool_)

    def _collapse(self, pages: Words, frames: Ints, target: int, cost_ps: int) -> None:
        each = cost_ps + self.costs.zap_pte_ps * TABLE_PAGES + self._request_ps()
        times = np.array([self.now], np.int64)
        self._emit(OP_MOVE, times, pages[:1], np.array([target], np.int64), HUGE, each)
        places = np.arange(target, target + TABLE_PAGES, dtype=np.int64)
        self._busy(np.repeat(times, TABLE_PAGES), frames.astype(np.int64), places)
        self.meter.charge(each)

    def pages_at(self, addresses: Words) -> Words:
        pages = addresses >> PAGE_SHIFT
        return np.where((pages >= 0) & (pages < self.pages), pages, -1)

    def addresses(self, pages: Words) -> Words:
        return pages << PAGE_SHIFT

    def page_range(self, start: int, end: int) -> tuple[int, int]:
        first = min(start >> PAGE_SHIFT, self.pages)
        return first, min(end >> PAGE_SHIFT, self.pages) - first

    def address_bounds(self) -> tuple[int, int]:
        return 0, self.pages << PAGE_SHIFT
