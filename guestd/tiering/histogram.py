"""Memtis' classifier (SOSP'23, 4.2 and 4.3; linux/mm/htmm_core.c): which bins of the histogram are hot, which warm.

Thresholds are chosen anew after every so many samples, counts are cooled after many more; what is hot is on the active
list, moved when it is sampled and, after a change, by whoever next asks for pages of its node (in Memtis kmigrated).
Cooling is also when huge pages are chosen to be split: as many as their estimated gain is worth, the most skewed first.
"""

import numpy as np

from guestd.mm.nodes import ACTIVE, FAST, INACTIVE, SLOW
from guestd.params import Param
from guestd.tiering.access_counts import (
    BASE_HITS,
    BASE_HOT,
    BINS,
    CLOCK,
    EPOCH,
    FAST_HITS,
    HOT,
    SKEW_BUCKETS,
    WARM,
    levels,
    new_heat,
    record,
    survey,
    take,
    walk,
)
from guestd.tiering.policy import Params
from guestd.tiering.stage import Classifier, Evidence, Stage
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.counters import C
from proto.units import TABLE_PAGES

_CORE = "linux/mm/htmm_core.c"

HISTOGRAM_PARAMS = (
    Param("cooling_samples", 2_000_000, "samples", "all counts are halved after as many", "htmm_cooling_period", (),
          1, 1_000_000_000),
    Param("cooling_growth_pages", 2_621_440, "pages", "or when memory grew by as much", "htmm_thres_cooling_alloc", (),
          1, 1 << 40),
    Param("adaptation_samples", 100_000, "samples", "thresholds are chosen anew after as many",
          "htmm_adaptation_period", (), 1, 1_000_000_000),
    Param("least_hot", 1, "bin", "lowest threshold of a hot page", "htmm_thres_hot", (), 0, BINS - 1),
    Param("warm_below_percent", 75, "% of fast memory", "there are warm pages if the hot bins fill less", _CORE, (),
          0, 100),
    Param("skip_cooling", True, "", "a new page sits out the first cooling", "htmm_skip_cooling"),
    Param("hot_reserve_percent", 3, "% of fast memory", "what the hot bins leave free, as kmigrated does", _CORE, (),
          0, 50),
    Param("split", True, "", "split huge pages whose heat is skewed", "htmm_thres_split"),
    Param("split_gamma_percent", 40, "%", "part of the estimated gain for which pages are split", "htmm_gamma", (),
          0, 100),
    Param("split_gain_percent", 3, "%", "no more splits if the fast tier's hits rose by less", _CORE, (), 0, 100),
    Param("split_estimate_percent", 95, "%", "part of the estimated hits that counts", _CORE, (), 0, 100),
    Param("fast_latency_ns", 80, "ns", "what it takes for the fast tier's latency", "include/linux/htmm.h", (),
          1, 10_000),
    Param("slow_latency_ns", 270, "ns", "and the slow tier's: 270 NVM, 170 CXL", "include/linux/htmm.h", (), 1, 10_000),
)  # fmt: skip


class Histogram(Classifier):
    """Pages by the logarithm of their access counts; the hottest bins that fit fast memory are hot."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.heat = new_heat(view.pages, int(params["least_hot"]), bool(params["skip_cooling"]))
        # Compiled before the VM runs: whether there is a page to split, no short run can tell.
        nothing = np.zeros(0, np.int64)
        survey(np.zeros_like(view.meter.book), self.heat, nothing, nothing.astype(np.uint8), np.zeros(2, np.int64))
        self._samples = 0
        self._resident = 0
        """Pages in use at the last cooling."""
        self._walks = {FAST: False, SLOW: False}
        """Whether all units of a node are to be looked at."""
        self._cooling = {FAST: False, SLOW: False}
        """The same, and because of a cooling: until both are done the next one only moves the clock."""
        self._cooled = False
        self._splits = np.zeros(0, np.int64)
        self._may_split = bool(params["split"])
        self._split_hits = -1
        """Share of fast hits, in 1/10000, when pages were last split; -1 = they were not since the last look."""
        self._fell = False
        """Huge pages were split: the hot threshold may fall."""
        self._records = 0
        """Samples since pages were last chosen to be split."""

    def _observe(self, evidence: Evidence) -> None:
        view, heat = self.view, self.heat
        pages = evidence.pages
        pages = pages[pages >= 0]
        frames = view.frames(pages)
        pages, frames = pages[frames >= 0], frames[frames >= 0]
        view.meter.charge(view.costs.classify_record_ps * pages.size)
        ranked = False
        done = 0
        cooling, adaptation = int(self.params["cooling_samples"]), int(self.params["adaptation_samples"])
        while done < pages.size:
            step = min(pages.size - done, cooling - self._samples % cooling, adaptation - self._samples % adaptation)
            part = slice(done, done + step)
            self._placed(record(view.meter.book, heat, view.nodes, pages[part], frames[part]))
            done += step
            self._samples += step
            self._records += step
            if self._samples % cooling == 0:
                self._cool()
            elif self._samples % adaptation == 0:
                self._adapt()
                ranked = True
        resident = int((view.nodes.managed - view.nodes.free_count).sum())
        if resident - self._resident >= int(self.params["cooling_growth_pages"]):
            self._cool()
        if ranked:
            self.migrator.on_ranking()

    def _placed(self, moved: tuple[int, int]) -> None:
        counters = self.view.counters
        counters[C.vmstat__pgactivate] += moved[0]
        counters[C.vmstat__pgdeactivate] += moved[1]
        self.view.meter.charge(self.view.costs.lru_page_ps * sum(moved))

    def _cool(self) -> None:
        """Halve all counts; each page when it is next looked at (htmm_core.c, __cooling)."""
        view, state = self.view, self.heat.state
        self._resident = int((view.nodes.managed - view.nodes.free_count).sum())
        state[CLOCK] += 1
        if any(self._cooling.values()):
            return
        self.heat.bins[:] = 0
        state[EPOCH] += 1
        state[BASE_HOT] = max(0, state[BASE_HOT] - 1)
        self._cooled = True
        self._walks = {FAST: True, SLOW: True}
        self._cooling = {FAST: True, SLOW: True}
        if self._may_split:
            self._choose_splits()

    def _adapt(self) -> None:
        """The lowest threshold above which all pages fit fast memory (htmm_core.c, __adjust_active_threshold)."""
        view, state, params = self.view, self.heat.state, self.params
        fast = int(view.nodes.managed[FAST])
        capacity = fast - fast * int(params["hot_reserve_percent"]) // 100
        view.meter.charge(view.costs.classify_range_ps * 2 * BINS)
        (hot, filled), (base, _) = (_lowest_that_fits(pages, capacity) for pages in self.heat.bins)
        hot, base = max(hot, int(params["least_hot"])), max(base, int(params["least_hot"]))
        before = int(state[HOT])
        if self._cooled:
            # Not all pages are in the histogram again.
            state[HOT] = max(1, before - 1) if hot < before else before
            state[BASE_HOT] = min(state[BASE_HOT], base)
            self._cooled = False
        else:
            state[HOT] = hot if self._fell else max(before, hot)
            state[BASE_HOT] = base
            self._fell = False
        if state[HOT] != before:
            self._walks = {FAST: True, SLOW: True}
        some = filled * 100 < capacity * int(params["warm_below_percent"])
        state[WARM] = max(0, state[HOT] - 1) if some else state[HOT]

    def _choose_splits(self) -> None:
        """How many huge pages are worth it, and the most skewed of them."""
        view, params, state = self.view, self.params, self.heat.state
        resident = int((view.nodes.managed - view.nodes.free_count).sum())
        if self._records <= max(resident // 4, int(view.nodes.managed[FAST])):
            return
        records, real, estimated = self._records, int(state[FAST_HITS]), int(state[BASE_HITS])
        self._records = state[FAST_HITS] = state[BASE_HITS] = 0
        share = 10_000 * real // records
        if self._split_hits >= 0 and share - self._split_hits < 100 * int(params["split_gain_percent"]):
            self._may_split = False
            return
        self._split_hits = -1
        estimated = estimated * int(params["split_estimate_percent"]) // 100
        heads = np.flatnonzero(self.heat.huge).astype(np.int64) * TABLE_PAGES
        heads = heads[view.sizes(heads) > 1]
        if estimated <= real or heads.size == 0:
            return
        buckets, counts = np.zeros(heads.size, np.uint8), np.zeros(2, np.int64)
        survey(view.meter.book, self.heat, heads, buckets, counts)
        view.meter.charge(view.costs.classify_range_ps * heads.size)
        used, average = int(counts[0]), max(1, int(counts[1]) // heads.size)
        fast, slow = int(params["fast_latency_ns"]), int(params["slow_latency_ns"])
        gain = (estimated - real) * used // records * TABLE_PAGES * (slow - fast) // fast
        budget = max(0, gain * int(params["split_gamma_percent"]) // 100 // average)
        order = np.argsort(SKEW_BUCKETS - buckets.astype(np.int64), kind="stable")
        self._splits = heads[order][buckets[order] > 0][:budget]
        if self._splits.size:
            self._split_hits = share
            self._fell = True

    def _walk_if_due(self, node: int) -> None:
        if self._walks[node]:
            self._walks[node] = self._cooling[node] = False
            visited, *moved = walk(self.view.meter.book, self.heat, self.view.nodes, node)
            self.view.meter.charge(self.view.costs.classify_range_ps * visited)
            self._placed((moved[0], moved[1]))

    def _take(self, node: int, active: int, limit: int) -> Words:
        view = self.view
        self._walk_if_due(node)
        out = np.empty(max(0, limit), np.int64)
        found, visited = take(view.meter.book, self.heat, view.nodes, node, active, out.size, out)
        view.meter.charge(view.costs.lru_page_ps * visited)
        return out[:found]

    def _promotions(self, limit: int) -> Words:
        return self._take(SLOW, ACTIVE, limit)

    def _demotions(self, need: int) -> Words:
        """What is not even warm; if that is not enough, nothing is warm until the next adaptation."""
        cold = self._take(FAST, INACTIVE, need)
        if int(self.view.sizes(cold).sum()) < need:
            self.heat.state[WARM] = self.heat.state[HOT]
        return cold

    def _splittable(self, limit: int) -> Words:
        chosen, self._splits = self._splits[:limit], self._splits[limit:]
        return chosen

    def hot_set(self) -> Words | None:
        base, huge = levels(self.heat)
        hot = base >= self.heat.state[HOT]
        hot |= np.repeat(huge >= self.heat.state[HOT], TABLE_PAGES)
        return np.flatnonzero(hot[: self.view.pages]).astype(np.int64)


def _lowest_that_fits(pages: Words, capacity: int) -> tuple[int, int]:
    """The lowest bin such that it and all above have at most ``capacity`` pages (15 at most), and their pages."""
    filled = np.cumsum(pages[::-1])
    fitting = int(np.searchsorted(filled, capacity, side="right"))
    return min(BINS - fitting, BINS - 1), int(filled[fitting - 1]) if fitting else 0


HISTOGRAM = Stage(
    name="histogram",
    kind="classifier",
    summary="pages by the logarithm of their access counts; the hottest bins that fit fast memory are hot",
    source=f"Memtis, SOSP'23, 4.1 to 4.3; {_CORE}",
    create=Histogram,
    params=HISTOGRAM_PARAMS,
    warm_up={"cooling_samples": 3000, "adaptation_samples": 400},
)
