"""Memtis: the quota's feedback, the thresholds, what kmigrated moves and splits; and that it finds a hot set."""

import numpy as np
import pytest

from fleet.in_process import InProcessFleet
from guestd.mm.nodes import ACTIVE, FAST, INACTIVE, SLOW
from guestd.params import resolve
from guestd.pebs import P_PERIOD
from guestd.tiering.access_counts import BASE_HITS, BASE_HOT, CLOCK, EPOCH, FAST_HITS, HOT, UNITS, WARM
from guestd.tiering.histogram import Histogram
from guestd.tiering.memtis import LOAD_PERIODS, POLICY, STORE_PERIODS, Kmigrated, Ksampled
from guestd.tiering.policy import FAST_MISS, SLOW_MISS, STORES
from guestd.tiering.stage import Staged
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.units import PS_PER_MS
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated, with_thp

PAGES = 8192
SLEEPS: dict[str, Scalar] = {"load_period": 10_000_000, "store_period": 0, "visit_ms": 10_000, "kmigrated_ms": 600_000}


class HandFed:
    """A populated guest whose samples come from the test, and whose threads sleep until the test wakes them."""

    def __init__(self, costs: Costs, thp: str = "never", **params: Scalar) -> None:
        config = small_guest(costs, "memtis", params=SLEEPS | params, pages=PAGES, fast=4096, run_ms=10, vcpus=1)
        self.fleet: InProcessFleet = new_fleet(with_thp(config, thp, thp_defrag="always", khugepaged_pages_to_scan=0))
        self.guest = until_populated(self.fleet)
        self.view = self.guest.view
        tiering = self.guest.tiering
        assert isinstance(tiering, Staged)
        self.tiering = tiering
        assert isinstance(tiering.tracker, Ksampled)
        assert isinstance(tiering.classifier, Histogram)
        assert isinstance(tiering.migrator, Kmigrated)
        self.tracker, self.classifier, self.migrator = tiering.tracker, tiering.classifier, tiering.migrator
        self.heat = self.classifier.heat
        self.space = self.guest.workload.space

    def sample(self, pages: Words, times: int = 1, *, visit: bool = True) -> None:
        rows = np.zeros((pages.size * times, 5), np.int64)
        rows[:, 0] = np.tile(self.space.gva(pages), times) + 64
        for start in range(0, rows.shape[0], 1000):
            self.tiering.on_samples(rows[start : start + 1000])
            if visit:
                self.tiering.on_timer("tracker.visit")

    def wake(self) -> None:
        """kmigrated, until it has done what it planned."""
        self.tiering.on_timer("migrator.wake")
        before = -1
        while before != self.view.counters[C.bytes__migrated]:
            before = int(self.view.counters[C.bytes__migrated])
            self.tiering.on_timer("migrator.work")

    def thresholds(self, hot: int, warm: int) -> None:
        """All pages are known already, in a bin below these, and on the list where they belong."""
        for self.heat.state[HOT], self.heat.state[WARM] in ((1, 1), (hot, warm)):
            self.classifier._walks = {FAST: True, SLOW: True}
            self.classifier.promotions(0)
            self.classifier.demotions(0)

    def pages(self, node: int, count: int = PAGES) -> Words:
        return self.view.on_node(0, self.view.pages, node, count)


def test_the_defaults_are_the_published_ones() -> None:
    found = resolve(POLICY.params, {})
    assert (found["load_period"], found["store_period"], found["visit_ms"]) == (199, 100_007, 2)
    assert (found["quota_permille"], found["quota_margin_permille"], found["quota_interval_ms"]) == (30, 5, 15_000)
    assert (found["cooling_samples"], found["adaptation_samples"]) == (2_000_000, 100_000)
    assert (found["demotion_mark_percent"], found["promotion_mark_percent"], found["kmigrated_ms"]) == (2, 3, 500)
    assert (len(LOAD_PERIODS), len(STORE_PERIODS)) == (30, 5)


def test_it_finds_the_hot_set_and_beats_first_touch(costs: Costs) -> None:
    none = run_fleet(small_guest(costs, "none"))[0]
    fleet = new_fleet(small_guest(costs, "memtis"))
    fleet.run()
    ours = fleet.host.reports[0]
    assert ours["access"]["fast_ratio"] > 5 * none["access"]["fast_ratio"]
    assert ours["migration"]["promoted_pages"] > 0
    assert ours["migration"]["demoted_pages"] > 0
    assert ours["pebs"]["pmi"] < ours["pebs"]["drains"] // 4, "large PEBS: most drains are context switches"
    records = int(fleet.guests[0].machine.counters[C.pebs__drained_records])
    for kind in ("measured", "modelled"):
        spent_ns = sum(phase["agent_cpu"][f"{kind}_s"]["track"] * 1e9 for phase in (ours, ours["populate"]))
        assert ours["pebs"]["cpu_ns_per_sample"][kind] == pytest.approx(spent_ns / records)


def test_hot_pages_that_it_names_are_hot(costs: Costs) -> None:
    fed = HandFed(costs)
    fed.thresholds(5, 5)
    hot = fed.pages(SLOW, 100)
    fed.sample(hot, 3)
    named = fed.classifier.hot_set()
    assert named is not None
    assert np.array_equal(named, hot)
    assert fed.view.nodes.size[2 * SLOW + ACTIVE] == 100


# -- ksampled ---------------------------------------------------------------------------------------------------------


def test_it_samples_less_above_its_quota_and_more_below_by_one_step(costs: Costs) -> None:
    fed = HandFed(costs, quota_interval_ms=100, store_period=100_007)
    ds, view = fed.guest.machine.ds, fed.view

    def periods() -> list[int]:
        return [int(ds.params[P_PERIOD + event]) for event in (FAST_MISS, SLOW_MISS, STORES)]

    assert periods() == [10_000_000, 10_000_000, 100_007]

    def interval(busy_permille: int) -> int:
        fed.tracker._busy, fed.tracker._since = 100 * PS_PER_MS * busy_permille // 1000, view.now - 100 * PS_PER_MS
        fed.tiering.on_timer("tracker.visit")
        return fed.tracker.step

    assert interval(34) == 0, "within the margin"
    assert [interval(40) for _ in range(2)] == [1, 2]
    assert periods() == [401, 401, 600_011]
    assert ds.counter[0, FAST_MISS] == -401, "the counters begin anew"
    assert [interval(0) for _ in range(4)] == [1, 0, 0, 0]
    assert periods() == [199, 199, 100_003]
    assert [interval(999) for _ in range(40)][-1] == 29
    assert periods() == [19_997, 19_997, 1_500_003]


def test_the_feedback_comes_from_its_own_modelled_time(costs: Costs) -> None:
    params: dict[str, Scalar] = {"load_period": 199, "store_period": 0, "visit_ms": 2, "quota_interval_ms": 10}
    steps = []
    for quota in (1, 1000):
        fleet = new_fleet(small_guest(costs, "memtis", params=params | {"quota_permille": quota}, run_ms=100))
        fleet.run()
        tiering = fleet.guests[0].tiering
        assert isinstance(tiering, Staged) and isinstance(tiering.tracker, Ksampled)
        steps.append(tiering.tracker.step)
    assert steps[0] > 3
    assert steps[1] == 0


def test_records_wait_in_the_ring_for_a_visit_and_a_full_one_loses_them(costs: Costs) -> None:
    fed = HandFed(costs, ring_pages=1)
    fed.heat.total[:] = fed.heat.counted[:] = 0
    pages = fed.pages(SLOW, 300)
    fed.sample(pages, 2, visit=False)
    before = fed.view.now
    assert not fed.heat.total.any()
    fed.tiering.on_timer("tracker.visit")
    assert fed.heat.total.sum() == 384 * 512 + 300 * 4, "3 events, 128 records of 32 bytes each; each page had a seed"
    each = costs.drain_record_ps + costs.classify_record_ps
    assert fed.view.now - before >= 2 * costs.context_switch_ps + 384 * each


# -- thresholds -------------------------------------------------------------------------------------------------------


def test_the_threshold_rises_until_the_hot_bins_fit(costs: Costs) -> None:
    fed = HandFed(costs, adaptation_samples=1000, warm_below_percent=50)
    fed.heat.bins[UNITS, 5], fed.heat.bins[UNITS, 7] = 4096, 2000
    fed.classifier._adapt()
    assert fed.heat.state[HOT] == 6, "bin 5 would be too much"
    assert fed.heat.state[WARM] == 6, "2000 pages are more than half of fast memory without the reserve"
    fed.heat.bins[UNITS, 7] = 100
    fed.classifier._adapt()
    assert fed.heat.state[HOT] == 6
    assert fed.heat.state[WARM] == 5, "now they are less, so that the bin below is warm"
    fed.heat.bins[UNITS] = 0
    fed.classifier._adapt()
    assert fed.heat.state[HOT] == 6, "but for a cooling it only rises"
    fed.classifier._cool()
    fed.classifier._adapt()
    assert fed.heat.state[HOT] == 5, "after one it may fall by one"


def test_cooling_comes_with_samples_and_with_growth(costs: Costs) -> None:
    fed = HandFed(costs, cooling_samples=500)
    fed.heat.state[BASE_HOT] = 3
    fed.sample(fed.pages(SLOW, 100), 10)
    assert fed.heat.state[CLOCK] == 2
    assert fed.heat.state[EPOCH] == 2, "the walk of the first is not over, so that the second only moves the clock"
    assert fed.heat.state[BASE_HOT] == 2
    fed.classifier.promotions(0)
    fed.classifier.demotions(0)
    fed.sample(fed.pages(SLOW, 100), 5)
    assert fed.heat.state[EPOCH] == 3
    grown = HandFed(costs, cooling_growth_pages=1000)
    grown.sample(grown.pages(SLOW, 1))
    assert grown.heat.state[CLOCK] == 1
    grown.sample(grown.pages(SLOW, 1))
    assert grown.heat.state[CLOCK] == 1, "nothing grew since"


# -- kmigrated --------------------------------------------------------------------------------------------------------


def test_marks_are_percentages_within_bounds_and_a_cap(costs: Costs) -> None:
    assert HandFed(costs).migrator.promotion_mark == 4096 // 10, "100 MB is more than this guest's fast memory"
    found = HandFed(costs, promotion_mark_min_mb=1, promotion_mark_percent=20, promotion_mark_max_mb=2)
    assert found.migrator.promotion_mark == 4096 // 10
    assert HandFed(costs, promotion_mark_min_mb=1, promotion_mark_max_mb=1).migrator.promotion_mark == 256


def small_marks(costs: Costs, thp: str = "never", **params: Scalar) -> HandFed:
    """Marks of 1 % and 2 %; half of fast memory was given up."""
    marks: dict[str, Scalar] = {"demotion_mark_min_mb": 0, "promotion_mark_min_mb": 0, "direct_demotion_mb": 0}
    return HandFed(costs, thp, **(marks | {"demotion_mark_percent": 1, "promotion_mark_percent": 2} | params))


def test_it_promotes_what_is_hot_and_demotes_what_is_neither_hot_nor_warm(costs: Costs) -> None:
    fed = small_marks(costs)
    fed.thresholds(12, 11)
    fast, slow = fed.pages(FAST), fed.pages(SLOW)
    hot, warm = slow[:200], fast[-300:]
    fed.sample(hot, 8)
    fed.sample(warm, 5)
    fed.sample(fast[:-300], 1)
    free, before, mark = fed.view.free(FAST), fed.view.counters.copy(), fed.migrator.promotion_mark
    fed.wake()
    check_memory(fed.fleet)
    assert (fed.view.nodes_of(hot) == FAST).all()
    assert (fed.view.nodes_of(warm) == FAST).all()
    assert fed.view.free(FAST) == mark, "room for what is pending, and the promotion mark"
    moved = fed.view.counters - before
    assert moved[C.vmstat__pgpromote_success] == 200
    assert moved[C.vmstat__pgdemote_kswapd] == 200 + mark - free
    migrated = int(fed.view.counters[C.bytes__migrated])
    fed.wake()
    assert fed.view.counters[C.bytes__migrated] == migrated, "at its marks it has nothing to do"


def test_warmth_gives_way_when_pending_pages_find_no_room(costs: Costs) -> None:
    fed = small_marks(costs)
    fed.thresholds(12, 9)
    fed.sample(fed.pages(FAST), 1)  # bin 9: warm, all of it
    hot = fed.pages(SLOW, 400)
    fed.sample(hot, 8)
    fed.wake()
    assert fed.heat.state[WARM] == 12
    fed.wake()
    assert (fed.view.nodes_of(hot) == FAST).all()
    check_memory(fed.fleet)


def test_allocations_that_run_low_demote_at_once_and_hot_pages_if_they_must(costs: Costs) -> None:
    fed = small_marks(costs, direct_demotion_mb=1)
    fed.thresholds(9, 9)
    fed.sample(fed.pages(FAST), 1)
    fed.view.move(fed.pages(SLOW, 600), FAST, 20)
    assert fed.view.nodes.size[2 * FAST + ACTIVE] > 3000
    fed.tiering.on_pressure(PS_PER_MS)
    while fed.migrator._victims.size:
        fed.tiering.on_timer("migrator.work")
    assert fed.view.free(FAST) >= fed.migrator.promotion_mark + 256
    check_memory(fed.fleet)


# -- huge pages -------------------------------------------------------------------------------------------------------


def test_skewed_huge_pages_are_split_and_only_if_that_pays(costs: Costs) -> None:
    fed = small_marks(costs, "always", cooling_samples=14_000)
    nodes = fed.view.nodes
    heads = fed.pages(SLOW)
    heads = heads[fed.view.sizes(heads) > 1]
    assert heads.size > 2
    one, all_alike = heads[0] + np.array([3]), heads[1] + np.arange(512)
    fed.thresholds(9, 9)
    fed.heat.state[BASE_HOT] = 9
    before = int(nodes.size.sum())
    fed.sample(one, 4000)
    fed.sample(all_alike, 18)
    assert fed.classifier._splits.size == 0, "not enough samples for a cooling yet"
    fed.sample(all_alike, 2)
    assert fed.classifier._splits.tolist() == [heads[0]]
    fed.wake()
    assert fed.view.counters[C.vmstat__thp_split_page] >= 1
    assert fed.view.sizes(one).tolist() == [1]
    assert fed.view.nodes_of(one).tolist() == [FAST], "its hot page was promoted without the cold ones"
    # The leaf table that a split needs is no page of the lists.
    assert int(nodes.size.sum()) == before
    check_memory(fed.fleet)


def test_it_splits_no_more_when_hits_did_not_rise(costs: Costs) -> None:
    fed = small_marks(costs, "always")
    heads = fed.pages(SLOW)
    fed.sample(heads[fed.view.sizes(heads) > 1][:1], 100)
    classifier, state = fed.classifier, fed.heat.state
    classifier._split_hits = 5000
    state[FAST_HITS], state[BASE_HITS], classifier._records = 5200, 9000, 10_000
    classifier._choose_splits()
    assert not classifier._may_split
    classifier._may_split = True
    classifier._split_hits, classifier._records = 5000, 10_000
    state[FAST_HITS] = 5400
    classifier._choose_splits()
    assert classifier._may_split


def test_without_huge_pages_nothing_is_split(costs: Costs) -> None:
    fed = HandFed(costs, cooling_samples=9000)
    fed.sample(fed.pages(SLOW, 900), 30)
    assert fed.heat.state[CLOCK] == 3
    assert fed.classifier.splittable(50).size == 0
    assert fed.view.nodes.size[2 * SLOW + INACTIVE] >= 0
