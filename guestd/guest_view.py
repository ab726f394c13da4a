"""The guest's view of memory: gVA pages to gPA frames, single-address invalidation, IPI shootdowns.

Invalidation is the guest kernel's (`guestd.flush`); clearing an accessed bit flushes nothing (arch/x86/mm/pgtable.c,
ptep_clear_flush_young). Migration flushes once per page as in 5.15, or once per batch from 6.3 on
(`GuestKernel.batched_unmap_flush`).
"""

from collections.abc import Callable

import numpy as np

from guestd.events import EventLog
from guestd.flush import TlbFlush
from guestd.machine import Machine
from guestd.meter import MIGRATE, TASK, Meter, metered
from guestd.mm.nodes import FAST, Nodes, give_free
from guestd.pml import Pml, set_dirty
from guestd.tiering.view import PageView
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


@metered
def _copy_and_map(
    gpt: Words, ept: Words, stamps: Words, nodes: Nodes, pages: Words, frames: Ints, targets: Ints, protnone: int,
    pml: Pml, vcpu: int, counters: Counters,
) -> None:  # fmt: skip
    """Copy contents gPA to gPA through the EPT, point the entries at the targets (old, clean), free the sources."""
    for i in range(pages.size):
        source = (ept[frames[i]] & FRAME_MASK) >> FRAME_SHIFT
        entry = ept[targets[i]]
        stamps[(entry & FRAME_MASK) >> FRAME_SHIFT] = stamps[source]
        set_dirty(pml, vcpu, ept, targets[i], 0, counters)
        ept[frames[i]] |= ACCESSED
        old = gpt[pages[i]]
        entry = (old & ~(FRAME_MASK | ACCESSED | DIRTY)) | (np.int64(targets[i]) << FRAME_SHIFT)
        if protnone != 0:
            entry = (entry & ~PRESENT) | protnone
        gpt[pages[i]] = entry
        give_free(nodes, frames[i])


@metered
def _swap_contents(gpt: Words, ept: Words, stamps: Words, pages: Words, frames: Ints, others: Words,
                   other_frames: Ints, pml: Pml, vcpu: int, counters: Counters) -> None:  # fmt: skip
    for i in range(pages.size):
        a, b = frames[i], other_frames[i]
        slot_a, slot_b = (ept[a] & FRAME_MASK) >> FRAME_SHIFT, (ept[b] & FRAME_MASK) >> FRAME_SHIFT
        stamps[slot_a], stamps[slot_b] = stamps[slot_b], stamps[slot_a]
        set_dirty(pml, vcpu, ept, a, 0, counters)
        set_dirty(pml, vcpu, ept, b, 0, counters)
        keep = ~(FRAME_MASK | ACCESSED | DIRTY)
        gpt[pages[i]] = (gpt[pages[i]] & keep) | (np.int64(b) << FRAME_SHIFT)
        gpt[others[i]] = (gpt[others[i]] & keep) | (np.int64(a) << FRAME_SHIFT)


class GuestView(PageView):
    """See the module. ``flush.vcpu`` is the vCPU that the work in progress runs on (set by the scheduler)."""

    def __init__(self, machine: Machine, nodes: Nodes, meter: Meter, config: GuestConfig,
                 schedule: Callable[[str, int], None], ept_fault: EptFaultCall, events: EventLog) -> None:  # fmt: skip
        super().__init__(nodes, machine.gpt, meter, config.costs, machine.counters, machine.vcpus.field.shape[0],
                         machine.gpt.size, schedule)  # fmt: skip
        self._machine = machine
        self._kernel = config.kernel
        self._events = events
        self._ept_fault = ept_fault
        self.flush = TlbFlush(machine, config.kernel, config.costs, meter)

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
            self.flush.range(np.arange(first, first + count, dtype=np.int64))
        return changed

    def _flush_young(self, young: int) -> None:
        """Nothing: x86 leaves the stale entry, at worst the page looks idle for a while."""

    def _flush_dirty(self, pages: Words) -> None:
        self.flush.range(pages)

    def _flush_unmapped(self, pages: Words, batched: bool) -> None:
        # ptep_clear_flush (mm/pgtable-generic.c) flushes only what a TLB can hold: not a PROT_NONE entry, so a
        # promotion in the hint fault flushes nothing since the fault maps the page late (b99a342d4f11, Linux 5.13).
        pages = pages[(self._table[pages] & PRESENT) != 0]
        if batched:
            for _ in range(0, pages.size, MIGRATE_BATCH):
                self.flush.all()
        elif pages.size:
            self.flush.pages(pages, requests=pages.size)

    def _back(self, frames: Ints) -> None:
        """Have the host map frames before a copy, as its first access would."""
        machine = self._machine
        missing = frames[(machine.ept[frames] & PRESENT) == 0].astype(np.int64)
        if missing.size:
            cost = self._ept_fault(self.now, missing, np.ones(missing.size, np.uint8))
            self.counters[C.exit__ept_violation] += missing.size
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
        _copy_and_map(self.meter.book, machine.gpt, machine.ept, machine.stamps, self.nodes, pages, frames, targets,
                      PROTNONE if protect else 0, machine.pml, self.flush.vcpu, machine.counters)  # fmt: skip
        self._traffic(1 - node, node, pages.size)
        self.meter.charge(cost_ps * pages.size)
        self._events.add(self.now, "promote" if node == FAST else "demote", self._gva(pages), 1 - node, node)

    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, batched: bool) -> None:
        machine, costs = self._machine, self.costs
        with self.meter.stage(MIGRATE):
            self._back(np.concatenate([slow_frames, fast_frames]))
            self._flush_unmapped(np.concatenate([slow_pages, fast_pages]), batched)
            _swap_contents(self.meter.book, machine.gpt, machine.ept, machine.stamps, slow_pages, slow_frames,
                           fast_pages, fast_frames, machine.pml, self.flush.vcpu, machine.counters)  # fmt: skip
            self._traffic(1, FAST, slow_pages.size)
            self._traffic(FAST, 1, slow_pages.size)
            each = 2 * costs.migrate_page_ps + copy_ps(costs, True, False) + copy_ps(costs, False, True)
            self.meter.charge(each * slow_pages.size)
        self._events.add(self.now, "promote", self._gva(slow_pages), 1, FAST)
        self._events.add(self.now, "demote", self._gva(fast_pages), FAST, 1)
