"""TPP's rules (reference policies.md 1a, 1c, 9): the active filter, the watermarks, what each view's flushes cost."""

from typing import Any

import numpy as np
import pytest

from fleet.in_process import InProcessFleet, private_memory
from guestd.mm.nodes import FAST, SLOW, WMARK_DEMOTE, WMARK_HIGH
from guestd.params import resolve
from guestd.tiering.registry import policies
from guestd.tiering.stage import Evidence, Staged
from guestd.tiering.tpp import G_TPP, THROTTLE, ActiveLru
from guestd.tiering.view import PageView
from hostd.vm import Vm
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, PROTNONE
from proto.units import PS_PER_MS
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated

PAGES = 2048
NEVER: dict[str, Scalar] = {"scan_delay_ms": 600_000}
FAST_SCAN: dict[str, Scalar] = {"scan_delay_ms": 0, "scan_period_min_ms": 2, "scan_size_mb": 16}


class Populated:
    """A guest of one vCPU under g-tpp that has touched its memory in order, and whose scanner has not begun."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        self.fleet: InProcessFleet = new_fleet(
            small_guest(costs, "g-tpp", params=NEVER | params, pages=PAGES, run_ms=10, vcpus=1)
        )
        guest = until_populated(self.fleet)
        self.view: PageView = guest.view
        assert isinstance(guest.tiering, Staged)
        self.tpp = guest.tiering

    def make_room(self, count: int) -> None:
        """``count`` free frames above the high watermark of the fast node."""
        view = self.view
        need = view.watermark(FAST, WMARK_HIGH) + count - view.free(FAST)
        if need > 0:
            view.move(self.pages(FAST, need), SLOW, 0)
        assert view.free(FAST) >= view.watermark(FAST, WMARK_HIGH) + count

    def pages(self, node: int, count: int) -> Words:
        return self.view.on_node(0, self.view.pages, node, count)

    def fault(self, pages: Words) -> Words:
        """Put ``pages``, which lie side by side, under PROT_NONE and have each fault."""
        self.view.protect(int(pages[0]), int(pages[-1] - pages[0]) + 1)
        return self.tpp.on_hint_faults(pages)

    def slow_pages(self, count: int) -> Words:
        """Slow pages side by side: the end of the array."""
        return self.view.on_node(self.view.pages - 600, 600, SLOW, count)


@pytest.fixture
def populated(costs: Costs) -> Populated:
    return Populated(costs)


def test_the_first_fault_marks_the_second_activates_the_third_promotes(populated: Populated, costs: Costs) -> None:
    view = populated.view
    populated.make_room(50)
    pages = populated.slow_pages(5)
    before = view.counters.copy()
    for round_, active in ((1, False), (2, True)):
        assert populated.fault(pages).tolist() == [costs.hint_fault_ps] * 5
        assert (view.frames(pages) >= PAGES).all(), f"fault {round_} promotes nothing"
        assert (view.is_active(view.frames(pages)) == active).all()
    assert (view.counters - before)[C.vmstat__pgpromote_candidate] == 0
    cost = populated.fault(pages)
    assert (cost > costs.hint_fault_ps + costs.migrate_page_ps + costs.copy_slow_fast_ps).all()
    assert (view.frames(pages) < PAGES).all()
    delta = view.counters - before
    assert delta[C.vmstat__numa_hint_faults] == 15
    assert delta[C.vmstat__pgpromote_candidate] == delta[C.vmstat__pgpromote_success] == 5
    assert delta[C.vmstat__numa_pages_migrated] == 5
    assert delta[C.vmstat__pgactivate] == 5
    # A page under PROT_NONE is in no TLB: its promotion flushes nothing (Linux b99a342d4f11).
    assert delta[C.vmstat__nr_tlb_local_flush_one] == delta[C.vmstat__numa_pte_updates] == 15
    check_memory(populated.fleet)


def test_without_the_filter_the_first_fault_promotes(costs: Costs) -> None:
    populated = Populated(costs, active_filter=False)
    populated.make_room(50)
    pages = populated.slow_pages(5)
    populated.fault(pages)
    assert (populated.view.frames(pages) < PAGES).all()


def test_what_was_just_found_accessed_is_not_given_up_from_the_other_list(populated: Populated) -> None:
    fast = populated.pages(FAST, PAGES)
    populated.fleet.guests[0].machine.gpt[fast] |= ACCESSED
    assert isinstance(populated.tpp, Staged)
    classifier = populated.tpp.classifier
    assert classifier.demotions(fast.size).size == 0
    assert populated.view.is_active(populated.view.frames(fast)).any()
    cold = classifier.demotions(fast.size)
    assert sorted(cold) == fast.tolist(), "all of them, once not accessed since"


def test_below_the_high_watermark_promotion_is_refused_and_counted(costs: Costs) -> None:
    populated = Populated(costs, active_filter=False)
    view = populated.view
    populated.make_room(3)
    populated.view.move(populated.slow_pages(600)[-1:], FAST, 0)
    room = view.free(FAST) - view.watermark(FAST, WMARK_HIGH)
    assert room >= 2
    pages = populated.slow_pages(room + 6)
    before = view.counters.copy()
    populated.fault(pages)
    assert (view.frames(pages) < PAGES).sum() == room
    assert view.free(FAST) == view.watermark(FAST, WMARK_HIGH)
    delta = view.counters - before
    assert delta[C.vmstat__pgpromote_success] == room
    assert delta[C.vmstat__pgmigrate_fail_dst_node_full] == 6
    assert delta[C.vmstat__pgpromote_candidate] == room + 6
    assert delta[C.vmstat__pgmigrate_fail] == 0, "migrate_pages was never reached"


def test_pages_that_nobody_asks_for_are_kept_once_in_the_order_of_their_first_fault(costs: Costs) -> None:
    populated = Populated(costs, active_filter=False)
    classifier = populated.tpp.classifier
    assert isinstance(classifier, ActiveLru)
    pages = populated.slow_pages(400)
    later, sooner = pages[:200], pages[200:]
    classifier.promotions(PAGES)  # what populating left
    for _ in range(400):
        classifier.observe(Evidence(populated.view, pages=sooner))
        classifier.observe(Evidence(populated.view, pages=later))
    assert classifier.kept < 80_000 < 400 * pages.size
    found = classifier.promotions(PAGES)
    assert found.tolist() == [*sooner.tolist(), *later.tolist()]
    assert classifier.promotions(PAGES).size == 0


def test_a_page_that_comes_back_after_a_demotion_is_counted(costs: Costs) -> None:
    populated = Populated(costs, active_filter=False)
    populated.make_room(20)
    view = populated.view
    back = populated.pages(SLOW, 1)
    assert view.was_demoted(view.frames(back)).all()
    before = view.counters[C.vmstat__pgpromote_candidate_demoted]
    populated.fault(back)
    assert view.counters[C.vmstat__pgpromote_candidate_demoted] == before + 1
    assert not view.was_demoted(view.frames(back)).any()


def test_kswapd_demotes_cold_pages_up_to_the_demotion_watermark(populated: Populated) -> None:
    view = populated.view
    mark = view.watermark(FAST, WMARK_DEMOTE)
    assert view.watermark(FAST, WMARK_HIGH) < mark
    oldest = populated.pages(FAST, PAGES)
    view.move(populated.slow_pages(30), FAST, 0)
    short = mark - view.free(FAST)
    assert short >= 20
    oldest = oldest[:short]
    view.test_and_clear_young(populated.pages(FAST, PAGES))
    # Nobody has looked at any page since it was touched: the oldest go, but for one that is young and stays once.
    fresh = int(oldest[3])
    populated.fleet.guests[0].machine.gpt[fresh] |= ACCESSED
    before = view.counters.copy()
    populated.tpp.on_pressure(1000 * PS_PER_MS)
    assert view.free(FAST) >= mark
    delta = view.counters - before
    assert delta[C.vmstat__pgdemote_kswapd] == delta[C.vmstat__pgsteal_kswapd] >= short
    assert delta[C.vmstat__pgscan_kswapd] == delta[C.vmstat__pgdemote_kswapd] + 1
    assert (view.frames(np.setdiff1d(oldest, [fresh])) >= PAGES).all()
    assert view.frames(np.array([fresh]))[0] < PAGES
    assert delta[C.vmstat__nr_tlb_local_flush_one] == delta[C.vmstat__pgdemote_kswapd], "5.15 flushes page by page"
    check_memory(populated.fleet)


def test_above_the_watermark_kswapd_sleeps(populated: Populated) -> None:
    populated.tpp.on_pressure(1000 * PS_PER_MS)
    before, now = populated.view.counters.copy(), populated.view.now
    populated.tpp.on_pressure(1000 * PS_PER_MS)
    assert np.array_equal(populated.view.counters, before)
    assert populated.view.now == now


@pytest.mark.parametrize("doubling", [False, True])
def test_failed_migrations_lengthen_the_period_where_the_kernel_s_rule_is_on(doubling: bool, costs: Costs) -> None:
    params = FAST_SCAN | {"double_on_failure": doubling, "active_filter": False, "private_share": 0.0}
    steady = params | {"adapt_scan_period": False}
    adapted, fixed = (
        run_fleet(small_guest(costs, "g-tpp", params=chosen, run_ms=120))[0]["vmstat"] for chosen in (params, steady)
    )
    assert fixed["pgmigrate_fail_dst_node_full"] > 0
    assert (adapted["numa_pte_updates"] < fixed["numa_pte_updates"]) == doubling


def test_scanning_takes_no_more_than_its_share_of_time(costs: Costs) -> None:
    params = FAST_SCAN | {"scan_period_min_ms": 1, "adapt_scan_period": False}
    guest = small_guest(costs, "g-tpp", params=params, run_ms=100)
    fleet = new_fleet(guest)
    fleet.run()
    track_task = int(fleet.guests[0].meter.modelled_ps[0, 0])
    counters = fleet.guests[0].machine.counters
    faults, candidates = int(counters[C.vmstat__numa_hint_faults]), int(counters[C.vmstat__pgpromote_candidate])
    scanning = track_task - faults * costs.hint_fault_ps - (faults - candidates) * costs.lru_page_ps
    assert 0 < scanning <= fleet.guests[0].now / THROTTLE * 1.05


def test_the_parameters_are_the_kernels(costs: Costs) -> None:
    found = resolve(G_TPP.params, {})
    assert found["scan_size_mb"] == 256
    assert (found["scan_period_min_ms"], found["scan_period_max_ms"], found["scan_delay_ms"]) == (1000, 60_000, 1000)
    assert found["active_filter"] is True


def report(costs: Costs, policy: str, **params: Scalar) -> dict[str, Any]:
    return run_fleet(small_guest(costs, policy, params=FAST_SCAN | params, run_ms=100))[0]


def test_the_guest_flushes_its_own_tlb_and_the_host_all_of_the_vm(costs: Costs) -> None:
    guest, host = report(costs, "g-tpp"), report(costs, "h-tpp")
    assert guest["flushes"]["remote_requests"] == guest["kvm"]["tlb_flush"] == guest["kvm"]["mmu_zapped"] == 0
    assert guest["vmstat"]["nr_tlb_local_flush_all"] > 0
    assert guest["instructions"]["invept_global"] == 0
    assert host["flushes"]["remote_requests"] > 0
    assert host["kvm"]["mmu_zapped"] > 0
    assert host["vmstat"]["nr_tlb_local_flush_one"] == host["vmstat"]["nr_tlb_local_flush_all"] == 0
    assert host["instructions"]["invlpg"] == 0
    # Every zapped page that is touched again costs a violation, beyond the one of its first touch.
    assert host["kvm"]["exits"]["ept_violation"] > 0
    assert guest["kvm"]["exits"]["ept_violation"] < host["kvm"]["exits"]["ept_violation"]


@pytest.mark.parametrize("policy", ["g-tpp", "h-tpp"])
def test_both_find_the_hot_set(policy: str, costs: Costs) -> None:
    none = run_fleet(small_guest(costs, "none", run_ms=100))[0]
    found = report(costs, policy, active_filter=False)
    assert found["vmstat"]["pgpromote_success"] > 0
    assert found["access"]["fast_ratio"] > none["access"]["fast_ratio"]
    assert found["vmstat"]["numa_hint_faults"] >= found["vmstat"]["pgpromote_candidate"]
    tried = found["vmstat"]["pgpromote_success"] + found["vmstat"]["pgmigrate_fail_dst_node_full"]
    assert found["vmstat"]["pgpromote_candidate"] == tried


def test_in_the_host_a_hint_fault_is_an_ept_violation_on_a_protected_leaf(costs: Costs) -> None:
    config = small_guest(costs, "h-tpp", params=NEVER, pages=PAGES, fast=400)
    vm = Vm(config, policies()["h-tpp"], private_memory(config))
    vm.ept_fault(0, np.arange(PAGES - 300))
    slow = vm.view.on_node(0, PAGES, SLOW, 3)
    vm.memory.ept[slow] = (vm.memory.ept[slow] & ~1) | PROTNONE  # as the zap of a scanned range leaves it
    price = costs.ept_violation_ps + costs.host_hint_fault_ps
    assert vm.ept_fault(0, slow).tolist() == [price] * 3
    assert vm.counters[C.vmstat__numa_hint_faults] == 3
    assert (vm.memory.ept[slow] & (PROTNONE | 1) == 1).all(), "mapped again"
    assert vm.ept_fault(0, slow[:1]).tolist() == [costs.ept_violation_ps]
    assert vm.counters[C.vmstat__numa_hint_faults] == 3
