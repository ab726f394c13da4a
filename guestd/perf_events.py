"""The guest kernel's side of the PMU: it allocates the buffers, drains them, and lives with what records run into.

Linux: arch/x86/events/intel/ds.c. The buffers are gPA frames like any other (so the host may not have backed them, or
may have swapped them out), and nothing of them is visible to another process. What a PMI costs, and on whose time it is
handled, is the scheduler's (`guestd.guest`).
"""

import numpy as np

from guestd.errors import GuestError, PebsEptViolation
from guestd.fault import NO_FRAME, clear_fresh
from guestd.guest_view import EptFaultCall
from guestd.kvm import take_violations
from guestd.machine import Machine
from guestd.meter import TRACK, Meter
from guestd.mm.nodes import FAST, NO_PAGE, Nodes, allocate
from guestd.pebs import Pebs
from guestd.pmu import Pmu
from guestd.tiering.policy import Sampling
from guestd.vcpu import CLOCK, EPT_REFAULT, INTERRUPT, book
from proto.arrays import Words
from proto.config import GuestConfig
from proto.counters import C
from proto.entry import PRESENT, STAMP_TABLE_BASE
from proto.units import PAGE_SHIFT


class PerfEvents:
    """One guest's sampling. ``pmu``: its hardware."""

    def __init__(self, config: GuestConfig, machine: Machine, nodes: Nodes, meter: Meter, ept_fault: EptFaultCall,
                 sampling: Sampling | None) -> None:  # fmt: skip
        self.sampling = sampling
        self.pmu: Pmu = Pebs(
            machine.ds,
            machine.pml,
            machine.ept,
            machine.tables.ept_pde,
            machine.vcpus.field,
            machine.counters,
            sampling,
        )
        self._config = config
        self._machine = machine
        self._nodes = nodes
        self._meter = meter
        self._ept_fault = ept_fault
        self._written = np.zeros(self.pmu.frames.shape, np.bool_)
        """Which pages of the buffers hold something."""

    def allocate(self, now_ps: int) -> None:
        """Allocate the buffers; stock Linux clears them, so the host backs them (ds_prefault). Raises GuestError."""
        frames = self.pmu.frames
        for index in np.ndindex(frames.shape):
            frame = int(allocate(self._nodes, FAST))
            if frame == NO_PAGE:
                raise GuestError(
                    "out of memory for the PEBS buffers; give the VM more memory or set guest.ds_pages lower"
                )
            frames[index] = frame
        if self._config.kernel.ds_prefault and frames.size:
            for vcpu, mine in enumerate(frames):
                self._violations(vcpu, now_ps, mine[(self._machine.ept[mine] & PRESENT) == 0])
                self._hold(vcpu, mine)

    def _violations(self, vcpu: int, now_ps: int, gpfns: Words) -> None:
        """EPT violations of the buffer of ``vcpu``, on its time."""
        if gpfns.size:
            machine = self._machine
            cost = self._ept_fault(now_ps, gpfns)
            book(machine.vcpus, vcpu, EPT_REFAULT, int(take_violations(machine, vcpu, now_ps, gpfns, cost)))

    def _hold(self, vcpu: int, gpfns: Words) -> None:
        """These pages of a vCPU's buffer hold something from now on."""
        machine = self._machine
        mine = np.isin(self.pmu.frames[vcpu], gpfns) & ~self._written[vcpu]
        self._written[vcpu] |= mine
        number = STAMP_TABLE_BASE + machine.tables.upper.size + vcpu * mine.size + np.flatnonzero(mine)
        clear_fresh(machine, vcpu, number, self.pmu.frames[vcpu, mine])

    def written(self) -> Words:
        """int64[vcpus * pages]: frames of the buffers, NO_FRAME for a page that holds nothing yet."""
        return np.where(self._written, self.pmu.frames, NO_FRAME).reshape(-1)

    def resolve_violations(self, vcpu: int) -> None:
        """Records of ``vcpu`` that met an EPT violation are written after the fault.

        Raises PebsEptViolation where the hardware cannot do that.
        """
        gpfns = self.pmu.violations(vcpu)
        if gpfns.size == 0:
            return
        if self._config.host.pebs == "legacy":
            raise PebsEptViolation(self._config.vm, vcpu, int(gpfns[0]) << PAGE_SHIFT)
        self._violations(vcpu, int(self._machine.vcpus.field[vcpu, CLOCK]), gpfns)
        self._hold(vcpu, gpfns)
        self.pmu.resolved(vcpu)
        self._machine.counters[C.pebs__ept_violations] += gpfns.size

    def program(self, sampling: Sampling) -> None:
        """Sample otherwise from now on: perf_event_period on each CPU, by IPI (kernel/events/core.c).

        Counters begin anew at minus their period (period_left = 0, PERF_EF_RELOAD). Records that wait are kept; Linux
        drains them when it stops the event, here that is at the next context switch.
        """
        costs, vcpus = self._config.costs, self._config.vcpus
        self.sampling = sampling
        self.pmu.program(sampling)
        self._meter.charge(vcpus * (costs.shootdown_base_ps + costs.shootdown_target_ps))
        book(self._machine.vcpus, np.arange(vcpus), INTERRUPT, costs.ipi_receive_ps)

    def drain(self, vcpu: int) -> Words:
        """Empty a vCPU's buffer: `Pmu.drain`'s rows. Work of the stage `track`."""
        counters = self._machine.counters
        with self._meter.stage(TRACK):
            samples = self.pmu.drain(self._meter.book, vcpu)
            self._meter.charge(self._config.costs.drain_record_ps * samples.shape[0])
        counters[C.pebs__drains] += 1
        counters[C.pebs__drained_records] += samples.shape[0]
        return samples

    def drains_at_context_switch(self) -> bool:
        """Linux empties the buffer of large PEBS when the task is switched out (intel_pmu_pebs_sched_task)."""
        return self.sampling is not None and self.sampling.large
