"""Mainline's tiering mode (reference policies.md 1b): hint-fault latency, threshold, rate limit, WMARK_PROMO."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.meter import Meter
from guestd.mm.nodes import FAST, SLOW, WMARK_HIGH, WMARK_LOW, WMARK_PROMO
from guestd.params import resolve
from guestd.tiering.pages import note_time
from guestd.tiering.stage import Evidence, Staged
from guestd.tiering.tpp_mainline import ADJUST_STEPS, POLICY, FaultLatency, J, judge
from guestd.tiering.view import PageView
from proto.arrays import Mask, Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import FRAME_SHIFT, HUGE, PRESENT, PROTNONE, WRITABLE
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated

PAGES = 2048


def reference_judge(state: list[int], ages: list[int], sizes: list[int], now: int, default: int, period: int,
                    rate: int) -> tuple[list[bool], int]:  # fmt: skip
    """`judge` as kernel/sched/fair.c has it, page by page."""
    if now - state[J.TUNED_PS] > period:
        state[J.TUNED_PS] = now
        want, got = rate * (period // PS_PER_MS) // 1000, state[J.CANDIDATES] - state[J.TUNED_CANDIDATES]
        unit = default * 2 // ADJUST_STEPS
        if got > want * 11 // 10:
            state[J.THRESHOLD] = max(state[J.THRESHOLD] - unit, unit)
        elif got < want * 9 // 10:
            state[J.THRESHOLD] = min(state[J.THRESHOLD] + unit, 2 * default)
        state[J.TUNED_CANDIDATES] = state[J.CANDIDATES]
    verdicts, dropped = [], 0
    for age, size in zip(ages, sizes, strict=True):
        hot = age < state[J.THRESHOLD]
        if hot:
            state[J.CANDIDATES] += size
            if now - state[J.LIMITED_PS] > PS_PER_S:
                state[J.LIMITED_PS], state[J.LIMITED_CANDIDATES] = now, state[J.CANDIDATES]
            if state[J.CANDIDATES] - state[J.LIMITED_CANDIDATES] >= rate:
                hot, dropped = False, dropped + size
        verdicts.append(hot)
    return verdicts, dropped


batches = st.lists(
    st.tuples(
        st.integers(1, 900), st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([1, 1, 1, 512])), max_size=9)
    ),
    max_size=9,
)  # fmt: skip


@given(batches, st.integers(0, 40), st.integers(1, 3000))
def test_it_judges_as_linux_does(steps: list[tuple[int, list[tuple[int, int]]]], rate: int, period: int) -> None:
    state = np.zeros(len(J), np.int64)
    state[J.THRESHOLD] = 1000 * PS_PER_MS
    plain = state.tolist()
    now = 0
    for wait, faults in steps:
        now += wait * PS_PER_MS
        ages = [age * PS_PER_MS for age, _ in faults]
        sizes = [size for _, size in faults]
        out = np.zeros(len(faults), np.bool_)
        dropped = judge(Meter().book, state, np.array(ages, np.int64), np.array(sizes, np.int64), now,
                        1000 * PS_PER_MS, period * PS_PER_MS, rate, out)  # fmt: skip
        assert (out.tolist(), dropped) == reference_judge(
            plain, ages, sizes, now, 1000 * PS_PER_MS, period * PS_PER_MS, rate
        )
        assert state.tolist() == plain
        assert 125 * PS_PER_MS <= state[J.THRESHOLD] <= 2000 * PS_PER_MS


@given(st.lists(st.integers(0, 5), min_size=1024, max_size=1024), st.integers(0, 1023), st.integers(0, 1023))
def test_scan_times_are_noted_for_what_protection_will_change(kinds: list[int], a: int, b: int) -> None:
    half = 10_000
    first, end = min(a, b), max(a, b)
    flags = np.array([0, PRESENT | WRITABLE, PRESENT | WRITABLE, PROTNONE | WRITABLE, WRITABLE, PRESENT], np.int64)
    kind = np.array(kinds, np.int64)
    frames = np.where(kind == 1, 0, half) + np.arange(1024)
    table = np.where(kind == 0, 0, (frames << FRAME_SHIFT) | flags[kind])
    pde = np.array([PRESENT, PRESENT], np.int64)
    noted = np.zeros(1024, np.int64)
    note_time(Meter().book, table, pde, half, first, end - first, 77, noted)
    expected = np.zeros(1024, np.int64)
    expected[first:end][np.isin(kind[first:end], (2, 4, 5))] = 77
    assert noted.tolist() == expected.tolist()
    pde[1] |= HUGE
    table[512:] = ((half + np.arange(512)) << FRAME_SHIFT) | PRESENT | WRITABLE
    noted[:] = 0
    note_time(Meter().book, table, pde, half, 0, 1024, 5, noted)
    assert np.flatnonzero(noted[512:]).tolist() == [0], "the head stands for a huge page"


class Populated:
    """A guest of one vCPU under tpp-mainline that has touched its memory, and whose scanner has not begun."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        never: dict[str, Scalar] = {"scan_delay_ms": 600_000}
        self.fleet = new_fleet(
            small_guest(costs, "tpp-mainline", params=never | params, pages=PAGES, run_ms=10, vcpus=1)
        )
        guest = until_populated(self.fleet)
        self.view: PageView = guest.view
        assert isinstance(guest.tiering, Staged)
        self.tpp = guest.tiering
        self.tracker = guest.tiering.tracker
        assert isinstance(guest.tiering.classifier, FaultLatency)
        self.classifier = guest.tiering.classifier

    def scan(self) -> None:
        """A pass of the scanner over all memory."""
        self.tracker.on_timer("scan")

    def make_room(self, count: int) -> None:
        view = self.view
        need = view.watermark(FAST, WMARK_HIGH) + 1 + count - view.free(FAST)
        if need > 0:
            view.move(view.on_node(0, view.pages, FAST, need), SLOW, 0)

    def slow_pages(self, count: int) -> Words:
        return self.view.on_node(self.view.pages - 600, 600, SLOW, count)

    def fault_after(self, pages: Words, ms: int) -> Mask:
        """Scan, let ``ms`` pass, fault; which are fast then."""
        self.scan()
        self.view.meter.charge(ms * PS_PER_MS)
        self.tpp.on_hint_faults(pages)
        return self.view.nodes_of(pages) == FAST


def test_a_fault_soon_after_the_scan_promotes_and_a_late_one_does_not(costs: Costs) -> None:
    populated = Populated(costs)
    view = populated.view
    populated.make_room(20)
    pages = populated.slow_pages(10)
    before = view.counters.copy()
    assert not populated.fault_after(pages[:5], 1001).any()
    assert (view.counters - before)[C.vmstat__pgpromote_candidate] == 0
    # The other five keep the time of the first scan: they were under PROT_NONE already at the second.
    assert populated.fault_after(pages, 900).tolist() == [True] * 5 + [False] * 5
    delta = view.counters - before
    assert delta[C.vmstat__pgpromote_candidate] == delta[C.vmstat__pgpromote_success] == 5
    assert not view.is_active(view.frames(pages)).any(), "no page had to be active"
    check_memory(populated.fleet)


def test_a_page_that_was_protected_by_no_scan_is_cold(costs: Costs) -> None:
    populated = Populated(costs)
    populated.make_room(20)
    pages = populated.slow_pages(5)
    populated.view.meter.charge(2000 * PS_PER_MS)
    populated.view.protect(int(pages[0]), 5)
    populated.tpp.on_hint_faults(pages)
    assert (populated.view.nodes_of(pages) == SLOW).all()


def test_with_much_free_memory_every_page_is_taken_and_the_threshold_starts_anew(costs: Costs) -> None:
    populated = Populated(costs, enough_free_mb=0, tune_period_ms=1)
    pages = populated.slow_pages(10)
    populated.make_room(3)
    populated.fault_after(pages[:1], 10)
    assert populated.classifier.threshold_ps == 1125 * PS_PER_MS, "too few candidates: one unit up"
    view = populated.view
    sixteenth = int(view.nodes.managed[FAST]) // 16
    populated.make_room(view.watermark(FAST, WMARK_PROMO) - view.watermark(FAST, WMARK_HIGH) + sixteenth + 12)
    assert populated.fault_after(pages[1:], 5000).all()
    assert populated.classifier.threshold_ps == 1000 * PS_PER_MS


def test_hot_pages_above_the_rate_limit_are_passed_over_and_counted(costs: Costs) -> None:
    populated = Populated(costs, promote_rate_limit_mbps=1)
    view = populated.view
    pages, ages = populated.slow_pages(300), np.full(300, PS_PER_MS)
    before = view.counters.copy()
    for _ in range(2):
        view.meter.now += 2 * PS_PER_S
        wanted = populated.classifier.on_faults(Evidence(view, pages=pages, age_ps=ages))
        assert wanted.tolist() == [True] * 256 + [False] * 44, "1 MB in a second"
    assert not populated.classifier.on_faults(Evidence(view, pages=pages, age_ps=ages)).any()
    assert (view.counters - before)[C.vmstat__pgpromote_candidate] == 44 + 44 + 300


def test_a_promotion_that_finds_too_little_wakes_kswapd_which_balances_up_to_promo(costs: Costs) -> None:
    populated = Populated(costs)
    view, tpp = populated.view, populated.tpp
    populated.make_room(4)
    room = view.free(FAST) - view.watermark(FAST, WMARK_HIGH) - 1
    assert tpp.reclaim_mark == WMARK_LOW
    pages = populated.slow_pages(room + 5)
    before = view.counters.copy()
    assert populated.fault_after(pages, 1).sum() == room
    assert (view.counters - before)[C.vmstat__pgmigrate_fail_dst_node_full] == 5
    assert tpp.reclaim_mark == WMARK_PROMO
    view.test_and_clear_young(view.on_node(0, view.pages, FAST, PAGES))
    tpp.on_pressure(1000 * PS_PER_MS)
    assert view.free(FAST) >= view.watermark(FAST, WMARK_PROMO)
    assert tpp.reclaim_mark == WMARK_LOW, "asleep again"
    assert (view.counters - before)[C.vmstat__pgdemote_kswapd] > 0
    demoted = view.on_node(0, view.pages, SLOW, PAGES)
    assert view.was_demoted(view.frames(demoted)).any()
    check_memory(populated.fleet)


def test_the_parameters_are_the_kernels() -> None:
    found = resolve(POLICY.params, {})
    assert (found["hot_threshold_ms"], found["promote_rate_limit_mbps"]) == (1000, 65536)
    assert found["tune_period_ms"] == found["scan_period_max_ms"] == 60_000
    assert "active_filter" not in found


@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
def test_it_finds_the_hot_set(layout: str, costs: Costs) -> None:
    workload: dict[str, Scalar] = {"layout": layout}
    fast: dict[str, Scalar] = {"scan_delay_ms": 0, "scan_period_min_ms": 2, "scan_size_mb": 16, "hot_threshold_ms": 1}
    none = run_fleet(small_guest(costs, "none", run_ms=100, workload=workload))[0]
    found = run_fleet(small_guest(costs, "tpp-mainline", params=fast, run_ms=100, workload=workload))[0]
    assert found["vmstat"]["pgpromote_success"] > 0
    assert found["access"]["fast_ratio"] > none["access"]["fast_ratio"]
