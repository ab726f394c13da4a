"""vTMM's rules (EuroSys'23): windows and levels, bucket sort, the scan that PML narrows, copies ahead of a pause."""

from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet, private_memory
from guestd.mm.nodes import F_BUSY, FAST, SLOW
from guestd.params import resolve
from guestd.tiering import vtmm
from guestd.tiering.policy import with_needs
from guestd.tiering.stage import Evidence, Staged
from guestd.tiering.vtmm import BUCKETS, POLICY
from guestd.vcpu import PAUSED
from hostd.vm import Vm
from proto.arrays import Words
from proto.config import HostKernel, Scalar
from proto.costs import Costs
from proto.counters import C
from proto.layout import NARROW, OP_COPY, OP_HARVEST, OP_PAUSE, OP_SWITCH, OP_WALK_GPT, OPERATION, W_YOUNG
from proto.units import PS_PER_MS
from tests.small_fleet import check_memory, small_guest, small_host

PAGES = 2048
BOOK = np.zeros(6, np.int64)


class PlainPage:
    """One page's levels in plain Python, numbered from 1 as in the paper."""

    def __init__(self) -> None:
        self.level, self.rest, self.windows = 1, 0, 0

    def window(self, found: bool, highest: int) -> None:
        if self.rest:
            self.rest -= 1
            self.windows += 1
            return
        self.windows += found
        self.level = min(highest, self.level + 1) if found else max(1, self.level - 1)
        self.rest = 2 ** (self.level - 1) - 1


@given(windows=st.lists(st.sets(st.integers(0, 9)), max_size=30), highest=st.integers(1, 5))
def test_the_levels_are_those_of_plain_python(windows: list[set[int]], highest: int) -> None:
    levels, plain, leave = vtmm.new_levels(10), [PlainPage() for _ in range(10)], np.empty(10, np.int64)
    for accessed in windows:
        # What rests is not looked at, whether it was accessed or not.
        found = sorted(page for page in accessed if not plain[page].rest)
        left = vtmm.window_over(BOOK, levels, np.array(found, np.int64), highest, leave)
        for page, state in enumerate(plain):
            state.window(page in found, highest)
        assert levels.level.tolist() == [state.level - 1 for state in plain]
        assert levels.windows.tolist() == [state.windows for state in plain]
        assert leave[:left].tolist() == [page for page, state in enumerate(plain) if state.rest]
    pages, counts = np.empty(10, np.int64), np.empty(10, np.int64)
    count = vtmm.take_counts(BOOK, levels.windows, pages, counts)
    counted = [(page, state.windows) for page, state in enumerate(plain) if state.windows]
    assert list(zip(pages[:count].tolist(), counts[:count].tolist(), strict=True)) == counted
    assert not levels.windows.any()


@given(warmth=st.lists(st.integers(0, 12), max_size=40), highest=st.integers(1, 10))
def test_the_bucket_sort_is_a_stable_sort(warmth: list[int], highest: int) -> None:
    out = np.empty(len(warmth), np.int64)
    count = vtmm.hottest(BOOK, np.array(warmth, np.int64), highest, np.empty(highest + 2, np.int64), out)
    ranked = sorted((page for page, warm in enumerate(warmth) if warm), key=lambda page: -min(highest, warmth[page]))
    assert out[:count].tolist() == ranked


class Managed:
    """A VM of the host under vtmm, all but 200 of its pages backed."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        config = small_guest(costs, "vtmm", params=params, pages=PAGES, fast=400)
        self.vm = Vm(config, POLICY, private_memory(config))
        self.vm.ept_fault(0, np.arange(PAGES - 200))
        assert isinstance(self.vm.tiering, Staged)
        self.tiering, self.view = self.vm.tiering, self.vm.view

    def taken(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return np.frombuffer(self.view.take_operations(1 << 60), OPERATION)

    def pages(self, node: int, count: int) -> Words:
        return self.view.on_node(0, PAGES, node, count)

    def rank(self, hot: Words) -> None:
        self.tiering.classifier.observe(Evidence(self.view, pages=hot))
        self.tiering.classifier.end_of_round()


def test_a_window_is_a_harvest_and_a_narrow_walk_at_one_time(costs: Costs) -> None:
    managed = Managed(costs, window_ms=10)
    view = managed.view
    assert managed.vm.prepare(0, 10 * PS_PER_MS) == b""
    found = np.frombuffer(managed.vm.prepare(10 * PS_PER_MS, 14 * PS_PER_MS), OPERATION)
    assert found["kind"].tolist() == [OP_HARVEST, OP_WALK_GPT]
    assert found["time_ps"].tolist() == [10 * PS_PER_MS] * 2
    assert found["flags"][1] == NARROW
    managed.vm.memory.walk[W_YOUNG, 1] = 0b101
    assert managed.vm.prepare(14 * PS_PER_MS, 18 * PS_PER_MS) == b""
    tracker = managed.tiering.tracker
    assert isinstance(tracker, vtmm.PmlWindowScan)
    assert np.flatnonzero(tracker.levels.level).tolist() == [64, 66]
    # At level 2 they rest in the next window.
    managed.vm.prepare(18 * PS_PER_MS, 24 * PS_PER_MS)
    assert managed.vm.memory.walk[2, 1] == 0b101
    assert view.counters[C.vmstat__pgpromote_success] == 0


def test_it_has_the_log_of_dirty_pages_to_itself(costs: Costs) -> None:
    config = small_guest(costs, "vtmm", host=HostKernel(pml=True, thp="always"))
    host = with_needs(config, POLICY).host
    assert (host.pml, host.pml_harvest_ps, host.backs_huge) == (True, 0, False)
    managed = Managed(costs)
    assert managed.vm.config.host.pml and managed.vm.dirty_log is None


def test_the_hottest_that_fit_fast_memory_are_hot(costs: Costs) -> None:
    managed = Managed(costs)
    slow, fast = managed.pages(SLOW, 900), managed.pages(FAST, 10)
    managed.rank(np.concatenate([slow, slow[300:700], fast[:5]]))
    classifier = managed.tiering.classifier
    hot = classifier.hot_set()
    assert hot is not None
    assert hot.tolist() == slow[300:700].tolist(), "two windows before one, by address"
    cold = classifier.demotions(10_000)
    assert set(fast[5:].tolist()) <= set(cold.tolist()) and cold[-1] in fast[:5]


def test_written_pages_are_copied_again_and_the_rest_switched_in_one_pause(costs: Costs) -> None:
    managed = Managed(costs, copy_batch=8)
    view, migrator = managed.view, managed.tiering.migrator
    view.move(managed.pages(FAST, 40), SLOW, 0)
    managed.taken()
    view.settle(1 << 60)
    hot = managed.pages(SLOW, 1000)[-8:]
    managed.rank(hot)
    copies = managed.taken()
    assert copies["kind"].tolist() == [OP_COPY] * 8
    assert copies["a"].tolist() == hot.tolist()
    targets = copies["b"].copy()
    assert (view.nodes.flags[targets] & F_BUSY).all()
    assert (view.frames(hot) >= PAGES).all(), "still mapped where they are"
    migrator.on_dirty(hot[:3])
    found = managed.taken()
    assert found["kind"].tolist() == [OP_COPY] * 3 + [OP_PAUSE] + [OP_SWITCH] * 5
    assert found["b"][4:].tolist() == targets[3:].tolist()
    assert view.counters[C.vmstat__pgpromote_success] == 5
    migrator.on_dirty(hot[1:2])
    found = managed.taken()
    pause = found[found["kind"] == OP_PAUSE]
    assert found["kind"].tolist()[:5] == [OP_PAUSE, OP_COPY, OP_SWITCH, OP_SWITCH, OP_SWITCH]
    assert found["a"][1] == hot[1], "written twice: copied in the pause"
    request = costs.kick_base_ps + costs.kick_target_ps * view.vcpus
    assert pause["b"].tolist() == [3 * costs.zap_pte_ps + request + costs.copy_slow_fast_ps]
    assert view.counters[C.vmstat__pgpromote_success] == 8
    assert view.counters[C.bytes__migrated] == (40 + 8) * 4096


def test_a_copy_that_is_not_made_yet_is_not_switched_to(costs: Costs) -> None:
    managed = Managed(costs, copy_batch=8)
    view, migrator = managed.view, managed.tiering.migrator
    hot = managed.pages(SLOW, 1000)[-8:]
    view.move(managed.pages(FAST, 40), SLOW, 0)
    view.settle(1 << 60)
    managed.rank(hot)
    managed.taken()
    made_ps = view.now
    view.meter.now = made_ps - 1
    migrator.on_dirty(hot[:1])
    assert managed.taken().size == 0
    view.meter.now = made_ps
    migrator.on_dirty(hot[:0])
    found = managed.taken()
    assert found["a"][found["kind"] == OP_COPY].tolist() == [hot[0]], "written meanwhile"
    assert found["a"][found["kind"] == OP_SWITCH].tolist() == hot[1:].tolist()


def test_the_parameters_are_the_paper_s_where_it_names_them() -> None:
    assert resolve(POLICY.params, {})["windows"] == 8
    unpublished = {param.name for param in POLICY.params if param.source.startswith("unpublished")}
    assert unpublished == {"window_ms", "levels", "copy_batch", "recopies"}
    assert BUCKETS >= 64


def new_fleet(costs: Costs, policy: str, params: dict[str, Scalar], **guest_options: Any) -> InProcessFleet:
    """A guest whose quanta are of 1 ms, so that windows may be as short."""
    guest = small_guest(costs, policy, params=params, **guest_options)
    guest = msgspec.structs.replace(guest, engine=msgspec.structs.replace(guest.engine, quantum_ps=PS_PER_MS))
    return InProcessFleet(msgspec.structs.replace(small_host(costs), engine=guest.engine), [guest])


def run(costs: Costs, policy: str, params: dict[str, Scalar]) -> dict[str, Any]:
    fleet = new_fleet(costs, policy, params, run_ms=80)
    while fleet.step():
        if not fleet.guests[0].finished:
            check_memory(fleet)
    assert fleet.host.failures == []
    return fleet.host.reports[0]


def test_it_finds_the_hot_set_and_no_write_is_lost_under_copies(costs: Costs) -> None:
    # So few levels that a look comes more often than an access to a cold page of so small a memory.
    none, found = run(costs, "none", {}), run(costs, "vtmm", {"window_ms": 1, "levels": 2})
    assert found["integrity"]["mismatches"] == 0
    assert found["access"]["fast_ratio"] > 5 * none["access"]["fast_ratio"]
    assert found["transactions"] > none["transactions"]
    assert found["pml"]["copied_again"] > 0, "GUPS writes: some pages were written under their copies"
    assert found["kvm"]["mmu_zapped"] == found["kvm"]["exits"]["ept_violation"] == 0
    # A flush a window, one a switch in either direction.
    pauses = found["kvm"]["exits"]["paused"] // 2
    assert found["kvm"]["remote_tlb_flush_requests"] <= 80 + 1 + pauses
    assert 0 < pauses <= 2 * (80 + 1)


def test_a_fault_waits_for_a_frame_while_copies_hold_them_all(costs: Costs) -> None:
    # It populates what is left while everything found so far is being copied.
    params: dict[str, Scalar] = {"window_ms": 4, "windows": 1, "levels": 1, "copy_batch": 100_000}
    fleet = new_fleet(costs, "vtmm", params, run_ms=20, workload={"footprint": 0.97})
    vm, guest = fleet.host.vms[0], fleet.guests[0]
    waited, stalled_ps = 0, 0
    while fleet.step():
        waits = vm.waiting.size > 0
        if waits and not waited:
            stalled_ps = int(guest.machine.vcpus.ledger[:, PAUSED].sum())
        waited += waits
        if not guest.finished:
            check_memory(fleet)
    assert waited > 0
    assert stalled_ps > 0
    assert fleet.host.failures == []
    report = fleet.host.reports[0]
    assert report["integrity"]["mismatches"] == 0
    assert report["integrity"]["pages_checked"] > 0.96 * guest.config.total_pages
