"""Memtis (SOSP'23) in a guest's kernel: PEBS with a CPU quota, a histogram of access counts, background migration.

ksampled visits the perf rings every 2 ms; how much it may use of a CPU decides, by one step each 15 s, how often the
PMU samples. Of the histogram (`guestd.tiering.histogram`) the hottest bins that fit fast memory are hot. kmigrated,
every 500 ms, keeps fast memory free, promotes hot pages and splits huge pages whose heat is skewed. From public code
(linux/mm/htmm_*.c), where it and the paper differ. Left out: samples lost to a contended mmap_lock; quota 0, with
which ksampled never sleeps; limits per memcg (the node is the limit); dropping sub-pages that were never written; the
order of file pages. What the code does in passes of rising priority, or by eighths of a list twelve times, is one pass.
"""

import numpy as np

from guestd.mm.nodes import ACTIVE, FAST, INACTIVE, SLOW, WMARK_HIGH, WMARK_MIN
from guestd.params import Param
from guestd.tiering.histogram import HISTOGRAM
from guestd.tiering.hyperplace import sampled
from guestd.tiering.pages import expand
from guestd.tiering.policy import Params, Policy, Sampling
from guestd.tiering.stage import SAMPLES, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.counters import C
from proto.units import PAGE_SHIFT, PAGE_SIZE, PS_PER_MS, PS_PER_US, TABLE_PAGES

LOAD_PERIODS = (199, 293, 401, 499, 599, 701, 797, 907, 997, 1201, 1399, 1601, 1801, 1999, 2503, 3001, 3499, 4001, 4507,
                4999, 6007, 7001, 7993, 9001, 10007, 12007, 13999, 16001, 17989, 19997)  # fmt: skip
STORE_PERIODS = (100003, 300007, 600011, 1000003, 1500003)
"""The steps of the feedback (include/linux/htmm.h)."""
EVENTS = 3
RECORD_BYTES = 32
"""In the perf ring: header, IP, TID, address."""

_MB = 1 << 20
_CODE = "linux/mm/htmm_sampler.c"
_MIGRATER = "linux/mm/htmm_migrater.c"

KSAMPLED_PARAMS = (
    Param("load_period", 199, "events", "LLC-miss loads of each tier per record, until the first step", _CODE, (),
          1, 10_000_000),
    Param("store_period", 100007, "events", "stores per record, until the first step; 0 = off", _CODE, (),
          0, 100_000_000),
    Param("visit_ms", 2, "ms", "ksampled's sleep between two visits of the rings", _CODE, (), 1, 10_000),
    Param("quota_permille", 30, "1/1000 CPU", "what ksampled may use of a CPU", "ksampled_soft_cpu_quota", (), 1, 1000),
    Param("quota_margin_permille", 5, "1/1000 CPU", "how far from it before the periods change", _CODE, (), 0, 1000),
    Param("quota_interval_ms", 15_000, "ms", "time between two decisions, of one step each", _CODE, (), 1, 600_000),
    Param("ring_pages", 32, "pages", "perf ring per event and CPU", "include/linux/htmm.h, BUFFER_SIZE", (), 1, 65536),
    Param("large_pebs", True, "", "interrupt when the buffer is nearly full, not at each record: its sample type "
          "(IP, TID, ADDR) qualifies", "arch/x86/events/intel/ds.c, pebs_update_threshold"),
)  # fmt: skip

KMIGRATED_PARAMS = (
    Param("kmigrated_ms", 500, "ms", "time between two wake-ups", "htmm_demotion_period_in_ms and "
          "htmm_promotion_period_in_ms", (), 1, 600_000),
    Param("demotion_mark_percent", 2, "% of fast memory", "demote below as much free memory", _MIGRATER, (), 0, 50),
    Param("demotion_mark_min_mb", 50, "MB", "at least", _MIGRATER, (), 0, 1 << 20),
    Param("demotion_mark_max_mb", 1000, "MB", "at most", _MIGRATER, (), 0, 1 << 20),
    Param("promotion_mark_percent", 3, "% of fast memory", "promote and demote to as much", _MIGRATER, (), 0, 50),
    Param("promotion_mark_min_mb", 100, "MB", "at least", _MIGRATER, (), 0, 1 << 20),
    Param("promotion_mark_max_mb", 1500, "MB", "at most", _MIGRATER, (), 0, 1 << 20),
    Param("direct_demotion_mb", 100, "MB", "what more is demoted when allocations find fast memory low", _MIGRATER, (),
          0, 1 << 20),
    Param("mark_cap_percent", 10, "% of fast memory", "no constant in MB counts for more",
          "unpublished: so that memory below a few GiB has marks that make sense", (), 1, 100),
    Param("splits_per_wakeup", 50, "huge pages", "split per wake-up", "MAX_NUM_SPLIT", (), 0, 1 << 20),
    Param("migrate_batch", 512, "pages", "moved before kmigrated yields its vCPU for as long as it took",
          "unpublished: cond_resched in migrate_pages", (), 1, 1 << 20),
)  # fmt: skip


class Ksampled(Tracker):
    """One kernel thread that empties all rings, and keeps itself to its quota by changing the sample periods."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        ring_bytes = int(params["ring_pages"]) * PAGE_SIZE
        self._ring = np.zeros((view.vcpus * EVENTS * ring_bytes // RECORD_BYTES, 5), np.int64)
        """The rings of all events and CPUs together, in order of arrival."""
        self._waiting = 0
        self._visit = int(params["visit_ms"]) * PS_PER_MS
        self._interval = int(params["quota_interval_ms"]) * PS_PER_MS
        self._busy = 0
        self._since = 0
        self.step = 0
        """Where the sample periods are in their tables."""

    def start(self) -> None:
        self._since = self.view.now
        self.schedule("visit", self.view.now + self._visit)

    def on_samples(self, samples: Words) -> None:
        """Into the ring; records that find it full are lost (PERF_RECORD_LOST)."""
        count = min(samples.shape[0], self._ring.shape[0] - self._waiting)
        self._ring[self._waiting : self._waiting + count] = samples[:count]
        self._waiting += count

    def on_timer(self, name: str) -> None:
        view, costs = self.view, self.view.costs
        began = view.now
        count, self._waiting = self._waiting, 0
        # It wakes up and goes to sleep, and reads each record once more after the drain that brought it to the ring.
        view.meter.charge(2 * costs.context_switch_ps + costs.drain_record_ps * count)
        if count:
            self.classifier.observe(sampled(view, self._ring[:count]))
        self._busy += view.now - began
        if view.now - self._since >= self._interval:
            self._keep_quota()
        self.schedule("visit", view.now + self._visit)

    def _keep_quota(self) -> None:
        """One step of the tables up or down (htmm_sampler.c, ksampled)."""
        view, params = self.view, self.params
        elapsed = view.now - self._since
        used, quota = 1000 * self._busy, int(params["quota_permille"]) * elapsed
        margin = int(params["quota_margin_permille"]) * elapsed
        step = self.step
        if used > quota + margin:
            step = min(self.step + 1, len(LOAD_PERIODS) - 1)
        elif used < quota - margin:
            step = max(self.step - 1, 0)
        self._busy, self._since = 0, view.now
        if step != self.step:
            self.step = step
            load = LOAD_PERIODS[step]
            store = STORE_PERIODS[min(step, len(STORE_PERIODS) - 1)] if params["store_period"] else 0
            view.program_pmu(_sampling(params | {"load_period": load, "store_period": store}))


class Kmigrated(Migrator):
    """Demotes what is cold to make room for what is hot, and promotes as far as there is room."""

    reclaim_mark: int | None = WMARK_HIGH

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        fast = int(view.nodes.managed[FAST])
        cap = fast * int(params["mark_cap_percent"]) // 100

        def mark(name: str) -> int:
            least, most = (int(params[f"{name}_mark_{bound}_mb"]) * _MB >> PAGE_SHIFT for bound in ("min", "max"))
            return min(cap, max(least, min(most, fast * int(params[f"{name}_mark_percent"]) // 100)))

        self._demotion_mark, self.promotion_mark = mark("demotion"), mark("promotion")
        self._direct = min(cap, int(params["direct_demotion_mb"]) * _MB >> PAGE_SHIFT)
        self._wanted: Words = np.zeros(0, np.int64)
        self._victims: Words = np.zeros(0, np.int64)
        self._working = False
        """A batch is scheduled already."""

    def start(self) -> None:
        self.schedule("wake", self.view.now + int(self.params["kmigrated_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        if name == "wake":
            self.schedule("wake", self.view.now + int(self.params["kmigrated_ms"]) * PS_PER_MS)
            self._plan()
        else:
            self._working = False
        if not self._working:
            self._work()

    def _plan(self) -> None:
        view = self.view
        chosen = self.classifier.splittable(int(self.params["splits_per_wakeup"]))
        if chosen.size:
            view.split(chosen)
        free = view.free(FAST)
        room = max(0, free - self.promotion_mark) + int(view.nodes.size[2 * FAST + INACTIVE])
        self._wanted = self.classifier.promotions(min(room, int(view.nodes.managed[FAST])))
        pending = int(view.sizes(self._wanted).sum())
        view.counters[C.vmstat__pgpromote_candidate] += pending
        need = pending + self.promotion_mark - free if pending or free < self._demotion_mark else 0
        self._victims = self.classifier.demotions(max(0, need))

    def on_pressure(self, budget_ps: int) -> None:
        """Allocations come close to the slow tier: demote now, from the active list too (need_direct_demotion)."""
        view = self.view
        need = max(0, self.promotion_mark - view.free(FAST)) + self._direct
        victims = self.classifier.demotions(need)
        need -= int(view.sizes(victims).sum())
        if need > 0:
            frames = view.isolate(FAST, ACTIVE, need)
            active = np.ones(frames.size, np.bool_)
            view.put_back(frames, active, ~active)
            victims = np.concatenate([victims, view.pages_of(frames)])
        self._victims = victims
        if not self._working:
            self._work()

    def _work(self) -> None:
        """One batch of each; the thread shares its vCPU with the task, so the next one is due as much later."""
        view, batch = self.view, int(self.params["migrate_batch"])
        before = view.now
        cold, self._victims = _split_off(self._victims, view.sizes(self._victims), batch)
        demoted = self._move(cold, SLOW, view.watermark(SLOW, WMARK_MIN))
        view.counters[C.vmstat__pgdemote_kswapd] += demoted
        hot, self._wanted = _split_off(self._wanted, view.sizes(self._wanted), batch)
        promoted = self._move(hot, FAST, self.promotion_mark)
        view.counters[C.vmstat__pgpromote_success] += promoted
        if self._victims.size or (self._wanted.size and promoted):
            self._working = True
            self.schedule("work", view.now + (view.now - before))

    def _move(self, pages: Words, node: int, keep: int) -> int:
        """Pages moved; a huge page for which there is no block is split if its pieces have room (migrate_pages)."""
        view = self.view
        sizes = view.sizes(pages)
        moved = view.move(pages, node, keep)
        count = int(sizes[moved].sum())
        stay = pages[~moved & (sizes > 1)]
        if stay.size and view.free(node) > keep:
            heads = stay[view.split(stay)]
            pieces = expand(heads, np.full(heads.size, TABLE_PAGES))
            count += int(view.move(pieces, node, keep).sum())
        view.counters[C.vmstat__pgmigrate_fail] += int(sizes.sum()) - count
        return count


def _split_off(pages: Words, sizes: Words, limit: int) -> tuple[Words, Words]:
    """The first units of ``pages`` that together have ``limit`` pages, and the rest."""
    count = int(np.searchsorted(np.cumsum(sizes), limit)) + 1
    return pages[:count], pages[count:]


def _sampling(params: Params) -> Sampling:
    period = int(params["load_period"])
    return Sampling(
        load_period=0,
        latency_threshold_ns=0,
        store_period=int(params["store_period"]),
        fast_miss_period=period,
        slow_miss_period=period,
        large=bool(params["large_pebs"]),
    )


PEBS_KSAMPLED = Stage(
    name="pebs-ksampled",
    kind="tracker",
    summary="a kernel thread empties the PEBS rings every 2 ms; its CPU quota decides the sample periods",
    source=f"Memtis, SOSP'23, 4.1; {_CODE}",
    create=Ksampled,
    params=KSAMPLED_PARAMS,
    views=("guest",),
    gives=frozenset({SAMPLES}),
    sampling=_sampling,
    warm_up={"load_period": 7, "store_period": 50, "visit_ms": 1, "quota_interval_ms": 20},
    min_run_ps=lambda params: int(params["visit_ms"]) * PS_PER_MS,
)
KMIGRATED = Stage(
    name="kmigrated",
    kind="migrator",
    summary="a kernel thread demotes to make room for hot pages, promotes into it, and splits skewed huge pages",
    source=f"Memtis, SOSP'23, 4.2 and 4.3; {_MIGRATER}",
    create=Kmigrated,
    params=KMIGRATED_PARAMS,
    warm_up={"kmigrated_ms": 2, "migrate_batch": 64},
    min_run_ps=lambda params: int(params["kmigrated_ms"]) * PS_PER_MS,
)

POLICY = composed(
    Policy(
        name="memtis",
        summary="PEBS under a CPU quota, histogram of access counts, background migration, splits of skewed huge pages",
        view="guest",
        source="Memtis, SOSP'23; cosmoss-jigu/memtis",
        left_out="samples lost to a contended mmap_lock; quota 0, with which ksampled never sleeps; limits per memcg "
        "(the node is the limit); dropping sub-pages that were never written; file pages",
        # Ten wake-ups to tell hot from cold, and a microsecond of time for each page of memory to move the hot ones in.
        gains_ps=lambda params, pages: 10 * int(params["kmigrated_ms"]) * PS_PER_MS + pages * PS_PER_US,
    ),
    PEBS_KSAMPLED,
    HISTOGRAM,
    KMIGRATED,
)
