"""The guest's view of memory: gVA pages to gPA frames, single-address invalidation, IPI shootdowns.

Invalidation as Linux on x86 does it (arch/x86/mm/tlb.c): one page by INVLPG on every vCPU that runs the process, a
range above `tlb_single_page_flush_ceiling` by a full flush; clearing an accessed bit flushes nothing
(arch/x86/mm/pgtable.c, ptep_clear_flush_young). Migration flushes once per page as in 5.15, or once per batch from 6.3
on (`GuestKernel.batched_unmap_flush`). None of it touches guest-physical mappings.
"""

from collections.abc import Callable

import numpy as np

from guestd.events import EventLog
from guestd.jit import inline
from guestd.machine import Machine
from guestd.meter import MIGRATE, TASK, Meter, metered
from guestd.mm.nodes import FAST, Nodes, give_free
from guestd.pml import P_ON, Pml, log_dirty
from guestd.tiering.view import PageView
from guestd.vcpu import CLOCK, IDLE, drop_guest_everywhere, drop_pages_everywhere
from proto.arrays import Bytes, Ints, Words
from proto.config import GuestConfig
from proto.costs import copy_ps
from proto.counters import C, Counters
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE
from proto.units import PAGE_SHIFT, PAGE_SIZE, TABLE_PAGES, TABLE_SHIFT

EptFaultCall = Callable[[int, Words, Bytes], Words]
"""``(time_ps, gpfns int64[n], write uint8[n]) -> cost_ps int64[n]``: the `EptFault` hypercall."""

MIGRATE_BATCH = 512
"""Pages per flush when unmapping is batched (mm/migrate.c, NR_MAX_BATCHED_MIGRATION)."""


@metered
def _protect(gpt: Words, half: int, first: int, count: int) -> int:
    changed = 0
    for page in range(first, first + count):
        entry = gpt[page]
        if (entry & PRESENT) != 0 and ((entry & FRAME_MASK) >> FRAME_SHIFT) >= half:
            gpt[page] = (entry & ~PRESENT) | PROTNONE
            changed += 1
    return changed


@inline
def _write(ept: Words, gpfn: int, pml: Pml, vcpu: int, counters: Counters) -> int:
    """The kernel writes a whole frame: A and D, and a log entry; what the exit for a full log took, ps."""
    entry = ept[gpfn]
    ept[gpfn] = entry | ACCESSED | DIRTY
    if (entry & DIRTY) == 0 and pml.params[P_ON] != 0:
        return log_dirty(pml, vcpu, gpfn, 0, counters)
    return 0


@metered
def _copy_and_map(
    gpt: Words, ept: Words, stamps: Words, nodes: Nodes, pages: Words, frames: Ints, targets: Ints, protnone: int,
    pml: Pml, vcpu: int, counters: Counters,
) -> int:  # fmt: skip
    """Copy contents gPA to gPA through the EPT, point the entries at the targets (old, clean), free the sources.

    Returns what exits for a full log of dirty pages took, ps.
    """
    exits_ps = 0
    for i in range(pages.size):
        source = (ept[frames[i]] & FRAME_MASK) >> FRAME_SHIFT
        entry = ept[targets[i]]
        stamps[(entry & FRAME_MASK) >> FRAME_SHIFT] = stamps[source]
        exits_ps += _write(ept, targets[i], pml, vcpu, counters)
        ept[frames[i]] |= ACCESSED
        old = gpt[pages[i]]
        entry = (old & ~(FRAME_MASK | ACCESSED | DIRTY)) | (np.int64(targets[i]) << FRAME_SHIFT)
        if protnone != 0:
            entry = (entry & ~PRESENT) | protnone
        gpt[pages[i]] = entry
        give_free(nodes, frames[i])
    return exits_ps


@metered
def _swap_contents(gpt: Words, ept: Words, stamps: Words, pages: Words, frames: Ints, others: Words,
                   other_frames: Ints, pml: Pml, vcpu: int, counters: Counters) -> int:  # fmt: skip
    """Exchange contents through the EPT, and where the entries point; returns what exits for a full log took, ps."""
    exits_ps = 0
    for i in range(pages.size):
        a, b = frames[i], other_frames[i]
        slot_a, slot_b = (ept[a] & FRAME_MASK) >> FRAME_SHIFT, (ept[b] & FRAME_MASK) >> FRAME_SHIFT
        stamps[slot_a], stamps[slot_b] = stamps[slot_b], stamps[slot_a]
        exits_ps += _write(ept, a, pml, vcpu, counters)
        exits_ps += _write(ept, b, pml, vcpu, counters)
        keep = ~(FRAME_MASK | ACCESSED | DIRTY)
        gpt[pages[i]] = (gpt[pages[i]] & keep) | (np.int64(b) << FRAME_SHIFT)
        gpt[others[i]] = (gpt[others[i]] & keep) | (np.int64(a) << FRAME_SHIFT)
    return exits_ps


class GuestView(PageView):
    """See the module. ``vcpu`` is the vCPU that the work in progress runs on (set by the scheduler)."""

    def __init__(self, machine: Machine, nodes: Nodes, meter: Meter, config: GuestConfig,
                 schedule: Callable[[str, int], None], ept_fault: EptFaultCall, events: EventLog) -> None:  # fmt: skip
        super().__init__(nodes, machine.gpt, meter, config.costs, machine.counters, machine.vcpus.field.shape[0],
                         machine.gpt.size, schedule)  # fmt: skip
        self._machine = machine
        self._kernel = config.kernel
        self._events = events
        self._ept_fault = ept_fault
        self.vcpu = 0

    def page_range(self, start: int, end: int) -> tuple[int, int]:
        low, high = np.searchsorted(self._machine.table_gva, (start, end))
        return int(low) << TABLE_SHIFT, int(high - low) << TABLE_SHIFT

    def address_bounds(self) -> tuple[int, int]:
        tables = self._machine.table_gva
        return int(tables[0]), int(tables[-1]) + (PAGE_SIZE << TABLE_SHIFT)

    def protect(self, first: int, count: int) -> int:
        count = self._clip(first, count)
        changed = int(_protect(self.meter.book, self._table, self._half, first, count))
        self.meter.charge(self.costs.protect_pte_ps * count)
        self.counters[C.vmstat__numa_pte_updates] += changed
        if changed:
            # mmu_gather covers the range from first to last changed page.
            self._flush_range(np.arange(first, first + count, dtype=np.int64))
        return changed

    def flush_all(self) -> None:
        """flush_tlb_mm: a full flush here and on every other vCPU that runs the process."""
        drop_guest_everywhere(self._machine.vcpus)
        self.counters[C.vmstat__nr_tlb_local_flush_all] += 1
        self.counters[C.instr__mov_cr3] += 1
        self.meter.charge(self.costs.cr3_flush_ps)
        received = self._shootdown(1, self.costs.cr3_flush_ps)
        self.counters[C.instr__mov_cr3] += received

    def flush_pages(self, pages: Words, requests: int) -> None:
        """Invalidate each page here and elsewhere with ``requests`` remote requests altogether."""
        drop_pages_everywhere(self._machine.vcpus, pages)
        self.counters[C.vmstat__nr_tlb_local_flush_one] += pages.size
        self.counters[C.instr__invlpg] += pages.size
        self.meter.charge(self.costs.invlpg_ps * pages.size)
        received = self._shootdown(requests, self.costs.invlpg_ps * pages.size // requests)
        self.counters[C.instr__invlpg] += received * (pages.size // requests)

    def _shootdown(self, requests: int, flush_ps: int) -> int:
        """IPIs to the other busy vCPUs: the initiator waits, the targets lose time. Returns IPIs received."""
        field = self._machine.vcpus.field
        others = [v for v in range(self.vcpus) if v != self.vcpu and not field[v, IDLE]]
        if self.vcpus == 1:
            return 0
        self.counters[C.vmstat__nr_tlb_remote_flush] += requests
        received = requests * len(others)
        self.counters[C.vmstat__nr_tlb_remote_flush_received] += received
        if others:
            self.meter.charge(requests * (self.costs.shootdown_base_ps + self.costs.shootdown_target_ps * len(others)))
            lost = requests * (self.costs.ipi_receive_ps + flush_ps)
            field[others, CLOCK] += lost
            self.counters[C.time__stolen_ps] += lost * len(others)
        return received

    def _flush_young(self, young: int) -> None:
        """Nothing: x86 leaves the stale entry, at worst the page looks idle for a while."""

    def _flush_dirty(self, pages: Words) -> None:
        self._flush_range(pages)

    def _flush_range(self, pages: Words) -> None:
        """One mmu_gather: short ranges page by page, others whole."""
        if pages.size > self._kernel.single_page_flush_ceiling:
            self.flush_all()
        else:
            self.flush_pages(pages, requests=1)

    def _flush_unmapped(self, pages: Words, batched: bool) -> None:
        # ptep_clear_flush (mm/pgtable-generic.c) flushes only what a TLB can hold: not a PROT_NONE entry, so a
        # promotion in the hint fault flushes nothing since the fault maps the page late (b99a342d4f11, Linux 5.13).
        pages = pages[(self._table[pages] & PRESENT) != 0]
        if batched:
            for _ in range(0, pages.size, MIGRATE_BATCH):
                self.flush_all()
        elif pages.size:
            self.flush_pages(pages, requests=pages.size)

    def _back(self, frames: Ints) -> None:
        """Have the host map frames before a copy, as its first access would."""
        machine = self._machine
        missing = frames[(machine.ept[frames] & PRESENT) == 0].astype(np.int64)
        if missing.size:
            cost = self._ept_fault(self.now, missing, np.ones(missing.size, np.uint8))
            self.counters[C.exit__ept_violation] += missing.size
            self.counters[C.time__exit_ps] += int(cost.sum())
            self.meter.charge(int(cost.sum()))

    def _gva(self, pages: Words) -> Words:
        return self._machine.table_gva[pages >> TABLE_SHIFT] + ((pages & (TABLE_PAGES - 1)) << PAGE_SHIFT)

    def _traffic(self, source: int, target: int, pages: int) -> None:
        """Migration traffic uses the tiers' bandwidth like any other."""
        budget = self._machine.budget
        budget[0, source] -= pages * PAGE_SIZE
        budget[1, target] -= pages * PAGE_SIZE

    def _migrate(self, pages: Words, frames: Ints, targets: Ints, node: int, cost_ps: int, protect: bool) -> None:
        machine = self._machine
        self._back(np.concatenate([frames, targets]))
        self._flush_unmapped(pages, self._kernel.batched_unmap_flush and self.meter.context != TASK)
        exits_ps = _copy_and_map(self.meter.book, machine.gpt, machine.ept, machine.stamps, self.nodes, pages, frames,
                                 targets, PROTNONE if protect else 0, machine.pml, self.vcpu,
                                 machine.counters)  # fmt: skip
        self.meter.charge(exits_ps)
        self._traffic(1 - node, node, pages.size)
        self.meter.charge(cost_ps * pages.size)
        self._events.add(self.now, "promote" if node == FAST else "demote", self._gva(pages), 1 - node, node)

    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, batched: bool) -> None:
        machine, costs = self._machine, self.costs
        with self.meter.stage(MIGRATE):
            self._back(np.concatenate([slow_frames, fast_frames]))
            self._flush_unmapped(np.concatenate([slow_pages, fast_pages]), batched)
            exits_ps = _swap_contents(self.meter.book, machine.gpt, machine.ept, machine.stamps, slow_pages,
                                      slow_frames, fast_pages, fast_frames, machine.pml, self.vcpu,
                                      machine.counters)  # fmt: skip
            self.meter.charge(exits_ps)
            self._traffic(1, FAST, slow_pages.size)
            self._traffic(FAST, 1, slow_pages.size)
            each = 2 * costs.migrate_page_ps + copy_ps(costs, True, False) + copy_ps(costs, False, True)
            self.meter.charge(each * slow_pages.size)
        self._events.add(self.now, "promote", self._gva(slow_pages), 1, FAST)
        self._events.add(self.now, "demote", self._gva(fast_pages), FAST, 1)
