"""How a guest's Linux flushes TLBs (arch/x86/mm/tlb.c): locally, by IPI, lazily, and with the host's help.

One page goes by INVLPG, with page-table isolation also by INVPCID of the user PCID; a range above
`tlb_single_page_flush_ceiling` and a batch of unmapped pages by MOV CR3. Other vCPUs that run the process get an IPI,
for which the initiator waits. No IPI goes to a vCPU that runs a kernel thread or idles (lazy TLB: it flushes when it
switches back, once for all that it missed), nor, with KVM's paravirtual flush, to one that the host preempted (KVM
executes INVVPID at its next entry); without that help the initiator waits until the host runs it again. None of this
touches guest-physical mappings.
"""

import numpy as np

from guestd.instructions import invlpg_everywhere, mov_cr3, mov_cr3_everywhere
from guestd.machine import Machine, S
from guestd.meter import Meter
from guestd.vcpu import (
    EXIT_END,
    EXIT_START,
    IDLE,
    INTERRUPT,
    KICK,
    KTHREAD_END,
    KTHREAD_START,
    LAZY_FLUSHED,
    OFF_PCPU,
    PV_FLUSHED,
    book,
)
from proto.arrays import Words
from proto.config import GuestKernel
from proto.costs import Costs
from proto.counters import C
from proto.units import PAGE_SHIFT, TABLE_PAGES, TABLE_SHIFT


class TlbFlush:
    """Flushes on behalf of the work that ``meter`` accounts for; ``vcpu``: the one that it runs on."""

    def __init__(self, machine: Machine, kernel: GuestKernel, costs: Costs, meter: Meter) -> None:
        self._machine = machine
        self._kernel = kernel
        self._costs = costs
        self._meter = meter
        self.vcpu = 0

    def all(self) -> None:
        """flush_tlb_mm: a full flush here and on every other vCPU that runs the process."""
        machine, counters = self._machine, self._machine.counters
        mov_cr3_everywhere(machine.vcpus, machine.walk_geometry)
        counters[C.vmstat__nr_tlb_local_flush_all] += 1
        self._meter.charge(self._costs.cr3_flush_ps)
        counters[C.instr__mov_cr3] += 1 + self._shoot_down(1, self._costs.cr3_flush_ps)

    def pages(self, pages: Words, requests: int, *, execute: bool = True) -> None:
        """Invalidate each page (int64[n]) here and elsewhere, with ``requests`` remote requests altogether.

        ``execute``: false if the invalidations themselves are done at times of their own (`guestd.transaction`).
        """
        machine, counters = self._machine, self._machine.counters
        if execute:
            invlpg_everywhere(machine.vcpus, machine.tlb_geometry, machine.walk_geometry, pages)
        each = self._costs.invlpg_ps + (self._costs.invpcid_addr_ps if self._kernel.pti else 0)
        counters[C.vmstat__nr_tlb_local_flush_one] += pages.size
        self._meter.charge(each * pages.size)
        received = self._shoot_down(requests, each * pages.size // requests)
        executed = pages.size + received * (pages.size // requests)
        counters[C.instr__invlpg] += executed
        if self._kernel.pti:
            counters[C.instr__invpcid_0] += executed

    def range(self, first: int, last: int) -> None:
        """flush_tlb_mm_range, or one mmu_gather, of pages ``first`` to ``last``: one request; above the ceiling all.

        What counts is the addresses between them, mapped or not.
        """
        if self._address_page(last) - self._address_page(first) >= self._kernel.single_page_flush_ceiling:
            self.all()
        else:
            self.pages(np.arange(first, last + 1, dtype=np.int64), requests=1)

    def _address_page(self, page: int) -> int:
        """gVA of ``page``, in pages."""
        return int(self._machine.table_gva[page >> TABLE_SHIFT] >> PAGE_SHIFT) + page % TABLE_PAGES

    def huge(self, head: int) -> None:
        """flush_pmd_tlb_range of the huge page from page ``head`` on.

        x86 steps by 4 KiB (flush_tlb_range but for hugetlbfs), so that it is a range of 512 pages; INVLPG of any
        address in it would do.
        """
        if self._kernel.thp_flush_stride == "2MiB":
            self.pages(np.array([head], np.int64), requests=1)
        else:
            self.range(head, head + TABLE_PAGES - 1)

    def _shoot_down(self, requests: int, flush_ps: int) -> int:
        """Have the other vCPUs flush, for ``flush_ps`` a request. Returns the number of IPIs received."""
        machine, costs, counters = self._machine, self._costs, self._machine.counters
        vcpus, now = machine.vcpus, self._meter.now
        field = vcpus.field
        if field.shape[0] == 1:
            return 0
        # Counted even if no IPI is sent (flush_tlb_multi).
        counters[C.vmstat__nr_tlb_remote_flush] += requests
        other = np.arange(field.shape[0]) != self.vcpu
        lazy = other & ((field[:, IDLE] == 1) | ((field[:, KTHREAD_START] <= now) & (now < field[:, KTHREAD_END])))
        preempted = other & ~lazy & (field[:, OFF_PCPU] == 1) & (now < field[:, EXIT_END])
        self._leave_lazy(np.flatnonzero(lazy & (field[:, IDLE] == 0)))
        running = other & ~lazy
        if self._kernel.pv_tlb_flush:
            running &= ~preempted
            self._leave_to_kvm(np.flatnonzero(preempted))
        elif preempted.any():
            back_at = max(self._back_at(int(vcpu), now) for vcpu in np.flatnonzero(preempted))
            self._meter.charge(max(0, back_at - now))
        targets = np.flatnonzero(running)
        if targets.size:
            self._meter.charge(requests * (costs.shootdown_base_ps + costs.shootdown_target_ps * targets.size))
            book(vcpus, targets, INTERRUPT, requests * (costs.ipi_receive_ps + flush_ps))
        counters[C.vmstat__nr_tlb_remote_flush_received] += requests * targets.size
        return requests * int(targets.size)

    def _leave_lazy(self, lazy: Words) -> None:
        """They find a newer generation of the address space when they switch back, and flush everything once."""
        vcpus = self._machine.vcpus
        due = lazy[vcpus.field[lazy, LAZY_FLUSHED] != vcpus.field[lazy, KTHREAD_END]]
        vcpus.field[due, LAZY_FLUSHED] = vcpus.field[due, KTHREAD_END]
        for vcpu in due.tolist():
            mov_cr3(vcpus, vcpu, self._machine.walk_geometry)
        book(vcpus, due, INTERRUPT, self._costs.cr3_flush_ps)
        self._machine.counters[C.instr__mov_cr3] += due.size

    def _leave_to_kvm(self, preempted: Words) -> None:
        """kvm_flush_tlb_multi: a flag for the host, which flushes the VPID before the vCPU's next entry, once."""
        vcpus, counters = self._machine.vcpus, self._machine.counters
        due = preempted[vcpus.field[preempted, PV_FLUSHED] != vcpus.field[preempted, EXIT_START] + 1]
        vcpus.field[due, PV_FLUSHED] = vcpus.field[due, EXIT_START] + 1
        book(vcpus, due, KICK, self._costs.pv_flush_entry_ps + self._costs.invvpid_context_ps)
        counters[[C.kvm__tlb_flush, C.kvm__pv_flushes, C.instr__invvpid_ctx]] += due.size

    def _back_at(self, vcpu: int, now: int) -> int:
        """When the host's scheduler gives ``vcpu`` its pCPU again, ps."""
        state = self._machine.state
        number = int(state[S.FIRST_VCPU]) + vcpu
        pcpus, slice_ps = int(state[S.PCPUS]), int(state[S.HOST_SLICE_PS])
        sharers = (int(state[S.FLEET_VCPUS]) - 1 - number % pcpus) // pcpus + 1
        turn = now // slice_ps
        return (turn + (number // pcpus - turn) % sharers) * slice_ps
