"""The host's view of a VM's memory: gPA pages to hPA frames through the EPT, with no gVA to invalidate by.

Every change asks for a flush of the whole VM (kvm_flush_remote_tlbs): a young page found while ageing, each at once; a
scanned range, whose leaf entries are all zapped; each migration (virt/kvm/kvm_main.c, mm/mprotect.c). The host works
while the VM is parked, for the quantum to come: what it does is emitted as timestamped operations that the VM's
hardware executes at their times. In an EPT fault the VM waits, so there it acts at once.
"""

from collections.abc import Callable

import numpy as np

from guestd.events import EventLog
from guestd.meter import Meter, metered
from guestd.mm.nodes import F_BUSY, FAST, Nodes, give_all_free, give_free
from guestd.tiering.view import PageView
from proto.arrays import Ints, Words
from proto.config import GuestConfig
from proto.costs import copy_ps
from proto.counters import C, Counters
from proto.entry import DIRTY, FRAME_MASK, FRAME_SHIFT, PROTNONE, WRITABLE, YOUNG
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_STALL, OP_SWAP, OP_ZAP, OPERATION, VmMemory
from proto.units import PAGE_SHIFT, PAGE_SIZE

Operations = np.ndarray[tuple[int], np.dtype[np.void]]
"""OPERATION[n]"""
PUD_PAGES = 1 << 18
"""change_pmd_range notifies once per PUD-sized range: 1 GiB of 4 KiB pages (mm/mprotect.c)."""


@metered
def _count_slow(ept: Words, half: int, first: int, count: int) -> int:
    """Backed slow pages of a range that are not under PROT_NONE yet."""
    slow = 0
    for page in range(first, first + count):
        entry = ept[page]
        if (entry & WRITABLE) != 0 and (entry & PROTNONE) == 0 and ((entry & FRAME_MASK) >> FRAME_SHIFT) >= half:
            slow += 1
    return slow


@metered
def _take_bitmap(bitmap: Words, out: Words) -> int:
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
def _move_now(ept: Words, stamps: Words, nodes: Nodes, pages: Words, frames: Ints, targets: Ints) -> None:
    """Copy and remap pages that are not mapped (their VM waits in an EPT fault), and free the sources."""
    for i in range(pages.size):
        stamps[targets[i]] = stamps[frames[i]]
        keep = ~(FRAME_MASK | DIRTY | YOUNG)
        ept[pages[i]] = (ept[pages[i]] & keep) | (np.int64(targets[i]) << FRAME_SHIFT)
        give_free(nodes, frames[i])


class HostView(PageView):
    """See the module. ``in_fault``: the VM waits for the answer to an EPT fault.

    ``operations``: the queue of another view of the same VM, if this one's thread is not the only one at work on it.
    """

    def __init__(self, config: GuestConfig, memory: VmMemory, nodes: Nodes, meter: Meter, counters: Counters,
                 schedule: Callable[[str, int], None], events: EventLog,
                 operations: list[Operations] | None = None) -> None:  # fmt: skip
        super().__init__(nodes, memory.ept, meter, config.costs, counters, config.vcpus, config.total_pages, schedule)
        self._stamps = memory.stamps
        self._dirty = memory.dirty
        self.hint_fault_ps = config.costs.host_hint_fault_ps
        self.operations: list[Operations] = [] if operations is None else operations
        self._moving: list[tuple[Words, Ints, Ints]] = []
        """Moves to come: (times, frames they leave, frames they go to), each in order of time."""
        self._events = events
        self.in_fault = False
        self.fault_bytes = np.zeros(4, np.int64)
        """What copies in faults moved: fast read, slow read, fast write, slow write; the VM's hardware books others."""
        self.kicked_permille = 1000
        """Share of the VM's vCPUs that a request kicked in the last quantum: how many the thread waits for."""

    # -- operations for the coming quantum ----------------------------------------------------------------------

    def _emit(self, kind: int, times: Words, a: Words, b: Words, flags: int = 0, busy_ps: int = 0) -> None:
        records = np.zeros(times.size, OPERATION)
        records["time_ps"], records["kind"], records["flags"] = times, kind, flags
        records["a"], records["b"] = a, b
        records["hold_ps"], records["busy_ps"] = self._request_ps(), busy_ps
        self.operations.append(records)

    def stall(self, vcpu: int, start_ps: int, duration_ps: int) -> None:
        """The VM's thread for ``vcpu`` does the host's work (task context) instead of running the guest."""
        self._emit(OP_STALL, np.array([start_ps]), np.array([vcpu]), np.array([duration_ps]))

    def take_operations(self, until_ps: int) -> bytes:
        """Operations due before ``until_ps``, in order of time; later ones stay."""
        if not self.operations:
            return b""
        pending = np.concatenate(self.operations)
        pending = pending[np.argsort(pending["time_ps"], kind="stable")]
        due = int(np.searchsorted(pending["time_ps"], until_ps))
        self.operations[:] = [pending[due:]] if due < pending.size else []
        return pending[:due].tobytes()

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

    def _flush_dirty(self, pages: Words) -> None:
        nothing = np.zeros(1, np.int64)
        self._emit(OP_FLUSH, np.array([self.now], np.int64), nothing, nothing)
        self.meter.charge(self._request_ps())

    def request_harvest(self) -> None:
        """Harvest the dirty log (PML) now: `harvest_dirty` has its pages after the barrier that follows.

        KVM_GET_DIRTY_LOG: all vCPUs are kicked, so that their logs are in the bitmap; its pages' D bits are cleared;
        one flush request. Without ``host.pml`` nothing is ever logged.
        """
        nothing = np.zeros(1, np.int64)
        self._emit(OP_HARVEST, np.array([self.now], np.int64), nothing, nothing)
        self.meter.charge(self._request_ps())

    def harvest_dirty(self) -> Words:
        """gPA pages (int64[n], rising) that harvests before this barrier took, page tables too; costs a PTE each."""
        out = np.empty(self._table.size, np.int64)
        count = int(_take_bitmap(self.meter.book, self._dirty[1], out))
        self.meter.charge(self.costs.scan_pte_ps * count)
        return out[:count].copy()

    def unmap(self, pages: Words, cost_ps: int) -> Words:
        """Take pages (int64[n]) from the VM, each with a zap and flush of its own, and ``cost_ps`` more work.

        What reclaim does before it swaps out, and how a page that a balloon gave up leaves the EPT. Returns when each
        is zapped, ps (int64[n]). Until the caller has disposed of the frames they are busy: nobody moves them.
        """
        each = cost_ps + self.costs.zap_pte_ps + self._request_ps()
        times = self.now + each * np.arange(pages.size, dtype=np.int64)
        self._emit(OP_ZAP, times, pages, np.ones(pages.size, np.int64))
        self.nodes.flags[self.frames(pages)] |= F_BUSY
        self.meter.charge(each * pages.size)
        return times

    def protect(self, first: int, count: int) -> int:
        count = self._clip(first, count)
        slow = int(_count_slow(self.meter.book, self._table, self._half, first, count))
        self.counters[C.vmstat__numa_pte_updates] += slow
        for start in range(first, first + count, PUD_PAGES):
            length = min(PUD_PAGES, first + count - start)
            one = np.array([self.now], np.int64)
            busy_ps = (self.costs.protect_pte_ps + self.costs.zap_pte_ps) * length + self._request_ps()
            self._emit(OP_ZAP, one, np.array([start], np.int64), np.array([length], np.int64), PROTNONE, busy_ps)
            self.meter.charge(busy_ps)
        return slow

    def _migrate(self, pages: Words, frames: Ints, targets: Ints, node: int, cost_ps: int, protect: bool) -> None:
        if self.in_fault:
            slow = int((frames >= self._half).sum())
            self.fault_bytes[:2] += PAGE_SIZE * np.array((frames.size - slow, slow))
            self.fault_bytes[2 + node] += PAGE_SIZE * frames.size
            _move_now(self.meter.book, self._table, self._stamps, self.nodes, pages, frames, targets)
            self.meter.charge(cost_ps * pages.size)
        else:
            each = cost_ps + self._request_ps()
            times = self.now + each * np.arange(pages.size, dtype=np.int64)
            self._emit(OP_MOVE, times, pages, targets.astype(np.int64), PROTNONE if protect else 0, each)
            # Until a move is executed, nobody may move its page again, known by either frame.
            self.nodes.flags[targets] |= F_BUSY
            self.nodes.flags[frames] |= F_BUSY
            self._moving.append((times, frames, targets))
            self.meter.charge(each * pages.size)
        self._events.add(self.now, "promote" if node == FAST else "demote", pages << PAGE_SHIFT, 1 - node, node)

    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, batched: bool) -> None:
        """Each pair has a flush of its own: the host has no address to batch by (``batched`` changes nothing)."""
        costs = self.costs
        each = (
            2 * costs.migrate_page_ps + copy_ps(costs, True, False) + copy_ps(costs, False, True) + self._request_ps()
        )
        times = self.now + each * np.arange(slow_pages.size, dtype=np.int64)
        self._emit(OP_SWAP, times, slow_pages, fast_pages, 0, each)
        both = np.stack([slow_frames, fast_frames], axis=1).reshape(-1)
        self.nodes.flags[both] |= F_BUSY
        self._moving.append((np.repeat(times, 2), np.zeros(0, np.int32), both))
        self.meter.charge(each * slow_pages.size)
        self._events.add(self.now, "promote", slow_pages << PAGE_SHIFT, 1, FAST)
        self._events.add(self.now, "demote", fast_pages << PAGE_SHIFT, FAST, 1)

    def page_range(self, start: int, end: int) -> tuple[int, int]:
        first = min(start >> PAGE_SHIFT, self.pages)
        return first, min(end >> PAGE_SHIFT, self.pages) - first

    def address_bounds(self) -> tuple[int, int]:
        return 0, self.pages << PAGE_SHIFT
