"""The guest's view of memory: gVA pages to gPA frames, single-address invalidation, IPI shootdowns.

Invalidation is the guest kernel's (`guestd.flush`); clearing an accessed bit flushes nothing (arch/x86/mm/pgtable.c,
ptep_clear_flush_young). Migration flushes once per page as in 5.15, or once per batch from 6.3 on
(`GuestKernel.batched_unmap_flush`), but always once per huge page.
"""

from collections.abc import Callable

import numpy as np

from guestd.events import EventLog
from guestd.fault import clear_fresh
from guestd.flush import TlbFlush
from guestd.guest_copy import Copies
from guestd.jit import inline
from guestd.kvm import take_violations
from guestd.machine import Machine
from guestd.meter import MIGRATE, TASK, Meter, metered
from guestd.mm.nodes import FAST, NO_PAGE, SLOW, Nodes, allocate, give_all_free, give_free
from guestd.pml import set_accessed, set_dirty
from guestd.tiering.host_scan import HostScan
from guestd.tiering.pages import Pdes, expand, frame_of
from guestd.tiering.radix import radix_of
from guestd.transaction import unshadowed
from guestd.vcpu import AGENT, book
from proto.arrays import Ints, Mask, Words
from proto.config import GuestConfig
from proto.costs import copy_ps
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    STAMP_TABLE_BASE,
    WRITABLE,
)
from proto.units import PAGE_SHIFT, PAGE_SIZE, TABLE_PAGES, TABLE_SHIFT

EptFaultCall = Callable[[int, Words], Words]
"""``(time_ps, gpfns int64[n], write uint8[n]) -> cost_ps int64[n]``: the `EptFault` hypercall."""

MIGRATE_BATCH = 512
"""Pages per flush when unmapping is batched (mm/migrate.c, NR_MAX_BATCHED_MIGRATION)."""


@metered
def _pages_at(table_gva: Words, addresses: Words, out: Words) -> None:
    """The page of each address by its leaf table, -1 where there is no table."""
    for i in range(addresses.size):
        table = np.searchsorted(table_gva, addresses[i], side="right") - 1
        inside = table >= 0 and addresses[i] - table_gva[table] < TABLE_PAGES << PAGE_SHIFT
        out[i] = (table << TABLE_SHIFT) | ((addresses[i] - table_gva[table]) >> PAGE_SHIFT) if inside else -1


@metered
def _addresses(table_gva: Words, pages: Words, out: Words) -> None:
    for i in range(pages.size):
        out[i] = table_gva[pages[i] >> TABLE_SHIFT] + ((pages[i] & (TABLE_PAGES - 1)) << PAGE_SHIFT)


@metered
def _protect(gpt: Words, pde: Pdes, half: int, first: int, count: int) -> tuple[int, int, int]:
    """Put slow units under PROT_NONE: (pages changed, huge pages among them, entries visited)."""
    changed = huge = visited = 0
    page, end = first, first + count
    while page < end:
        number = page >> TABLE_SHIFT
        table_end = min(end, (number + 1) << TABLE_SHIFT)
        visited += 1
        if (pde[number] & HUGE) != 0:
            if page == number << TABLE_SHIFT and (pde[number] & PRESENT) != 0 and frame_of(pde[number]) >= half:
                pde[number] = (pde[number] & ~PRESENT) | PROTNONE
                for leaf in range(page, page + TABLE_PAGES):
                    gpt[leaf] = (gpt[leaf] & ~PRESENT) | PROTNONE
                changed += TABLE_PAGES
                huge += 1
        elif pde[number] != 0:
            for leaf in range(page, table_end):
                if (gpt[leaf] & PRESENT) != 0 and frame_of(gpt[leaf]) >= half:
                    gpt[leaf] = (gpt[leaf] & ~PRESENT) | PROTNONE
                    changed += 1
            visited += table_end - page
        page = table_end
    return changed, huge, visited


@inline
def _remap(entry: int, frame: int, protnone: int) -> int:
    """``entry`` for another frame, not accessed yet; under PROT_NONE if that is wanted or if it was."""
    entry = unshadowed(entry & ~(FRAME_MASK | ACCESSED | DIRTY)) | (frame << FRAME_SHIFT)
    return (entry & ~PRESENT) | PROTNONE if protnone != 0 else entry


@inline
def copy_and_map(m: Machine, nodes: Nodes, page: int, frame: int, target: int, protnone: int, vcpu: int) -> None:
    """Copy a page of 4 KiB through the EPT, point its entry at the target (old, clean), free the source."""
    ept, stamps = m.ept, m.stamps
    stamps[frame_of(ept[target])] = stamps[frame_of(ept[frame])]
    set_dirty(m.pml, vcpu, ept, m.tables.ept_pde, target, 0, m.counters)
    set_accessed(ept, m.tables.ept_pde, frame)
    m.gpt[page] = _remap(m.gpt[page], target, protnone)
    give_free(nodes, frame)


@metered
def _copy_and_map(m: Machine, nodes: Nodes, pages: Words, frames: Words, targets: Words, protnone: int,
                  vcpu: int) -> None:  # fmt: skip
    """`copy_and_map` each page."""
    for i in range(pages.size):
        copy_and_map(m, nodes, pages[i], frames[i], targets[i], protnone, vcpu)


@metered
def _swap_contents(m: Machine, pages: Words, frames: Words, others: Words, other_frames: Words, vcpu: int) -> None:
    gpt, ept, stamps = m.gpt, m.ept, m.stamps
    for i in range(pages.size):
        a, b = frames[i], other_frames[i]
        slot_a, slot_b = frame_of(ept[a]), frame_of(ept[b])
        stamps[slot_a], stamps[slot_b] = stamps[slot_b], stamps[slot_a]
        set_dirty(m.pml, vcpu, ept, m.tables.ept_pde, a, 0, m.counters)
        set_dirty(m.pml, vcpu, ept, m.tables.ept_pde, b, 0, m.counters)
        gpt[pages[i]] = _remap(gpt[pages[i]], b, 0)
        gpt[others[i]] = _remap(gpt[others[i]], a, 0)


@metered
def _remap_huge(pde: Pdes, heads: Words, frames: Words, protnone: int) -> None:
    """The same for the entries of huge pages, whose leaves are done."""
    for i in range(heads.size):
        pde[heads[i] >> TABLE_SHIFT] = _remap(pde[heads[i] >> TABLE_SHIFT], frames[i], protnone)


@metered
def _split_entries(gpt: Words, pde: Pdes, heads: Words, tables: Words) -> None:
    """The leaves take over from the entries of huge pages, which map ``tables`` now."""
    for i in range(heads.size):
        number = heads[i] >> TABLE_SHIFT
        bits = pde[number] & (ACCESSED | DIRTY)
        for leaf in range(heads[i], heads[i] + TABLE_PAGES):
            gpt[leaf] |= bits
        pde[number] = (tables[i] << FRAME_SHIFT) | PRESENT | WRITABLE | (bits & ACCESSED)


@metered
def _collapse_entries(gpt: Words, pde: Pdes, head: int, target: int) -> None:
    """One entry, young and dirty as mk_huge_pmd makes it, takes over from 512 leaves, which are accessible now."""
    for leaf in range(head, head + TABLE_PAGES):
        gpt[leaf] = unshadowed(gpt[leaf] & ~PROTNONE) | PRESENT
    pde[head >> TABLE_SHIFT] = (target << FRAME_SHIFT) | PRESENT | WRITABLE | HUGE | ACCESSED | DIRTY


@metered
def _writable(gpt: Words, pde: Pdes, heads: Words, leaves: Words, bit: int) -> None:
    """Set or clear (``bit`` = 0) WRITABLE in the entries of units and, for the books of huge ones, their leaves."""
    for head in heads:
        if (pde[head >> TABLE_SHIFT] & HUGE) != 0:
            pde[head >> TABLE_SHIFT] = (pde[head >> TABLE_SHIFT] & ~WRITABLE) | bit
    for leaf in leaves:
        gpt[leaf] = (gpt[leaf] & ~WRITABLE) | bit


class GuestView(Copies):
    """See the module. ``flush.vcpu`` is the vCPU that the work in progress runs on (set by the scheduler)."""

    def __init__(self, machine: Machine, nodes: Nodes, meter: Meter, config: GuestConfig,
                 schedule: Callable[[str, int], None], ept_fault: EptFaultCall, events: EventLog) -> None:  # fmt: skip
        shape = radix_of(machine.tables.upper, machine.tables.parent, machine.table_gva.size)
        super().__init__(nodes, machine.gpt, shape, meter, config.costs, machine.counters,
                         machine.vcpus.field.shape[0], machine.gpt.size, schedule)  # fmt: skip
        self._machine = machine
        self._kernel = config.kernel
        self._events = events
        self._ept_fault = ept_fault
        self.flush = TlbFlush(machine, config.kernel, config.costs, meter)
        self.host_scan = HostScan()

    def pages_at(self, addresses: Words) -> Words:
        out = np.empty(addresses.size, np.int64)
        _pages_at(self.meter.book, self._machine.table_gva, addresses, out)
        self.meter.charge(self.costs.scan_pte_ps * self._kernel.page_table_levels * addresses.size)
        return out

    def addresses(self, pages: Words) -> Words:
        out = np.empty(pages.size, np.int64)
        _addresses(self.meter.book, self._machine.table_gva, pages, out)
        return out

    def page_range(self, start: int, end: int) -> tuple[int, int]:
        low, high = np.searchsorted(self._machine.table_gva, (start, end))
        return int(low) << TABLE_SHIFT, int(high - low) << TABLE_SHIFT

    def address_bounds(self) -> tuple[int, int]:
        tables = self._machine.table_gva
        return int(tables[0]), int(tables[-1]) + (PAGE_SIZE << TABLE_SHIFT)

    def protect(self, first: int, count: int) -> int:
        count = self._clip(first, count)
        changed, huge, visited = _protect(self.meter.book, self._table, self._pde, self._half, first, count)
        self.meter.charge(self.costs.protect_pte_ps * visited)
        self.counters[C.vmstat__numa_pte_updates] += changed
        self.counters[C.vmstat__numa_huge_pte_updates] += huge
        if changed:
            # flush_tlb_range of all that change_protection looked at (mm/mprotect.c, before mmu_gather in 5.19).
            self.flush.range(first, first + count - 1)
        return int(changed)

    def write_protect(self, pages: Words) -> None:
        """Have writes to units fault (`Tiering.on_write_fault`) until `end_write_protection`; one flush for all.

        userfaultfd's UFFDIO_WRITEPROTECT (mm/mprotect.c, change_protection) of the range that they lie in.
        """
        self._set_writable(pages, False)

    def end_write_protection(self, pages: Words) -> None:
        """Have units writable again, and flush what is cached of them, once for all: they may have been moved."""
        self._set_writable(pages, True)

    def _set_writable(self, pages: Words, writable: bool) -> None:
        sizes = self.sizes(pages)
        leaves = expand(pages, sizes)
        _writable(self.meter.book, self._table, self._pde, pages, leaves, WRITABLE if writable else 0)
        self.meter.charge(self.costs.protect_pte_ps * pages.size)
        if pages.size:
            self.flush.range(int(leaves.min()), int(leaves.max()))

    def work_together(self, threads: int, work_ps: int) -> None:
        """Work that as many threads share, each on a vCPU: this one, which waits for the others, and those after it."""
        share = -(-work_ps // threads)
        count = self.vcpus
        others = (self.flush.vcpu + np.arange(1, threads)) % count
        book(self._machine.vcpus, others, AGENT, share)
        self.meter.charge(share)
        self.meter.charge_elsewhere(share * others.size)

    def _flush_young(self, young: int) -> None:
        """Nothing: x86 leaves the stale entry, at worst the page looks idle for a while."""

    def _flush_scanned(self) -> None:
        self.flush.all()

    def _flush_dirty(self, pages: Words) -> None:
        leaves = expand(pages, self.sizes(pages))
        self.flush.range(int(leaves.min()), int(leaves.max()))

    def _flush_unmapped(self, pages: Words, sizes: Words, batched: bool) -> None:
        # pmdp_invalidate (mm/pgtable-generic.c) flushes whatever the entry was, and is in no batch.
        for head in pages[sizes > 1]:
            self.flush.huge(int(head))
        # ptep_clear_flush flushes only what a TLB can hold: not a PROT_NONE entry, so a promotion in the hint fault
        # flushes nothing since the fault maps the page late (b99a342d4f11, Linux 5.13).
        pages = pages[sizes == 1]
        pages = pages[(self._table[pages] & PRESENT) != 0]
        if batched:
            for _ in range(0, pages.size, MIGRATE_BATCH):
                self.flush.all()
        elif pages.size:
            self.flush.pages(pages, requests=pages.size)

    def _batched_flush(self) -> bool:
        return self._kernel.batched_unmap_flush and self.meter.context != TASK

    def _back(self, frames: Words) -> None:
        """Have the host map frames before a copy, as its first access would."""
        machine = self._machine
        missing = frames[(machine.ept[frames] & PRESENT) == 0]
        if missing.size:
            cost = self._ept_fault(self.now, missing)
            self.meter.wait(int(take_violations(machine, self.flush.vcpu, self.now, missing, cost)))

    def log_promotions(self, times_ps: Words, pages: Words) -> None:
        """Pages that a compiled hint fault has promoted, and when (int64[n] each)."""
        self._events.add(times_ps, "promote", self._gva(pages), SLOW, FAST)

    def _gva(self, pages: Words) -> Words:
        return self._machine.table_gva[pages >> TABLE_SHIFT] + ((pages & (TABLE_PAGES - 1)) << PAGE_SHIFT)

    def _traffic(self, source: int, target: int, pages: int) -> None:
        """Migration traffic uses the tiers' bandwidth like any other."""
        budget = self._machine.budget
        budget[0, source] -= pages * PAGE_SIZE
        budget[1, target] -= pages * PAGE_SIZE

    def _migrate(self, pages: Words, frames: Ints, targets: Ints, sizes: Words, node: int, cost_ps: Words,
                 protect: bool, copied: bool) -> None:  # fmt: skip
        leaves, sources, places = expand(pages, sizes), expand(frames, sizes), expand(targets, sizes)
        protnone = PROTNONE if protect else 0
        self._back(np.concatenate([sources, places]))
        if not copied:
            self._flush_unmapped(pages, sizes, self._batched_flush())
        _copy_and_map(self.meter.book, self._machine, self.nodes, leaves, sources, places, protnone, self.flush.vcpu)
        huge = sizes > 1
        if huge.any():
            _remap_huge(self.meter.book, self._pde, pages[huge], targets[huge].astype(np.int64), protnone)
        self._traffic(1 - node, node, leaves.size)
        self.meter.charge(int(cost_ps.sum()))
        self._events.add(self.now, "promote" if node == FAST else "demote", self._gva(leaves), 1 - node, node)

    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, sizes: Words,
              batched: bool) -> None:  # fmt: skip
        costs, book = self.costs, self.meter.book
        slow, slow_places = expand(slow_pages, sizes), expand(slow_frames, sizes)
        fast, fast_places = expand(fast_pages, sizes), expand(fast_frames, sizes)
        self._drop_shadows(fast_places)
        with self.meter.stage(MIGRATE):
            self._back(np.concatenate([slow_places, fast_places]))
            self._flush_unmapped(np.concatenate([slow_pages, fast_pages]), np.tile(sizes, 2), batched)
            _swap_contents(book, self._machine, slow, slow_places, fast, fast_places, self.flush.vcpu)
            huge = sizes > 1
            if huge.any():
                _remap_huge(book, self._pde, slow_pages[huge], fast_frames[huge].astype(np.int64), 0)
                _remap_huge(book, self._pde, fast_pages[huge], slow_frames[huge].astype(np.int64), 0)
            self._traffic(1, FAST, slow.size)
            self._traffic(FAST, 1, slow.size)
            copies = copy_ps(costs, True, False) + copy_ps(costs, False, True)
            self.meter.charge(2 * costs.migrate_page_ps * slow_pages.size + copies * slow.size)
        self._events.add(self.now, "promote", self._gva(slow), 1, FAST)
        self._events.add(self.now, "demote", self._gva(fast), FAST, 1)

    def _split(self, heads: Words) -> Mask:
        """Each needs a page for its leaf table; where there is none left, the huge page stays."""
        machine = self._machine
        tables = np.array([allocate(self.nodes, FAST) for _ in heads], np.int64)
        done = tables != NO_PAGE
        heads, tables = heads[done], tables[done]
        self._back(tables)
        clear_fresh(machine, self.flush.vcpu, STAMP_TABLE_BASE + (heads >> TABLE_SHIFT), tables)
        for head in heads:
            self.flush.huge(int(head))
        _split_entries(self.meter.book, self._table, self._pde, heads, tables)
        self.meter.charge(self.costs.split_huge_ps * heads.size)
        return done

    def _collapse(self, pages: Words, frames: Ints, target: int, cost_ps: int) -> None:
        machine, head = self._machine, int(pages[0])
        table = frame_of(self._pde[head >> TABLE_SHIFT])
        targets = np.arange(target, target + TABLE_PAGES, dtype=np.int64)
        sources = frames.astype(np.int64)
        self._drop_shadows(sources)
        self._back(np.concatenate([sources, targets]))
        # pmdp_collapse_flush: it is 4 KiB translations that are flushed.
        self.flush.range(head, head + TABLE_PAGES - 1)
        _copy_and_map(self.meter.book, machine, self.nodes, pages, sources, targets, 0, self.flush.vcpu)
        _collapse_entries(self.meter.book, self._table, self._pde, head, target)
        give_all_free(self.nodes, np.array([table], np.int64))
        node = int(target >= self._half)
        self._traffic(node, node, TABLE_PAGES)
        self.meter.charge(cost_ps)
