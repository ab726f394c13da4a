"""One guest: vCPUs, kernel, scheduler and agent put together as a state machine; no socket, no clock of its own.

`Guest.advance` runs to the next barrier. It calls the engine, and whenever the engine stops it does what the kernel
would: generate accesses, take faults, run timers (scheduler tick, context switch, policy), hand work to the agent.
Everything about virtual time is decided here and in the engine; how the work is spread over OS threads is the caller's
`Threads`, and how a hypercall reaches the host is the caller's `EptFaultCall` (architecture 2, sans-I/O).
"""

import heapq
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from guestd.engine import COMPLETED, FAULT, NEED_ACCESSES, PMI
from guestd.errors import GuestError
from guestd.events import EventLog
from guestd.fault import (
    NO_FRAME,
    OUT_OF_MEMORY,
    WRITE_PROTECTED,
    charge_hints,
    charge_violations,
    new_faults,
    table_frames,
    verify,
)
from guestd.frame_wait import FrameWait
from guestd.guest_view import GuestView
from guestd.hint_faults import HINTS_TAKEN, new_hints, run
from guestd.kvm import ept_changed, vm_exit
from guestd.machine import S, new_machine
from guestd.meter import INTERRUPT, KTHREAD, TASK, TRACK, Meter, Snapshot
from guestd.mm.khugepaged import Khugepaged
from guestd.mm.nodes import FAST, WMARK_LOW, new_nodes
from guestd.operations import EptFaultCall, Operations
from guestd.params import resolve
from guestd.perf_events import PerfEvents
from guestd.placement import preferred
from guestd.report import build_report, huge_pages, progress
from guestd.threads import Threads, null_activation_ns
from guestd.tiering.policy import Tiering, with_needs
from guestd.tiering.registry import policy_of
from guestd.vcpu import (
    AGENT,
    CLOCK,
    CONTEXT_SWITCH,
    EPT_REFAULT,
    FLUSH_AT_ENTRY,
    HALTED,
    HINT_FAULT,
    IDLE,
    KTHREAD_END,
    KTHREAD_START,
    LENGTH,
    PMI_EXIT,
    POSITION,
    book,
    total_time,
)
from guestd.vcpu import INTERRUPT as IRQ
from guestd.walk import price_walks
from guestd.watch import Watch
from guestd.workloads.base import Buffer
from guestd.workloads.registry import workloads
from proto.config import GuestConfig, launch_ps
from proto.counters import C
from proto.entry import FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, WRITABLE
from proto.layout import OPERATION, VmMemory
from proto.messages import Advance, Tick
from proto.units import PAGE_SHIFT, PS_PER_S

FOREVER = 1 << 62
FAULTS_A_MESSAGE = 1 << 16
T = TypeVar("T")


class Guest:
    """See the module. Raises GuestError when the guest cannot go on (out of memory, killed by a PEBS record)."""

    def __init__(self, config: GuestConfig, memory: VmMemory, ept_fault: EptFaultCall, threads: Threads) -> None:
        self.policy = policy_of(config.policy, config.stages)
        self.config = config = with_needs(config, self.policy)
        self.memory = memory
        self._threads = threads
        params = resolve(self.policy.params, config.policy_params)
        self.workload = workloads()[config.workload].create(config)
        host_side = self.policy.view == "host"
        host = config.host
        self._host_scans = host_side or host.swap_pages_per_s > 0 or host.thp != "never"
        """Something in the host looks at the EPT between barriers, and need not say so in an operation."""
        total = config.total_pages
        # A host-side design's guest sees one flat node; the host moves frames behind it.
        self.nodes = new_nodes(total, total if host_side else config.fast_pages, 0 if host_side else config.slow_pages)
        self.sampling = self.policy.sampling(params)
        self.machine = new_machine(config, self.workload.space, memory, self.sampling, self.workload.mlp)
        self.operations = Operations(self.machine.state, ept_fault)
        self.meter = Meter()
        self.perf = PerfEvents(config, self.machine, self.nodes, self.meter, self.operations.ept_fault, self.sampling)
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._events = EventLog(config.events_path, config.vm)
        self.view = GuestView(
            self.machine, self.nodes, self.meter, config, self._schedule_policy, self.operations.ept_fault, self._events
        )
        self.view.program_pmu = self.perf.program
        # A host-side policy runs in the host; here the guest manages nothing.
        self.tiering = Tiering(self.view, params) if host_side else self.policy.create(self.view, params)
        capacity = config.fast_pages - int(self.nodes.watermark[FAST, WMARK_LOW]) - self.machine.tables.upper.size
        self.watch = Watch(self)
        prefer = preferred(self.policy, self.workload, capacity, config.kernel.thp == "always")
        self._faults = new_faults(config, self.workload.space, self.nodes, prefer)
        self._hints = new_hints(self.tiering.hint_rule, config.costs, self.view.hint_fault_ps, self.meter)
        self.khugepaged = Khugepaged(self.view, self._faults.thp.whole, config.kernel.khugepaged_pages_to_scan)
        self._buffers = [
            Buffer(self.machine.vcpus.address[v], self.machine.vcpus.kind[v], self.machine.vcpus.think_ps[v])
            for v in range(config.vcpus)
        ]
        self._next_agent_vcpu = 0
        self._wait = FrameWait(self.machine)
        self._kswapd_queued = False
        self._kswapd_at = 0
        """Not before then: it shares its vCPU, and after a run without work it waits a tick."""
        self.activations = 0
        self.phase = "populate"
        self.run_started_ps = 0
        self.ended_ps = 0
        self.started_ps = self.booted_ps = config.start_ps
        self.populated: Snapshot | None = None
        self.pages_checked = self.pages_brought_back = 0
        self.null_activation_ns = 0.0

    # -- time ---------------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """Virtual time that all vCPUs have reached, ps."""
        return int(self.machine.state[S.NOW])

    @property
    def finished(self) -> bool:
        """The run phase is over."""
        return self.phase == "done"

    def _next_timer(self) -> int:
        return self._timers[0][0] if self._timers and not self._wait.active else FOREVER

    def _at(self, time_ps: int, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (time_ps, self._sequence, action))

    def _schedule_policy(self, name: str, at_ps: int) -> None:
        self._at(at_ps, partial(self._run_policy, name))

    def _run_policy(self, name: str) -> None:
        thread = self.tiering.thread_of(name)
        vcpu = self._agent_vcpu() if thread.vcpu is None else thread.vcpu
        context = TASK if thread.user else KTHREAD
        self._activate(context, vcpu, self.tiering.on_timer, name, charge_vcpu=not thread.own_core)

    def start(self) -> None:
        """Boot at the tenant's start time, once its memory is ready: scheduler timers, the policy's own."""
        config = self.config
        state, field = self.machine.state, self.machine.vcpus.field
        boot_ps = self.booted_ps = launch_ps(config)
        state[S.NOW] = boot_ps
        field[:, CLOCK] = boot_ps
        self.meter.now = boot_ps
        self._at(boot_ps, partial(self.perf.allocate, boot_ps))
        period = config.kernel.sched_slice_ps
        for vcpu in range(config.vcpus):
            self._at(boot_ps + period * (vcpu + 1) // config.vcpus, partial(self._context_switch, vcpu))
        self._tick_ps = PS_PER_S // config.kernel.hz
        if self.tiering.reclaim_mark is not None:
            self._at(boot_ps + self._tick_ps, self._tick)
        if config.kernel.thp == "always" and config.kernel.khugepaged_pages_to_scan:
            self._at(boot_ps + config.kernel.khugepaged_scan_sleep_ps, self._run_khugepaged)
        self.null_activation_ns = null_activation_ns(self._threads)
        self._threads.on_agent(self.tiering.start)

    def agent_cpu_ns(self) -> int:
        """CPU of the agent so far, ns: its thread's, and that of hint faults on the vCPUs'."""
        return self._threads.agent_cpu_ns() + int(self._hints.cpu_ns[0])

    def advance(self, message: Advance) -> Tick:
        """Run to ``message.until_ps``, applying its operations at their times. Raises GuestError."""
        return self._threads.on_vcpu(self._advance, message)

    def _advance(self, message: Advance) -> Tick:
        state, machine = self.machine.state, self.machine
        until = message.until_ps
        state[S.END_PS] = until
        machine.latency_ps[:] = np.array(message.latency_ps).reshape(2, 2)
        machine.budget[:] = np.array(message.bandwidth_budget).reshape(2, 2)
        before = machine.budget.copy()
        used = int((self.nodes.managed - self.nodes.free_count).sum())
        self.workload.set_llc(
            price_walks(machine.price, self.config.costs, used, message.llc_bytes, machine.latency_ps,
                        huge_pages(self))
        )  # fmt: skip
        self.view.host_scan.hear(message)
        if self._host_scans or message.scanned:
            ept_changed(machine)
        self.operations.of_host(np.frombuffer(message.operations, OPERATION))
        self._wait.go_on()
        while self.now < until and not self.finished:
            target = min(until, self._next_timer())
            if self.phase == "run" and self.config.run_ps:
                target = min(target, self.run_started_ps + self.config.run_ps)
            if target > self.now:
                reason = self._run(target)
                if reason == FAULT:
                    self._take_faults()
                elif reason == HINTS_TAKEN:
                    self._wake_kswapd(int(machine.vcpus.field[state[S.TURN], CLOCK]))
                elif reason == PMI:
                    self._serve_pmu()
                elif reason == COMPLETED:
                    self._finish(int(machine.vcpus.field[state[S.TURN], CLOCK]))
            if self.phase == "run" and self.config.run_ps and self.now >= self.run_started_ps + self.config.run_ps:
                self._finish(self.now)
            while self._next_timer() <= self.now and not self.finished:
                heapq.heappop(self._timers)[2]()
        self._events.flush()
        total_time(machine.vcpus, machine.counters)
        self.watch.barrier(until)
        return Tick(
            time_ps=until,
            phase=self.phase,
            progress=progress(self),
            counters=machine.counters.tobytes(),
            agent_cpu_s=self.agent_cpu_ns() / 1e9,
            bandwidth_demand=(before - machine.budget).tobytes(),
            scan_list=self.view.host_scan.take_list(),
        )

    # -- vCPU thread --------------------------------------------------------------------------------------------

    def _run(self, until: int) -> int:
        """Run until ``until``, a fault, hint faults or a PMI; generate accesses as they are needed."""
        field, state, hints = self.machine.vcpus.field, self.machine.state, self._hints
        while True:
            wake_below = 0 if self._kswapd_queued else self._wake_mark()
            reason = int(run(self.machine, self.operations.pending, until, self._faults, hints, wake_below))
            if moved := int(hints.moved[0]):
                self.view.log_promotions(hints.moved_ps[:moved], hints.moved_page[:moved])
                hints.moved[0] = 0
            if reason != NEED_ACCESSES:
                return reason
            vcpu = int(state[S.TURN])
            self.watch.executed(vcpu)
            count = self._generate(vcpu)
            field[vcpu, POSITION], field[vcpu, LENGTH] = 0, count
            if count == 0:
                # HLT exits, too.
                exit_ps = int(vm_exit(self.machine, vcpu, int(field[vcpu, CLOCK]), 0))
                book(self.machine.vcpus, vcpu, HALTED, exit_ps)
                field[vcpu, IDLE] = 1
                if field[:, IDLE].all():
                    self._populated()

    def _generate(self, vcpu: int) -> int:
        buffer = self._buffers[vcpu]
        if self.phase == "populate":
            return self.workload.populate(vcpu, buffer)
        return self.workload.generate(vcpu, buffer)

    def _populated(self) -> None:
        """The last vCPU has no first touch left: all of them start the run together."""
        field, state = self.machine.vcpus.field, self.machine.state
        now = int(field[:, CLOCK].max())
        for vcpu in range(self.config.vcpus):
            book(self.machine.vcpus, vcpu, HALTED, now - int(field[vcpu, CLOCK]))
        field[:, IDLE] = field[:, FLUSH_AT_ENTRY] = 0
        state[S.LEFT] = self.config.transactions or -1
        self.run_started_ps = now
        self.phase = "run"
        self.machine.vcpus.histogram[:] = 0
        total_time(self.machine.vcpus, self.machine.counters)
        self.populated = Snapshot.take(self.machine.counters, self.meter, self.agent_cpu_ns())
        self.watch.begin()
        self._events.add(now, "phase", 0, 0, 1)

    # -- faults and interrupts ----------------------------------------------------------------------------------

    def _take_faults(self) -> None:
        """What the batch has."""
        machine, config, batch = self.machine, self.config, self._faults.batch
        vcpus, counters = machine.vcpus, machine.counters
        vcpu = int(machine.state[S.TURN])
        hints, gpfns, fresh, state, written = (int(count) for count in batch.counts)
        now = int(vcpus.field[vcpu, CLOCK])
        waits = False
        if gpfns:
            cost, waits = self.operations.page_fault(now, batch.gpfn[:gpfns])
            charge_violations(vcpus, vcpu, batch, cost)
            counters[C.exit__ept_violation] += np.count_nonzero(cost)
        if fresh or waits:
            self._wait.answered(vcpu, batch, waits)
        if state == WRITE_PROTECTED:
            page = int(vcpus.address[vcpu, vcpus.field[vcpu, POSITION]]) >> PAGE_SHIFT
            wait = self._activate(TASK, vcpu, self.tiering.on_write_fault, page, at=now, charge_vcpu=False)
            book(vcpus, vcpu, HINT_FAULT, wait)
        if hints:
            pages = batch.hint_page[:hints]
            cost = self._activate(TASK, vcpu, self.tiering.on_hint_faults, pages, at=now, charge_vcpu=False)
            charge_hints(vcpus, vcpu, batch, cost)
        if written:
            self._activate(TASK, vcpu, self.view.on_writes, batch.written[:written], at=now, charge_vcpu=False)
        self._wake_kswapd(now)
        found = hints or gpfns or fresh or written
        if state == OUT_OF_MEMORY and not found and self._activate(TASK, vcpu, self.view.on_allocation_failure, at=now):
            return
        if state == 0 and not found:
            raise GuestError("an access cannot be translated, and no fault says why; the policy left an entry unusable")
        if state == OUT_OF_MEMORY and not found:
            raise GuestError(
                f"out of memory: {self.workload.space.pages} pages of gVA on {config.total_pages} pages of memory; "
                "give the VM more memory or the workload a smaller footprint"
            )

    def _serve_pmu(self) -> None:
        """A record met an EPT violation, or a buffer is nearly full."""
        vcpu = int(self.machine.state[S.TURN])
        self.perf.resolve_violations(vcpu)
        if self.perf.pmu.interrupt_due(vcpu):
            self._take_pmi(vcpu)

    def _take_pmi(self, vcpu: int) -> None:
        """Exit, injection, handler; the handler drains the area."""
        machine = self.machine
        machine.counters[[C.pebs__pmi, C.exit__pmi]] += 1
        clock = int(machine.vcpus.field[vcpu, CLOCK])
        book(machine.vcpus, vcpu, PMI_EXIT, int(vm_exit(machine, vcpu, clock, self.config.costs.pmi_guest_ps)))
        self._activate(INTERRUPT, vcpu, self._handle_pmi, vcpu)

    def _handle_pmi(self, vcpu: int) -> None:
        with self.meter.stage(TRACK):
            self.meter.charge(self.config.costs.pmi_ps)
        self._drain(vcpu)

    def _context_switch(self, vcpu: int) -> None:
        """The task is switched out and, after kernel work, in again."""
        kernel, field = self.config.kernel, self.machine.vcpus.field
        self._at(self.now + kernel.sched_slice_ps, partial(self._context_switch, vcpu))
        if field[vcpu, IDLE]:
            return
        self.machine.counters[C.vmstat__context_switches] += 1
        book(self.machine.vcpus, vcpu, CONTEXT_SWITCH, 2 * self.config.costs.context_switch_ps)
        drains = self.perf.drains_at_context_switch() or self.tiering.drains_at_context_switch
        if drains and self.perf.pmu.waiting(vcpu):
            self._activate(TASK, vcpu, self._drain, vcpu)

    def _tick(self) -> None:
        self._at(self.now + self._tick_ps, self._tick)
        self._wake_kswapd(self.now)

    def _wake_kswapd(self, at_ps: int) -> None:
        """Allocations and scheduler ticks wake kswapd when the fast node is low (the TPP patches, mm/page_alloc.c)."""
        if self.nodes.free_count[FAST] < self._wake_mark() and not self._kswapd_queued:
            self._kswapd_queued = True
            self._at(max(self._kswapd_at, at_ps + self.config.costs.context_switch_ps), self._run_kswapd)

    def _wake_mark(self) -> int:
        """kswapd is woken with less than as many frames free on the fast node."""
        mark = self.tiering.reclaim_mark
        return 0 if mark is None else int(self.nodes.watermark[FAST, mark])

    def _run_kswapd(self) -> None:
        """kswapd works for half a tick at most, then leaves its vCPU to the task for as long."""
        self._kswapd_queued = False
        began = self.now
        self._activate(KTHREAD, self._agent_vcpu(), self.tiering.on_pressure, self._tick_ps // 2)
        spent = self.meter.now - began
        self._kswapd_at = began + (2 * spent if spent else self._tick_ps)
        self._wake_kswapd(began)

    def _run_khugepaged(self) -> None:
        self._activate(KTHREAD, self._agent_vcpu(), self.khugepaged.run)
        self._at(self.meter.now + self.config.kernel.khugepaged_scan_sleep_ps, self._run_khugepaged)

    # -- agent thread -------------------------------------------------------------------------------------------

    def _agent_vcpu(self) -> int:
        """Kernel threads go round the vCPUs, as the load balancer spreads them over busy ones."""
        self._next_agent_vcpu = (self._next_agent_vcpu + 1) % self.config.vcpus
        return self._next_agent_vcpu

    def _activate(self, context: int, vcpu: int, function: Callable[..., T], *args: object, at: int = -1,
                     charge_vcpu: bool = True) -> T:  # fmt: skip
        """Run agent work on the agent's thread; its modelled time is the vCPU's, with the exits that it met."""
        meter, field = self.meter, self.machine.vcpus.field[vcpu]
        meter.context, meter.outside_ps = context, 0
        self.view.flush.vcpu = vcpu
        began = meter.now = self.now if at < 0 else at
        self.activations += 1
        result = self._threads.on_agent(function, *args)
        operations = self.view.take_operations()
        if operations is not None:
            self.operations.of_guest(operations)
        if charge_vcpu:
            if context == KTHREAD:
                field[KTHREAD_START] = field[CLOCK]
                field[KTHREAD_END] = field[CLOCK] + meter.now - began
            part = IRQ if context == INTERRUPT else AGENT
            book(self.machine.vcpus, vcpu, part, meter.now - began - meter.outside_ps)
            book(self.machine.vcpus, vcpu, EPT_REFAULT, meter.outside_ps)
        return result

    def _drain(self, vcpu: int) -> None:
        samples = self.perf.drain(vcpu)
        self.watch.drained(samples)
        self.tiering.on_samples(samples)

    # -- end ----------------------------------------------------------------------------------------------------

    def _finish(self, at_ps: int) -> None:
        self.phase = "done"
        self.ended_ps = at_ps
        self._verify()

    def _verify(self) -> None:
        """Check all content; what the host has swapped out is brought back for it, as reading it would do."""
        machine = self.machine
        gpt = machine.gpt[(machine.gpt & (PRESENT | PROTNONE)) != 0]
        kernel = np.concatenate([table_frames(machine.tables), self.perf.written()])
        gpfns = np.concatenate([(gpt & FRAME_MASK) >> FRAME_SHIFT, kernel[kernel != NO_FRAME]])
        away = gpfns[(machine.ept[gpfns] & WRITABLE) == 0]
        for start in range(0, away.size, FAULTS_A_MESSAGE):
            batch = away[start : start + FAULTS_A_MESSAGE]
            self.operations.page_fault(self.now, batch, last=True)
        self.pages_brought_back = away.size - self._wait.uncleared
        self._wait.go_on()
        checked, bad = verify(machine.gpt, machine.ept, machine.stamps, int(machine.state[S.OWNER]), kernel)
        total_time(machine.vcpus, machine.counters)
        self.pages_checked = int(checked)
        machine.counters[C.integrity__mismatches] += bad

    def report(self) -> dict[str, object]:
        """The VM's part of summary.json, but for what only the process knows; of a stopped run too."""
        if not self.finished:
            self._verify()
        return build_report(self)

    def close(self) -> None:
        """Give the big arrays back."""
        self._events.close()
        self.watch.close()
        del self.machine, self.nodes, self.view, self.tiering, self.workload, self.memory, self._buffers, self._timers
