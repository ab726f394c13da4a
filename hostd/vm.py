"""One VM as the host keeps it: its EPT, its share of each tier, and the host-side tiering that manages it.

Static provisioning: a VM owns `fast_pages` frames of the fast tier and `slow_pages` of the slow one; the free lists are
the mutable state of that share. It is backed at a guest's first touch, or whole and for good before the guest runs
(``host.populate``). Frame slots and gPA frames are numbered alike (proto.layout): in a guest-delegated
design gPA node 0 is backed by the fast tier and node 1 by the slow one; in a host-side design the guest has one flat
node, and first touch takes fast frames until the low watermark (Linux allocation order). With ``host.thp=always`` the
first touch of 2 MiB of gPA takes a block of frames for all of it, if a tier has one, which the EPT maps with one entry.
"""

import heapq
import time

import numpy as np

from guestd.events import EventLog
from guestd.jit import kernel
from guestd.meter import HOST_THREAD, TASK, TRACK, Meter, Snapshot
from guestd.mm.nodes import FAST, new_nodes
from guestd.params import resolve
from guestd.tiering.pages import expand
from guestd.tiering.policy import Policy, Tiering, with_needs
from hostd.backing import BACKED, Prices, back
from hostd.dirty_log import DirtyLog
from hostd.errors import RefusedMessage
from hostd.flat_memory import FlatMemory
from hostd.host_tools import HostTools
from hostd.host_view import HostView
from hostd.swap import Swap
from proto.arrays import Words
from proto.config import GuestConfig, launch_ps
from proto.counters import C, new_counters, split
from proto.entry import FRAME_MASK, FRAME_SHIFT, HUGE
from proto.layout import VmMemory, gpa_pages
from proto.messages import MOST_LISTED
from proto.units import PAGE_SIZE, PS_PER_S, TABLE_PAGES


@kernel
def _count_touched(ept: Words, stamps: Words) -> int:
    """Backed pages that hold something."""
    touched = 0
    for entry in ept:
        if (entry & BACKED) != 0 and stamps[(entry & FRAME_MASK) >> FRAME_SHIFT] != 0:
            touched += 1
    return touched


def _bitmap_of(frames: Words, words: int) -> Words:
    """int64[words] with the bits of ``frames`` set."""
    bits = np.zeros(64 * words, np.uint8)
    bits[frames] = 1
    return np.packbits(bits, bitorder="little").view(np.int64)


class Vm:
    """See the module. ``populated``: the accounts when the guest had populated its memory."""

    def __init__(self, config: GuestConfig, policy: Policy, memory: VmMemory) -> None:
        self.config = config = with_needs(config, policy)
        self.memory = memory
        self.flat = policy.view == "host"
        self.nodes = new_nodes(config.total_pages, config.fast_pages, config.slow_pages)
        self.meter = Meter()
        self.meter.context = HOST_THREAD
        self.counters = new_counters()
        self.guest_counters = new_counters()
        self.populated: Snapshot | None = None
        self.cpu_ns = 0
        """CPU that this host spent on the VM: faults and host-side tiering."""
        self._timers: list[tuple[int, int, str]] = []
        self._sequence = 0
        self._next_task_vcpu = 0
        self._tick_ps = PS_PER_S // config.kernel.hz
        self._next_tick_ps = config.start_ps + self._tick_ps
        self.waiting: Words = np.zeros(0, np.int64)
        """gPA frames of a fault that found no frame free: mapped at barriers, before anything else; the VM waits until
        all of them are at one, as swap may take some meanwhile."""
        self.ended = False
        """The VM said that it executes no operation any more."""
        self.swapped_in_last = 0
        """Pages that it had brought back from swap since, only to look at them."""
        self.until_ps = 0
        """End of the quantum that the VM is in."""
        self._scan_list: Words = np.zeros((0, 2), np.int64)
        self.scanned: tuple[bytes, int] = (b"", 0)
        """The answer to the last list, and when the host was through with it, ps; empty if there was no list."""
        self._reclaim_end_ps = 0
        """kswapd is one thread: no tick wakes it before it is through with what it began."""
        self._events = EventLog(config.events_path if self.flat else "", config.vm)
        self.orchestrate = policy.orchestrate
        view = FlatMemory if config.flat_memory else HostTools
        self.view = view(config, memory, self.nodes, self.meter, self.counters, self._schedule, self._events)
        self.swap: Swap | None = None
        self.dirty_log: DirtyLog | None = None
        host = config.host
        # Pinned pages are never swapped.
        if host.swap_pages_per_s and not host.populate:
            self.swap = Swap(memory, self.nodes, host.swap_pages_per_s, config.start_ps, self._thread_view())
        if host.pml and host.pml_harvest_ps:
            self.dirty_log = DirtyLog(host.pml_harvest_ps, launch_ps(config), self._thread_view())
        self._threads = [thread for thread in (self.swap, self.dirty_log) if thread is not None]
        """The host's threads for this VM beside tiering."""
        self.pinned_pages = self._populate() if host.populate else 0
        self.backed_pages = self.pinned_pages
        """Most frames that backed it at a barrier."""
        params = resolve(policy.params, config.policy_params)
        self.tiering = policy.create(self.view, params) if self.flat else Tiering(self.view, params)
        self.meter.now = config.start_ps
        if self.flat:
            self.tiering.start()

    def accounts(self) -> Snapshot:
        """Those of the host's tiering for the VM, now."""
        return Snapshot.take(self.counters, self.meter, self.cpu_ns)

    def _thread_view(self) -> HostView:
        """A view for a host thread beside tiering, with accounts of its own."""
        meter = Meter()
        meter.context = HOST_THREAD
        return HostView(self.config, self.memory, self.nodes, meter, self.counters, self._schedule, self._events,
                        self.view.operations)  # fmt: skip

    def modelled_s(self) -> float:
        """Modelled CPU of the host's threads for this VM: tiering's, and those beside it."""
        return sum(sum(meter.modelled_s().values()) for meter in (self.meter, *(one.meter for one in self._threads)))

    def _populate(self) -> int:
        """Back and pin every gPA frame that the guest's kernel manages; returns how many."""
        config = self.config
        first = 0 if self.flat else config.total_pages
        fast = config.total_pages if self.flat else config.fast_pages
        slow = 0 if self.flat else config.slow_pages
        gpfns = np.concatenate([np.arange(fast, dtype=np.int64), np.arange(first, first + slow, dtype=np.int64)])
        self._map(gpfns)
        return gpfns.size

    def _price(self, gpfns: Words) -> Words:
        """What an EPT violation of each (int64[n]) costs that takes a frame, ps."""
        costs = self.config.costs
        away = self.swap.away[gpfns] if self.swap is not None else np.zeros(gpfns.size, np.uint8)
        return np.where(away != 0, costs.swap_in_ps, costs.ept_violation_alloc_ps).astype(np.int64)

    def _map(self, gpfns: Words) -> tuple[Words, Words]:
        """Serve EPT violations: (cost of each, ps; which of them, by index, are hint faults)."""
        costs, swap, none = self.config.costs, self.swap, np.zeros(0, np.int64)
        cost, hints = np.zeros(gpfns.size, np.int64), np.zeros(gpfns.size, np.int64)
        prices = Prices(costs.ept_violation_ps, costs.ept_violation_alloc_ps, costs.swap_in_ps,
                         costs.ept_violation_alloc_ps + costs.clear_page_huge_ps)  # fmt: skip
        if swap is not None:
            swap.in_pages += int(swap.away[gpfns].sum())
        content, away = (swap.content, swap.away) if swap is not None else (none, none.astype(np.uint8))
        hinted = int(back(self.memory, self.nodes, gpfns, self.flat, self.config.host.backs_huge, content, away,
                           prices, hints, cost, self.counters))  # fmt: skip
        # A huge page is hinted at once, by the first page of it that is touched.
        first = np.sort(np.unique(self.view.heads(gpfns[hints[:hinted]]), return_index=True)[1])
        cost[np.delete(hints[:hinted], first)] = 0
        return cost, hints[:hinted][first]

    def _schedule(self, name: str, at_ps: int) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (at_ps, self._sequence, name))

    def used(self) -> tuple[int, int]:
        """Frames in use, fast and slow."""
        taken = self.nodes.managed - self.nodes.free_count
        return int(taken[0]), int(taken[1])

    def huge_pages(self) -> dict[str, int]:
        """`host_thp` of a VM in summary.json."""
        counted = split(self.counters)["vmstat"]
        huge = int(np.count_nonzero(self.memory.ept_pde & HUGE))
        named = {name.removeprefix("thp_"): value for name, value in counted.items() if name.startswith("thp_")}
        return named | {"huge_bytes": huge * TABLE_PAGES * PAGE_SIZE}

    def touched(self) -> int:
        """gPA pages that the guest has written to, wherever they are now."""
        away = int(self.swap.away.sum()) if self.swap is not None else 0
        return int(_count_touched(self.memory.ept, self.memory.stamps)) + away

    def ept_fault(self, time_ps: int, gpfns: Words, *, last: bool = False) -> Words:
        """Serve EPT violations (int64[n]); cost of each in ps. Raises RefusedMessage, having changed nothing.

        What finds the pool exhausted only because moves under way hold their frames twice is left `waiting`. ``last``:
        the VM executes no operation any more, so those moves are off.
        """
        began = time.thread_time_ns()
        time_ps = min(time_ps, self.until_ps)
        limit = self.config.total_pages if self.flat else gpa_pages(self.config.total_pages)
        if gpfns.size and (int(gpfns.min()) < 0 or int(gpfns.max()) >= limit):
            raise RefusedMessage(f"gPA frame out of range; this VM has frames 0 to {limit - 1}")
        if np.unique(gpfns).size < gpfns.size:
            raise RefusedMessage("a gPA frame is named twice")
        if self.flat:
            self.view.settle(time_ps)
        backed = (self.memory.ept[gpfns] & BACKED) != 0
        lacks = self._lacks(gpfns[~backed])
        if lacks and not (self.flat and gpfns.size - int(backed.sum()) <= self._frames_not_mapped()):
            raise RefusedMessage("no frame left in this VM's share; a guest may use what it was given")
        if last:
            self.ended, self.waiting = True, gpfns[:0]
            self.swapped_in_last += int(self.swap.away[gpfns].sum()) if self.swap is not None else 0
            if lacks:
                self.view.call_off()
        elif lacks or self.waiting.size:
            self.waiting = np.union1d(self.waiting, gpfns)
        if self.waiting.size:
            cost = self._price(gpfns)
            cost[backed], hinted = self._map(gpfns[backed])
            hints = np.flatnonzero(backed)[hinted]
        else:
            cost, hints = self._map(gpfns)
        if hints.size:
            self.meter.now = time_ps
            self.view.faulting = self.view.heads(gpfns)
            extra = self.tiering.on_hint_faults(gpfns[hints])
            self.view.faulting = gpfns[:0]
            cost[hints] += extra
        self.cpu_ns += time.thread_time_ns() - began
        return cost

    def _lacks(self, fresh: Words) -> bool:
        """Whether there are too few frames free to back gPA frames (int64[n])."""
        fast, slow = (int(free) for free in self.nodes.free_count)
        if self.flat:
            return fresh.size > fast + slow
        on_fast = int((fresh < self.config.total_pages).sum())
        return on_fast > fast or fresh.size - on_fast > slow

    def _frames_not_mapped(self) -> int:
        """Frames of the VM's share that are free, or will be when no move is under way."""
        return int(self.nodes.managed.sum()) - int(np.count_nonzero(self.memory.ept & BACKED))

    def _serve_waiting(self) -> None:
        """Frames that moves have left go to those who wait; the price was paid at the fault."""
        missing = self.waiting[(self.memory.ept[self.waiting] & BACKED) == 0]
        served = missing[: int(self.nodes.free_count.sum())]
        if served.size:
            self._map(served)
        if served.size == missing.size:
            self.waiting = self.waiting[:0]

    def prepare(self, now_ps: int, until_ps: int) -> bytes:
        """Run the host's threads for the coming quantum; the operations that the VM executes in it (`OPERATION`s)."""
        self.until_ps = self.view.barrier_ps = until_ps
        sample_ps = self.config.sample_ps
        if self.flat and until_ps // sample_ps > now_ps // sample_ps:
            self._publish_hot_set()
        self.backed_pages = max(self.backed_pages, sum(self.used()))
        self._scan(now_ps)
        if now_ps < self.config.start_ps or not (self.flat or self._threads or self.view.operations):
            return b""
        for thread in self._threads:
            thread.settle(now_ps)
        if self.flat:
            began = time.thread_time_ns()
            self._manage(now_ps, until_ps)
            self._events.flush()
            self.cpu_ns += time.thread_time_ns() - began
        for thread in self._threads:
            thread.run(now_ps, until_ps)
        return self.view.take_operations(until_ps)

    def take_list(self, ranges: Words) -> None:
        """The guest's list of gPA ranges to scan at this barrier (int64[n, 2]: first, count; n = 0: none).

        Raises RefusedMessage, having changed nothing.
        """
        limit = self.config.total_pages if self.flat else gpa_pages(self.config.total_pages)
        first, count = ranges[:, 0], ranges[:, 1]
        inside = ((first >= 0) & (first < limit) & (count > 0) & (count <= limit)).all()
        if not inside or (first + count > limit).any() or (first[1:] < (first + count)[:-1]).any():
            raise RefusedMessage(f"scan_list: rising, disjoint ranges of this VM's gPA frames, 0 to {limit - 1}")
        if int(count.sum()) > MOST_LISTED:
            raise RefusedMessage(f"scan_list: {int(count.sum())} pages are more than the {MOST_LISTED} of a list")
        self._scan_list = ranges

    def _scan(self, now_ps: int) -> None:
        """A thread of the host scans the guest's list, and nothing else (HeteroOS)."""
        self.scanned = b"", 0
        if self._scan_list.size:
            began = time.thread_time_ns()
            self.meter.now = now_ps
            with self.meter.stage(TRACK):
                bits = self.view.scan_list(self._scan_list)
            self.scanned = bits.tobytes(), self.meter.now
            self._scan_list = self._scan_list[:0]
            self.cpu_ns += time.thread_time_ns() - began

    def _publish_hot_set(self) -> None:
        """At the barrier before the one at which the emulator compares it with the truth."""
        hot = self.tiering.hot_set()
        if hot is not None:
            words = self.memory.believed
            heads = (hot % TABLE_PAGES == 0) & ((self.memory.ept_pde[hot // TABLE_PAGES] & HUGE) != 0)
            pages = expand(hot, np.where(heads, TABLE_PAGES, 1))
            words[0], words[1:] = 1, _bitmap_of(pages, words.size - 1)

    def _manage(self, now_ps: int, until_ps: int) -> None:
        """Host-side tiering for the coming quantum."""
        self.view.settle(now_ps)
        if self.waiting.size:
            self._serve_waiting()
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
            self.populated = self.accounts()
        delta = counters - self.guest_counters
        requests = int(delta[C.kvm__remote_tlb_flush_requests])
        if requests > 0:
            kicks = int(delta[C.exit__kick])
            permille = max(0, min(1000, 1000 * kicks // (requests * self.config.vcpus)))
            for view in (self.view, *(thread.view for thread in self._threads)):
                view.kicked_permille = permille
        self.guest_counters = counters.copy()
        if isinstance(self.view, FlatMemory):
            self.view.guest_counters = self.guest_counters

    def close(self) -> None:
        """Write out what is buffered."""
        self._events.close()
