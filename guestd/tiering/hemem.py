"""HeMem (SOSP'21) in a guest: a user-space library with a thread that polls the PEBS rings and owns a core for it.

The poller never sleeps, so that what it costs is the time it runs, whatever there is to do: so it is charged and marked
(`agent_cpu.by_definition`): a core of its own beside the VM's vCPUs, so one core. With ``poller_core=shared`` it is
pinned to CPU 1, where the workload has a thread too, so that the scheduler gives it every second turn, half of that
vCPU. The policy thread (CPU 2) moves 2 MiB at a time: write-protect, copy by up to 4 threads, remap; writers fault and
wait until then. Classifier: `guestd.tiering.fifo_lists`. Left out: the copy by I/OAT DMA, which a VM has not; the fault
thread (CPU 0) and userfaultfd, but for what a waiting writer pays; a separate cooling thread (``sosp``: its work is the
policy thread's); that other threads use the vCPU while a writer waits.
"""

import numpy as np

from guestd.mm.nodes import FAST, SLOW, WMARK_MIN
from guestd.params import Param
from guestd.tiering.fifo_lists import CONSTANTS, FIFO_LISTS, POLICY_CPU, TURN
from guestd.tiering.hyperplace import sampled
from guestd.tiering.policy import AgentThread, Params, Policy, Sampling
from guestd.tiering.stage import SAMPLES, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.costs import copy_ps
from proto.counters import C
from proto.units import PAGE_SHIFT, PAGE_SIZE, PS_PER_MS, TABLE_PAGES

PERIODS = {"sosp": 5003, "head": 19997}
EVENTS = 3
RECORD_BYTES = 40
"""In the perf ring: header, IP, TID, address, weight."""
POLLER_CPU = 1
_GIB_SHIFT = 30


class PebsPoller(Tracker):
    """A thread that reads the rings all the time it is given."""

    never_sleeps = True

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        capacity = view.vcpus * EVENTS * int(params["poll_ring_pages"]) * PAGE_SIZE // RECORD_BYTES
        self._ring: list[Words] = []
        self._room = self._capacity = capacity
        self._turn = int(params["turn_ms"]) * PS_PER_MS
        self._alone = params["poller_core"] == "extra"

    def start(self) -> None:
        self.schedule("turn", self.view.now)

    def thread_of(self, name: str) -> AgentThread:
        return AgentThread(vcpu=POLLER_CPU % self.view.vcpus, own_core=self._alone, user=True)

    def on_samples(self, samples: Words) -> None:
        """Into the ring; records that find it full are lost (PERF_RECORD_LOST)."""
        if self._room > 0:
            self._ring.append(samples[: self._room].copy())
            self._room -= self._ring[-1].shape[0]

    def on_timer(self, name: str) -> None:
        view = self.view
        began = view.now
        if self._ring:
            records = np.concatenate(self._ring)
            self._ring, self._room = [], self._capacity
            view.meter.charge(view.costs.drain_record_ps * records.shape[0])
            self.classifier.observe(sampled(view, records))
        view.meter.charge(max(0, self._turn - (view.now - began)))
        self.schedule("turn", view.now if self._alone else view.now + self._turn)


class WriteProtect(Migrator):
    """Moves 2 MiB at a time under write protection: the first hot region up, and for want of room a cold one down."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._threads = min(view.vcpus, int(params["copy_threads"]))
        self._moving: tuple[Words, int] | None = None
        """Pages that are being copied, and to which node."""
        self._until = 0
        self._left = 0
        """Pages that this loop may still move."""

    def thread_of(self, name: str) -> AgentThread:
        return AgentThread(vcpu=POLICY_CPU % self.view.vcpus, user=True)

    def on_ranking(self) -> None:
        with self.view.meter.stage(self.books):
            if self._moving is None:
                self._left = int(self.params["loop_cap_gib"]) << (_GIB_SHIFT - PAGE_SHIFT)
                self._next()

    def on_write_fault(self, page: int) -> int:
        """userfaultfd: the writer sleeps until the region is remapped."""
        view = self.view
        view.meter.charge(view.hint_fault_ps + 2 * view.costs.context_switch_ps)
        return max(0, self._until - view.now) + view.hint_fault_ps + 2 * view.costs.context_switch_ps

    def on_timer(self, name: str) -> None:
        """The copy is done: remap, and go on with the next one."""
        assert self._moving is not None
        view = self.view
        (pages, node), self._moving = self._moving, None
        sizes = view.sizes(pages)
        moved = view.move(pages, node, view.watermark(node, WMARK_MIN), copied=True)
        view.end_write_protection(pages)
        # Without a block for a huge page the next loop moves its pieces, as migrate_pages would.
        view.split(pages[~moved & (sizes > 1)])
        count = int(sizes[moved].sum())
        view.counters[C.vmstat__pgpromote_success if node == FAST else C.vmstat__pgdemote_kswapd] += count
        view.counters[C.vmstat__pgmigrate_fail] += int(sizes.sum()) - count
        self._left -= count
        if count and self._left > 0:
            self._next()

    def _next(self) -> None:
        """Take the first hot slow region if fast memory has room for it, else make room by the first cold fast one."""
        wanted = self.classifier.promotions(TABLE_PAGES)
        if wanted.size == 0:
            return
        if int(self.view.sizes(wanted).sum()) <= self._room(FAST):
            self._begin(wanted, FAST)
            return
        victims = self._fitting(self.classifier.demotions(TABLE_PAGES), SLOW)
        if victims.size:
            self._begin(victims, SLOW)
        elif (part := self._fitting(wanted, FAST)).size:
            self._begin(part, FAST)

    def _room(self, node: int) -> int:
        return max(0, self.view.free(node) - self.view.watermark(node, WMARK_MIN))

    def _fitting(self, pages: Words, node: int) -> Words:
        """The first of them for which a node has room."""
        return pages[np.cumsum(self.view.sizes(pages)) <= self._room(node)]

    def _begin(self, pages: Words, node: int) -> None:
        """Write-protect and copy; until that is done, writers wait."""
        view = self.view
        view.write_protect(pages)
        copies = int(view.sizes(pages).sum()) * copy_ps(view.costs, node == FAST, node == SLOW)
        view.work_together(self._threads, copies)
        self._moving, self._until = (pages, node), view.now
        self.schedule("copied", view.now)


def _sampling(params: Params) -> Sampling:
    period = int(params["poll_period"]) or PERIODS[str(params["constants"])]
    return Sampling(
        load_period=0,
        latency_threshold_ns=0,
        store_period=period,
        fast_miss_period=period,
        slow_miss_period=period,
        large=bool(params["large_pebs"]),
    )


PEBS_POLLER = Stage(
    name="pebs-poller",
    kind="tracker",
    summary="a user thread that polls the PEBS rings and never sleeps",
    source="HeMem, SOSP'21, 3.2; src/pebs.c",
    create=PebsPoller,
    params=(
        CONSTANTS,
        TURN,
        Param("poll_period", 0, "events", "LLC-miss loads of each tier, and stores, per record; 0 = by `constants`",
              "src/pebs.h, SAMPLE_PERIOD", (), 0, 10_000_000),
        Param("poll_ring_pages", 1 << 14, "pages", "perf ring per event and CPU", "src/pebs.h, PERF_PAGES", (),
              1, 1 << 20),
        Param("poller_core", "extra", "", "the poller has a core beside the vCPUs, or shares vCPU 1 with the workload",
              "HeMem 3.2: a dedicated core; for VMs unpublished", ("extra", "shared")),
        Param("large_pebs", True, "", "interrupt when the buffer is nearly full, not at each record: its sample type "
              "(IP, TID, WEIGHT, ADDR) qualifies", "arch/x86/events/intel/ds.c, pebs_update_threshold"),
    ),
    views=("guest",),
    gives=frozenset({SAMPLES}),
    sampling=_sampling,
    warm_up={"poll_period": 31, "turn_ms": 1},
)  # fmt: skip
WRITE_PROTECT = Stage(
    name="write-protect",
    kind="migrator",
    summary="2 MiB at a time: write-protect, copy, remap; writers wait",
    source="HeMem, SOSP'21, 3.4; src/hemem.c",
    create=WriteProtect,
    params=(
        Param("copy_threads", 4, "threads", "threads that copy, each on a vCPU of its own",
              "src/hemem.h, MAX_COPY_THREADS", (), 1, 64),
        Param("loop_cap_gib", 10, "GiB", "moved in one loop of the policy thread at most", "PEBS_MIGRATE_RATE", (),
              1, 1 << 20),
    ),
    views=("guest",),
)  # fmt: skip

POLICY = composed(
    Policy(
        name="hemem",
        summary="a polling user thread, FIFO lists of hot and cold 2 MiB regions, copies under write protection",
        view="guest",
        source="HeMem, SOSP'21; cuhk-mass/hemem",
        left_out="the copy by DMA, which a VM has not; userfaultfd but for what a waiting writer pays; the separate "
        "cooling thread; that small allocations stay fast; that other threads use the vCPU while a writer waits",
    ),
    PEBS_POLLER,
    FIFO_LISTS,
    WRITE_PROTECT,
)
