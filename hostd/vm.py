"""One VM as the host keeps it: its EPT, its share of each tier, and the host-side tiering that manages it.

Static provisioning: a VM owns `fast_pages` frames of the fast tier and `slow_pages` of the slow one; the free lists are
the mutable state of that share. Frame slots and gPA frames are numbered alike (proto.layout): in a guest-delegated
design gPA node 0 is backed by the fast tier and node 1 by the slow one; in a host-side design the guest has one flat
node, and first touch takes fast frames until the low watermark (Linux allocation order).
"""

import heapq
import time
from typing import NamedTuple

import numpy as np

from guestd.events import EventLog
from guestd.jit import kernel
from guestd.meter import HOST_THREAD, TASK, Meter
from guestd.mm.nodes import FAST, NO_PAGE, SLOW, Nodes, allocate, lru_add, new_nodes, take_free
from guestd.params import resolve
from guestd.tiering.policy import Policy, Tiering
from hostd.errors import RefusedMessage
from hostd.host_view import HostView
from proto.arrays import Words
from proto.config import GuestConfig
from proto.counters import C, Counters, new_counters
from proto.entry import FRAME_SHIFT, PRESENT, PROTNONE, WRITABLE
from proto.layout import VmMemory, gpa_pages
from proto.units import PS_PER_S

BACKED = WRITABLE
"""Set in every EPT entry that has a frame, mapped or zapped."""


@kernel
def _back(ept: Words, nodes: Nodes, gpfns: Words, flat: bool, costs: Words, hints: Words, out: Words) -> int:
    """Serve EPT violations, for which there are frames enough; returns the hint faults listed in ``hints``.

    ``costs``: int64[2], violation with the page there, and with allocation; ``out``: int64[n] cost of each.
    """
    hinted = 0
    half = nodes.page.size // 2
    for i in range(gpfns.size):
        gpfn = gpfns[i]
        entry = ept[gpfn]
        if (entry & BACKED) == 0:
            frame = allocate(nodes, FAST) if flat else take_free(nodes, 1 if gpfn >= half else 0, 0)
            if frame == NO_PAGE and flat:
                # What is left is the reserve below the watermarks: moves under way hold their frames twice.
                frame = take_free(nodes, FAST, 0) if nodes.free_count[FAST] > 0 else take_free(nodes, SLOW, 0)
            if flat:
                nodes.page[frame] = gpfn
                lru_add(nodes, frame, 0)
            ept[gpfn] = (np.int64(frame) << FRAME_SHIFT) | PRESENT | WRITABLE
            out[i] = costs[1]
        elif (entry & PROTNONE) != 0:
            hints[hinted] = i
            hinted += 1
            out[i] = costs[0]
        else:
            ept[gpfn] = entry | PRESENT
            out[i] = costs[0]
    return hinted


class Accounts(NamedTuple):
    """A VM's accounts in the host at one time."""

    counters: Counters
    book: Words
    modelled_ps: Words


class Vm:
    """See the module. ``populated``: the accounts when the guest had populated its memory."""

    def __init__(self, config: GuestConfig, policy: Policy, memory: VmMemory) -> None:
        self.config = config
        self.memory = memory
        self.flat = policy.view == "host"
        self.nodes = new_nodes(config.total_pages, config.fast_pages, config.slow_pages)
        self.meter = Meter()
        self.meter.context = HOST_THREAD
        self.counters = new_counters()
        self.guest_counters = new_counters()
        self.populated: Accounts | None = None
        self.cpu_ns = 0
        """CPU that this host spent on the VM: faults and host-side tiering."""
        self._timers: list[tuple[int, int, str]] = []
        self._sequence = 0
        self._next_task_vcpu = 0
        self._tick_ps = PS_PER_S // config.kernel.hz
        self._next_tick_ps = config.start_ps + self._tick_ps
        self._until_ps = 0
        self._reclaim_end_ps = 0
        """kswapd is one thread: no tick wakes it before it is through with what it began."""
        self._events = EventLog(config.events_path if self.flat else "", config.vm)
        self.view = HostView(config, memory, self.nodes, self.meter, self.counters, self._schedule, self._events)
        params = resolve(policy.params, config.policy_params)
        self.tiering = policy.create(self.view, params) if self.flat else Tiering(self.view, params)
        self.meter.now = config.start_ps
        if self.flat:
            self.tiering.start()

    def _schedule(self, name: str, at_ps: int) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (at_ps, self._sequence, name))

    def used(self) -> tuple[int, int]:
        """Frames in use, fast and slow."""
        taken = self.nodes.managed - self.nodes.free_count
        return int(taken[0]), int(taken[1])

    def ept_fault(self, time_ps: int, gpfns: Words) -> Words:
        """Serve EPT violations (int64[n]); cost of each in ps. Raises RefusedMessage, having changed nothing."""
        began = time.thread_time_ns()
        time_ps = min(time_ps, self._until_ps)
        limit = self.config.total_pages if self.flat else gpa_pages(self.config.total_pages)
        if gpfns.size and (int(gpfns.min()) < 0 or int(gpfns.max()) >= limit):
            raise RefusedMessage(f"gPA frame out of range; this VM has frames 0 to {limit - 1}")
        if np.unique(gpfns).size < gpfns.size:
            raise RefusedMessage("a gPA frame is named twice")
        if self.flat:
            self.view.settle(time_ps)
        fresh = gpfns[(self.memory.ept[gpfns] & BACKED) == 0]
        half = self.config.total_pages
        need = (fresh.size, 0) if self.flat else (int((fresh < half).sum()), int((fresh >= half).sum()))
        free = self.nodes.free_count
        if (sum(need) > int(free.sum())) if self.flat else (need[0] > free[0] or need[1] > free[1]):
            raise RefusedMessage("no frame left in this VM's share; a guest may use what it was given")
        costs = self.config.costs
        cost = np.zeros(gpfns.size, np.int64)
        hints = np.zeros(gpfns.size, np.int64)
        prices = np.array([costs.ept_violation_ps, costs.ept_violation_alloc_ps], np.int64)
        hinted = int(_back(self.memory.ept, self.nodes, gpfns, self.flat, prices, hints, cost))
        if hinted:
            self.meter.now = time_ps
            self.view.in_fault = True
            extra = self.tiering.on_hint_faults(gpfns[hints[:hinted]])
            self.view.in_fault = False
            cost[hints[:hinted]] += extra
        self.cpu_ns += time.thread_time_ns() - began
        return cost

    def prepare(self, now_ps: int, until_ps: int) -> bytes:
        """Run host-side tiering for the coming quantum; the operations that the VM executes in it (`OPERATION`s)."""
        self._until_ps = until_ps
        if not self.flat or now_ps < self.config.start_ps:
            return b""
        began = time.thread_time_ns()
        self.view.settle(now_ps)
        while True:
            timer = self._timers[0][0] if self._timers else until_ps
            due = min(timer, self._next_tick_ps)
            if due >= until_ps:
                break
            self.meter.now = max(now_ps, due)
            if timer <= self._next_tick_ps:
                before = int(self.meter.modelled_ps[TASK].sum())
                self.tiering.on_timer(heapq.heappop(self._timers)[2])
                in_task = int(self.meter.modelled_ps[TASK].sum()) - before
                if in_task:
                    self._next_task_vcpu = (self._next_task_vcpu + 1) % self.config.vcpus
                    self.view.stall(self._next_task_vcpu, max(now_ps, due), in_task)
            else:
                self._next_tick_ps += self._tick_ps
                mark = self.tiering.reclaim_mark
                asleep = due >= self._reclaim_end_ps
                if mark is not None and asleep and self.view.free(FAST) < self.view.watermark(FAST, mark):
                    self.tiering.on_pressure(self._tick_ps)
                    self._reclaim_end_ps = self.meter.now
        operations = self.view.take_operations(until_ps)
        self._events.flush()
        self.cpu_ns += time.thread_time_ns() - began
        return operations

    def take_traffic(self) -> Words:
        """Bytes that the host moved in EPT faults since the last call (int64[4], as `hostd.contention` orders them)."""
        moved = self.view.fault_bytes.copy()
        self.view.fault_bytes[:] = 0
        return moved

    def heard(self, phase: str, counters: Words) -> None:
        """The guest's word at the barrier: its phase, and its counters.

        How many vCPUs a request kicked decides how long the next ones take.
        """
        if self.populated is None and phase != "populate":
            self.populated = Accounts(self.counters.copy(), self.meter.book.copy(), self.meter.modelled_ps.copy())
        delta = counters - self.guest_counters
        requests = int(delta[C.kvm__remote_tlb_flush_requests])
        if requests > 0:
            kicks = int(delta[C.exit__kick])
            self.view.kicked_permille = max(0, min(1000, 1000 * kicks // (requests * self.config.vcpus)))
        self.guest_counters = counters.copy()

    def close(self) -> None:
        """Write out what is buffered."""
        self._events.close()
