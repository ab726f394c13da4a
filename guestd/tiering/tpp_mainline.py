"""TPP as Linux took it: NUMA balancing in memory-tiering mode (kernel.numa_balancing = 2, Linux 6.3).

A page of slow memory is hot when its hint fault comes soon after the scanner protected it: the hint-fault latency
(kernel/sched/fair.c, should_numa_migrate_memory). The threshold follows what the rate limit lets through, hot pages
above the limit are passed over, and while much fast memory is free every page that faults is taken. kswapd makes room
in good time, up to the PROMO watermark; a promotion that finds less than the high one wakes it and fails. No page has
to be on an active list, and there is no WMARK_DEMOTE. Left out: direct reclaim, without which a node that kswapd gave
up on stays so in Linux, while here it is tried again every 10 s; file pages; and that a page which the threshold was
bypassed for is not in `pgpromote_candidate` in Linux, while it is here.
"""

from enum import IntEnum, auto

import numpy as np

from guestd.meter import metered
from guestd.mm.kswapd import Kswapd
from guestd.mm.nodes import FAST, NO_PAGE, WMARK_HIGH, WMARK_LOW, WMARK_PROMO
from guestd.params import Param
from guestd.tiering.policy import Params, Policy
from guestd.tiering.stage import FAULT_AGES, FAULTS, Evidence, Stage, composed
from guestd.tiering.tpp import HINT_FAULTS, FaultRanked, InFault, gains_ps
from guestd.tiering.view import PageView
from proto.arrays import Mask, Words
from proto.counters import C
from proto.units import PAGE_SHIFT, PS_PER_MS, PS_PER_S

ADJUST_STEPS = 16
"""NUMA_MIGRATION_ADJUST_STEPS: the threshold moves by as many parts of twice its default."""
ENOUGH_SHIFT = 4
"""pgdat_free_space_enough: much is free with a sixteenth of the node above WMARK_PROMO, if that is 1 GiB at least."""
_MB_PAGES = 1 << (20 - PAGE_SHIFT)


class J(IntEnum):
    """State of the judgement (struct pglist_data, nbp_*)."""

    THRESHOLD = 0
    """ps"""
    CANDIDATES = auto()
    """Pages found hot so far."""
    TUNED_PS = auto()
    """When the threshold was last tuned, and the candidates of then."""
    TUNED_CANDIDATES = auto()
    LIMITED_PS = auto()
    """When the window of the rate limit began, and the candidates of then."""
    LIMITED_CANDIDATES = auto()


@metered
def judge(state: Words, ages: Words, sizes: Words, now: int, default_ps: int, period_ps: int, rate_pages: int,
          out: Mask) -> int:  # fmt: skip
    """Which hint faults promote (bool[n]), by age (int64[n], ps) and pages (int64[n]); returns the pages passed over.

    numa_promotion_adjust_threshold and numa_promotion_rate_limit (kernel/sched/fair.c). ``rate_pages``: per second.
    """
    if now - state[J.TUNED_PS] > period_ps:
        state[J.TUNED_PS] = now
        expected = rate_pages * (period_ps // PS_PER_MS) // 1000
        found = state[J.CANDIDATES] - state[J.TUNED_CANDIDATES]
        unit = 2 * default_ps // ADJUST_STEPS
        if found > expected * 11 // 10:
            state[J.THRESHOLD] = max(state[J.THRESHOLD] - unit, unit)
        elif found < expected * 9 // 10:
            state[J.THRESHOLD] = min(state[J.THRESHOLD] + unit, 2 * default_ps)
        state[J.TUNED_CANDIDATES] = state[J.CANDIDATES]
    passed_over = 0
    for i in range(ages.size):
        out[i] = ages[i] < state[J.THRESHOLD]
        if out[i]:
            state[J.CANDIDATES] += sizes[i]
            if now - state[J.LIMITED_PS] > PS_PER_S:
                state[J.LIMITED_PS], state[J.LIMITED_CANDIDATES] = now, state[J.CANDIDATES]
            if state[J.CANDIDATES] - state[J.LIMITED_CANDIDATES] >= rate_pages:
                out[i] = False
                passed_over += sizes[i]
    return passed_over


class FaultLatency(FaultRanked):
    """See the module."""

    wants_ages = True

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._default_ps = int(params["hot_threshold_ms"]) * PS_PER_MS
        self._period_ps = int(params["tune_period_ms"]) * PS_PER_MS
        self._rate_pages = int(params["promote_rate_limit_mbps"]) * _MB_PAGES
        self._enough = int(params["enough_free_mb"]) * _MB_PAGES
        self._state = np.zeros(len(J), np.int64)
        self._state[J.THRESHOLD] = self._default_ps

    @property
    def threshold_ps(self) -> int:
        """The hint-fault latency below which a page is hot now."""
        return int(self._state[J.THRESHOLD])

    def _much_is_free(self) -> bool:
        view = self.view
        enough = max(self._enough, int(view.nodes.managed[FAST]) >> ENOUGH_SHIFT)
        return view.free(FAST) > view.watermark(FAST, WMARK_PROMO) + enough

    def _wants(self, evidence: Evidence) -> Mask:
        view, pages = self.view, evidence.pages
        assert evidence.age_ps is not None, "needs FAULT_AGES"
        view.meter.charge(view.costs.classify_record_ps * pages.size)
        mapped = view.frames(pages) != NO_PAGE
        if self._much_is_free():
            self._state[J.THRESHOLD] = self._default_ps
            return mapped
        wanted = np.empty(pages.size, np.bool_)
        passed_over = judge(view.meter.book, self._state, evidence.age_ps, view.sizes(pages), view.now,
                            self._default_ps, self._period_ps, self._rate_pages, wanted)  # fmt: skip
        # Those that go on to the migrator are counted there.
        view.counters[C.vmstat__pgpromote_candidate] += passed_over
        return wanted & mapped


class PromoWatermark(InFault):
    """Promotes in the hint fault; kswapd, once awake, balances the fast node up to WMARK_PROMO (mm/vmscan.c).

    It wakes when an allocation finds less than the low watermark, or a promotion less than the high one.
    """

    reclaim_mark: int | None = WMARK_LOW

    def _new_kswapd(self) -> Kswapd:
        return Kswapd(self.view, WMARK_PROMO, protect=False)

    def _keep(self) -> int:
        # migrate_balanced_pgdat: above the high watermark when the page is there.
        return self.view.watermark(FAST, WMARK_HIGH) + 1

    def on_faults(self, pages: Words, wanted: Mask, cost_ps: Words) -> None:
        super().on_faults(pages, wanted, cost_ps)
        if wanted.any() and self.view.free(FAST) <= self._keep():
            self.reclaim_mark = WMARK_PROMO

    def on_pressure(self, budget_ps: int) -> None:
        self.reclaim_mark = WMARK_PROMO
        super().on_pressure(budget_ps)
        if self.view.free(FAST) >= self.view.watermark(FAST, WMARK_PROMO):
            self.reclaim_mark = WMARK_LOW


FAULT_LATENCY = Stage(
    name="fault-latency",
    kind="classifier",
    summary="a page is hot when it is accessed soon after the scan",
    source="Linux 6.3, kernel/sched/fair.c, should_numa_migrate_memory",
    create=FaultLatency,
    params=(
        Param("hot_threshold_ms", 1000, "ms", "hint-fault latency below which a page is hot, to begin with",
              "debugfs sched/numa_balancing/hot_threshold_ms", (), 1, 600_000),
        Param("promote_rate_limit_mbps", 65536, "MB/s", "hot pages above this rate are not promoted",
              "sysctl numa_balancing_promote_rate_limit_MBps; the default is recalled, not read", (), 0, 1 << 30),
        Param("tune_period_ms", 60000, "ms", "time between adjustments of the threshold",
              "kernel/sched/fair.c, scan_period_max", (), 1, 600_000),
        Param("enough_free_mb", 1024, "MB", "with so much free above WMARK_PROMO (or 1/16 of the node, if that is "
              "more) all that fault are promoted", "kernel/sched/fair.c, pgdat_free_space_enough", (), 0, 1 << 30),
    ),
    needs=frozenset({FAULT_AGES}),
    warm_up={"hot_threshold_ms": 1000, "tune_period_ms": 1},
)  # fmt: skip
PROMO_WATERMARK = Stage(
    name="promo-watermark",
    kind="migrator",
    summary="promotion in the fault; kswapd demotes from the LRU's tail up to WMARK_PROMO",
    source="Linux 6.3, mm/migrate.c, numamigrate_isolate_page; mm/vmscan.c, pgdat_balanced",
    create=PromoWatermark,
    needs=frozenset({FAULTS}),
)

POLICY = composed(
    Policy(
        name="tpp-mainline",
        summary="TPP as in mainline Linux: hint-fault latency, rate limit, PROMO watermark",
        view="guest",
        source="Linux 6.3, kernel.numa_balancing = 2",
        left_out="direct reclaim; file pages; that pages for which the threshold was bypassed are no candidates",
        gains_ps=gains_ps,
    ),
    HINT_FAULTS,
    FAULT_LATENCY,
    PROMO_WATERMARK,
)
