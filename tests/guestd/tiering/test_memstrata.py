"""Memstrata: who lends to whom, what counters say, and pages that change hands between VMs without being lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import SpecError
from fleet.in_process import InProcessFleet
from fleet.spec import load
from guestd.meter import Meter
from guestd.mm.nodes import F_BUSY, FAST, SLOW
from guestd.tiering import memstrata
from guestd.tiering.memstrata import FIGURES, Standing, plan
from guestd.tiering.registry import policy_of
from guestd.tiering.stage import StageError
from hostd.flat_memory import FlatMemory
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C, new_counters
from tests.small_fleet import check_memory, new_fleet, small_guest

STANDINGS = st.builds(Standing, st.booleans(), st.integers(0, 9), st.integers(0, 90), st.integers(0, 90),
                      st.integers(100, 900))  # fmt: skip


@given(st.lists(STANDINGS, max_size=6), st.integers(0, 1000))
def test_a_plan_gives_only_what_there_is_and_no_more_than_the_step(vms: list[Standing], permille: int) -> None:
    transfers = plan(vms, permille)
    assert sum(pages for *_, pages in transfers) <= sum(vm.pages for vm in vms) * permille // 1000
    given_, taken = [0] * len(vms), [0] * len(vms)
    for donor, borrower, pages in transfers:
        assert pages > 0 and pages % 2 == 0
        assert vms[borrower].slowed
        assert (vms[donor].slowed, vms[donor].rate) <= (vms[borrower].slowed, vms[borrower].rate)
        given_[donor] += pages
        taken[borrower] += pages
    for i, vm in enumerate(vms):
        assert given_[i] <= vm.dedicated and taken[i] <= vm.contended
        assert given_[i] + taken[i] <= vm.pages * permille // 1000
        assert not (given_[i] and taken[i])


def test_the_worst_borrows_first_and_the_best_lends_first() -> None:
    calm, mild = Standing(False, 1, 30, 50, 1000), Standing(False, 2, 400, 50, 1000)
    bad, worst = Standing(True, 5, 0, 400, 1000), Standing(True, 9, 0, 30, 1000)
    assert plan([bad, worst, calm, mild], 50) == [(2, 1, 30), (3, 0, 50)]
    assert plan([calm, mild], 50) == []
    # A VM that is not slowed lends before one that is, whatever their rates.
    assert plan([Standing(True, 1, 80, 80, 1000), Standing(False, 9, 80, 80, 1000)], 50) == [(1, 0, 50)]


def test_a_window_is_the_difference_of_two_readings() -> None:
    before, now = new_counters(), new_counters()
    before[:] = np.arange(before.size)
    random = np.random.default_rng(1)
    now[:] = before + random.integers(0, 1000, now.size)
    then, change = before.copy(), now - before
    out: Words = np.zeros(FIGURES, np.int64)
    memstrata.window(Meter().book, now, before, 70, 300, out)
    accesses, swaps = change[C.access__total] - change[C.access__llc_hits], change[C.access__line_swaps]
    busy = change[C.time__think_ps : C.time__halted_ps].sum()
    assert out.tolist() == [accesses, swaps, 300 * swaps + 70 * (accesses - swaps), change[C.time__stall_ps],
                            change[C.access__walk_ps], busy]  # fmt: skip
    assert np.array_equal(before, now) and not np.array_equal(then, now)


def test_averages_weigh_a_new_window_by_a_fifth() -> None:
    average: Words = np.zeros(FIGURES, np.int64)
    memstrata.smooth(Meter().book, np.full(FIGURES, 1000), 200, True, average)
    assert average.tolist() == [1000] * FIGURES
    memstrata.smooth(Meter().book, np.arange(FIGURES) * 1000, 200, False, average)
    assert average.tolist() == [800, 1000, 1200, 1400, 1600, 1800]


def test_slowdown_is_what_near_memory_misses_add_to_the_time_without_them() -> None:
    # 100 accesses at 70, half of which take 300 instead, not overlapping, and as much compute as a run without misses.
    average = np.array([100, 50, 50 * 300 + 50 * 70, 18_500, 0, 18_500 + 7_000])
    assert memstrata.predicted_slowdown(average, 70, 300) == 1000 * 11_500 // 14_000
    assert memstrata.predicted_slowdown(np.zeros(FIGURES, np.int64), 70, 300) == 0
    assert memstrata.miss_rate(average, 1000, 0) == 50 * memstrata.RATE_UNIT // 1000
    assert memstrata.miss_rate(average, 1000, 128) == 50 * memstrata.RATE_UNIT // (1000 + 32768)


# -- whole fleets -----------------------------------------------------------------------------------------------


def _views(fleet: InProcessFleet) -> list[FlatMemory]:
    views = [vm.view for vm in fleet.host.vms.values()]
    return [view for view in views if isinstance(view, FlatMemory)]


def _check_shares(fleet: InProcessFleet, frames: list[int]) -> None:
    """Both tiers are conserved over all VMs, and no slow frame is without its partner."""
    views = _views(fleet)
    assert [sum(int(view.nodes.managed[node]) for view in views) for node in (FAST, SLOW)] == frames
    for view in views:
        half = view.share.size // 2
        assert int(view.nodes.managed.sum()) == half
        assert (view.share[half:] <= view.share[:half]).all()


def test_pages_change_hands_and_nothing_is_lost(costs: Costs) -> None:
    guests = [small_guest(costs, "memstrata", vm=vm, seed=3 + vm, run_ms=80, pages=4096, workload={"footprint": size})
              for vm, size in enumerate((0.5, 0.9))]  # fmt: skip
    fleet = new_fleet(*guests)
    frames = [sum(guest.fast_pages for guest in guests), sum(guest.slow_pages for guest in guests)]
    shares = set()
    while fleet.step():
        check_memory(fleet)
        _check_shares(fleet, frames)
        shares.add(int(_views(fleet)[0].nodes.managed[FAST]))
    assert len(shares) > 2
    for report in fleet.host.reports.values():
        assert report["integrity"]["mismatches"] == 0
        moved = report["migration"]
        assert moved["promoted_pages"] + moved["demoted_pages"] > 0
        # Two pages are copied for each that changes tiers.
        assert moved["bytes"] == 2 * 4096 * (moved["promoted_pages"] + moved["demoted_pages"])
    gained = [report["migration"]["promoted_pages"] for report in fleet.host.reports.values()]
    lost = [report["migration"]["demoted_pages"] for report in fleet.host.reports.values()]
    assert gained == lost[::-1]


def test_what_was_exchanged_is_dedicated_there_and_contended_here(costs: Costs) -> None:
    quiet: dict[str, Scalar] = {"window_ms": 1000}
    fleet = new_fleet(*(small_guest(costs, "memstrata", params=quiet, vm=vm, pages=4096) for vm in range(2)))
    while any(guest.phase == "populate" for guest in fleet.guests.values()):
        assert fleet.step()
    donor, borrower = _views(fleet)
    for vm in fleet.host.vms.values():
        vm.meter.now = vm.until_ps
    before = [(view.dedicated().size, view.contended().size) for view in (donor, borrower)]
    given_, taken = donor.dedicated()[:8], borrower.contended()[[3, 9, 27, 81]]
    donor.give_dedicated(given_)
    borrower.take_dedicated(taken)
    assert (donor.nodes.flags[given_] & F_BUSY).all()
    assert not np.isin(given_, donor.dedicated()).any(), "they are on their way"
    for _ in range(6):
        assert fleet.step()
    for view in (donor, borrower):
        view.settle(fleet.host.vms[0].until_ps)
    # Two dedicated pages make one contended pair, and the other way round.
    assert donor.dedicated().size == before[0][0] - 8
    assert donor.contended().size >= before[0][1] + 4
    assert borrower.dedicated().size == before[1][0] + 8
    assert not np.isin(taken, borrower.contended()).any()
    check_memory(fleet)


def test_no_window_exchanges_with_a_step_of_nothing(costs: Costs) -> None:
    params: dict[str, Scalar] = {"window_ms": 4, "slowdown_percent": 0, "step_ratio": 0.0}
    fleet = new_fleet(*(small_guest(costs, "memstrata", params=params, vm=vm, pages=4096) for vm in range(2)))
    for report in fleet.run().reports.values():
        assert report["migration"]["bytes"] == 0
        assert report["access"]["line_swaps"] == report["access"]["slow"] > 0


def test_a_ratio_below_one_half_is_refused() -> None:
    with pytest.raises(SpecError, match="1/2 at least for policy 'memstrata', not 0"):
        load(None, {"policy": "memstrata", "memory": "64MiB", "fast_ratio": "0.4"})


def test_its_stages_work_with_each_other_only() -> None:
    with pytest.raises(StageError, match="needs a standing among VMs"):
        policy_of("h-tpp", {"migrator": "page-exchange"})
    with pytest.raises(StageError, match="needs near-memory misses"):
        policy_of("h-tpp", {"classifier": "slowdown-estimator"})
