"""Nomad's rules (reference policies.md 7): the look-back, the queue, transactions that a write aborts, shadow pages."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest_copy import Copies
from guestd.jit import kernel
from guestd.machine import Machine
from guestd.meter import Meter
from guestd.mm.nodes import ACTIVE, F_SHADOW, FAST, INACTIVE, NO_PAGE, SLOW, WMARK_DEMOTE, WMARK_MIN, lru_add, new_nodes
from guestd.params import resolve
from guestd.tiering.nomad import POLICY, Transactional, look_back
from guestd.tiering.registry import policy_of
from guestd.tiering.stage import Staged, StageError
from guestd.transaction import copy_operation
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import DIRTY, WRITABLE
from proto.layout import OP_TRANSACTION_BEGIN, OP_TRANSACTION_END
from proto.units import PS_PER_MS
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated

PAGES = 2048


@kernel
def step(machine: Machine, operations: np.ndarray, index: int) -> None:
    """Execute one step of a copy."""
    copy_operation(machine, operations[index])


FAST_SCAN: dict[str, Scalar] = {"scan_delay_ms": 0, "scan_period_min_ms": 2, "scan_size_mb": 16}


def reference_look_back(listed: list[list[int]], active: list[int], distance: int, faults: list[int],
                        frame_of: dict[int, int], room: int) -> tuple[list[int], list[int]]:  # fmt: skip
    """decide_queue_page. ``listed``: [page, frame, young]; ``active``: per frame 0 inactive, 1 referenced, 2 active."""
    hot, looked = [], [0, 0]
    for fault in faults:
        left = []
        for index, (page, frame, young) in enumerate(listed):
            looked[0] += 1
            if frame == NO_PAGE:
                continue
            if young and active[frame] == 2:
                hot.append(page)
                continue
            if young:
                active[frame] += 1
                looked[1] += 1
            elif index > distance:
                continue
            left.append([page, frame, young])
        listed[:] = [[fault, frame_of[fault], True], *left][:room]
    return hot, looked


@given(st.data())
def test_the_kernel_looks_back_as_nomad_does(data: st.DataObject) -> None:
    span, room, distance = 32, 16, data.draw(st.integers(0, 8))
    nodes = new_nodes(span, span, span)
    state = data.draw(st.lists(st.integers(0, 2), min_size=2 * span, max_size=2 * span))
    for frame in range(2 * span):
        lru_add(nodes, frame, ACTIVE if state[frame] == 2 else INACTIVE)
        nodes.flags[frame] |= (1 << 2) if state[frame] == 1 else 0
    recent, frames, length = np.zeros(room, np.int64), np.zeros(room, np.int32), 0
    listed: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 5))):
        faults = data.draw(st.lists(st.integers(0, span - 1), max_size=6))
        frame_of = {page: span + page for page in range(span)}
        young = np.zeros(room, np.bool_)
        for i in range(length):
            young[i] = listed[i][2] = data.draw(st.booleans())
            if data.draw(st.integers(0, 7)) == 0:
                frames[i] = listed[i][1] = NO_PAGE
        hot = np.empty(length + len(faults), np.int64)
        pages = np.array(faults, np.int64)
        places = (span + pages).astype(np.int32)
        length, found, visited, marked, _ = look_back(
            Meter().book, nodes, recent, frames, young, length, distance, pages, places, hot
        )
        expected, looked = reference_look_back(listed, state, distance, faults, frame_of, room)
        assert hot[:found].tolist() == expected
        assert [visited, marked] == looked
        assert [list(row) for row in zip(recent[:length], frames[:length], strict=True)] == [row[:2] for row in listed]
        assert [bool(flags & 2) for flags in nodes.flags] == [level == 2 for level in state]


class Populated:
    """A guest of two vCPUs under nomad that has touched its memory; scanner and kswapd sleep."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        never: dict[str, Scalar] = {"scan_delay_ms": 600_000}
        self.fleet = new_fleet(small_guest(costs, "nomad", params=never | params, pages=PAGES, run_ms=1000))
        self.fleet.guests[0].nodes.watermark[FAST, WMARK_DEMOTE] = 0
        self.guest = until_populated(self.fleet)
        self.view: Copies = self.guest.view
        assert isinstance(self.guest.tiering, Staged)
        self.nomad = self.guest.tiering
        assert isinstance(self.nomad.migrator, Transactional)
        self.migrator = self.nomad.migrator

    def make_room(self, count: int) -> None:
        view = self.view
        need = view.watermark(FAST, WMARK_MIN) + count - view.free(FAST)
        if need > 0:
            view.move(view.on_node(0, view.pages, FAST, need), SLOW, 0)

    def slow_pages(self, count: int) -> Words:
        return self.view.on_node(self.view.pages - 600, 600, SLOW, count)

    def run_copies(self, pages: Words, *, shadow: bool = True, write: Words | None = None) -> np.ndarray:
        """Copy ``pages``, of which ``write`` are written while their copies last; which made it."""
        view, machine = self.view, self.guest.machine
        view.meter.now = self.guest.now
        started, _ = view.start_copies(pages, view.watermark(FAST, WMARK_MIN), shadow=shadow)
        operations = view.take_operations()
        assert operations is not None
        machine.gpt[pages] |= DIRTY
        operations = operations[np.argsort(operations["time_ps"], kind="stable")]
        assert set(operations["kind"]) == {OP_TRANSACTION_BEGIN, OP_TRANSACTION_END}
        for index, operation in enumerate(operations):
            step(machine, operations, index)
            if write is not None and operation["kind"] == OP_TRANSACTION_BEGIN and operation["a"] in write:
                machine.gpt[operation["a"]] |= DIRTY
        assert started.all()
        return view.finish_copies()[1]


def test_it_is_registered_with_its_published_numbers() -> None:
    found = resolve(POLICY.params, {})
    assert (found["look_back"], found["promotion_queue"], found["migrate_passes"]) == (20, 512, 10)
    assert found["shadow_pages"] is True


def test_a_faulting_page_is_promoted_off_the_fault_path_once_later_faults_find_it_active(costs: Costs) -> None:
    populated = Populated(costs)
    populated.make_room(50)
    view, pages = populated.view, populated.slow_pages(30)
    view.protect(int(pages[0]), 30)
    before = view.counters.copy()
    assert populated.nomad.on_hint_faults(pages).tolist() == [costs.hint_fault_ps] * 30
    assert (view.nodes_of(pages) == SLOW).all(), "the fault copies nothing"
    # Each page is marked by the next fault, activated by the one after, and queued by the third.
    assert (view.counters - before)[C.vmstat__nomad_queued] == 27
    assert (view.counters - before)[C.vmstat__pgactivate] == 28
    end = populated.guest.now + 10 * PS_PER_MS
    while populated.guest.now < end:
        populated.fleet.step()
        check_memory(populated.fleet)
    delta = view.counters - before
    assert delta[C.vmstat__nomad_transaction_success] + delta[C.vmstat__pgmigrate_fail_dst_node_full] == 27
    assert delta[C.vmstat__pgpromote_success] == delta[C.vmstat__nomad_transaction_success] > 0
    # Clearing the D bit flushes, the remap flushes again.
    assert delta[C.vmstat__nr_tlb_local_flush_one] >= 2 * delta[C.vmstat__nomad_transaction_success]


def test_what_the_full_queue_has_no_room_for_is_passed_over(costs: Costs) -> None:
    populated = Populated(costs, promotion_queue=8)
    pages = populated.slow_pages(20)
    populated.migrator.on_faults(pages, np.ones(20, np.bool_), np.zeros(20, np.int64))
    populated.migrator.on_faults(pages[:8], np.ones(8, np.bool_), np.zeros(8, np.int64))
    counters = populated.view.counters
    assert (counters[C.vmstat__nomad_queued], counters[C.vmstat__nomad_queue_full]) == (8, 12), "queued once"


def test_a_write_during_the_copy_aborts_it_and_loses_nothing(costs: Costs) -> None:
    populated = Populated(costs)
    populated.make_room(20)
    view, pages = populated.view, populated.slow_pages(10)
    before, free = view.counters.copy(), view.free(FAST)
    written = pages[[2, 7]]
    done = populated.run_copies(pages, write=written)
    assert pages[~done].tolist() == written.tolist()
    assert (view.nodes_of(pages) == np.where(done, FAST, SLOW)).all()
    assert view.free(FAST) == free - 8, "the copies that were in vain gave their frames back"
    delta = view.counters - before
    assert (delta[C.vmstat__nomad_transaction_success], delta[C.vmstat__nomad_transaction_abort]) == (8, 2)
    assert delta[C.vmstat__nomad_shadow_link] == 8
    check_memory(populated.fleet)
    populated.fleet.step()
    check_memory(populated.fleet)


def test_a_clean_page_goes_back_to_its_shadow_without_a_copy(costs: Costs) -> None:
    took = {}
    for shadow in (True, False):
        populated = Populated(costs)
        populated.make_room(20)
        view, pages = populated.view, populated.slow_pages(10)
        old, slow = view.frames(pages), view.free(SLOW)
        assert populated.run_copies(pages, shadow=shadow).all()
        assert view.free(SLOW) == (slow if shadow else slow + 10), "shadows are used memory"
        before, now = view.counters.copy(), view.now
        assert view.move(pages, SLOW, 0).all()
        took[shadow] = view.now - now
        delta = view.counters - before
        assert delta[C.vmstat__nomad_shadow_demote] == (10 if shadow else 0)
        assert delta[C.bytes__migrated] == (0 if shadow else 10 * 4096)
        assert not shadow or (view.frames(pages) == old).all()
        assert (populated.guest.machine.gpt[pages] & WRITABLE != 0).all()
        check_memory(populated.fleet)
    assert took[False] - took[True] == 10 * costs.copy_fast_slow_ps


def test_the_first_write_to_a_shadowed_page_faults_once_and_drops_the_shadow(costs: Costs) -> None:
    populated = Populated(costs)
    populated.make_room(20)
    view, guest, pages = populated.view, populated.guest, populated.slow_pages(10)
    assert populated.run_copies(pages).all()
    before = view.counters.copy()
    end = guest.now + 40 * PS_PER_MS
    while guest.now < end:
        populated.fleet.step()
        check_memory(populated.fleet)
    delta = view.counters - before
    faults = int(delta[C.vmstat__nomad_wp_fault])
    assert 0 < faults == delta[C.vmstat__nomad_shadow_drop] <= 10
    assert delta[C.time__wp_fault_ps] == faults * costs.wp_fault_ps
    assert (guest.machine.gpt[pages] & WRITABLE != 0).sum() == faults
    assert (guest.nodes.flags & F_SHADOW != 0).sum() == 10 - faults


def test_shadows_are_given_up_when_slow_memory_or_an_allocation_runs_short(costs: Costs) -> None:
    populated = Populated(costs)
    populated.make_room(40)
    view, pages = populated.view, populated.slow_pages(30)
    assert populated.run_copies(pages).all()
    assert view.on_allocation_failure() == 10, "what a failed allocation takes"
    view.nodes.watermark[SLOW] = view.free(SLOW) + np.array([0, 1, 5, 9, 9])
    populated.nomad.on_pressure(PS_PER_MS)
    assert view.counters[C.vmstat__nomad_shadow_reclaim] == 10 + 16, "half a cluster is enough for the high watermark"
    before = view.counters[C.vmstat__nomad_shadow_drop]
    view.on_writes(pages)
    assert view.counters[C.vmstat__nomad_shadow_drop] == before + 4


def test_aborted_pages_are_tried_again_and_given_up_after_the_last_pass(costs: Costs) -> None:
    populated = Populated(costs, migrate_passes=3)
    populated.make_room(20)
    guest, view, pages = populated.guest, populated.view, populated.slow_pages(4)
    before = view.counters.copy()
    populated.migrator.on_faults(pages, np.ones(4, np.bool_), np.zeros(4, np.int64))
    for _ in range(5):
        view.meter.now = guest.now
        populated.migrator.on_timer("worker")
        operations = view.take_operations()
        if operations is not None and operations.size:
            assert (operations["a"].reshape(2, -1) == pages).all()
            guest.machine.gpt[pages] |= DIRTY  # and no step is executed: all of them are as if written
    delta = view.counters - before
    assert (delta[C.vmstat__nomad_transaction_abort], delta[C.vmstat__nomad_retry]) == (12, 8)
    assert delta[C.vmstat__pgmigrate_fail] == 4
    check_memory(populated.fleet)


def test_the_migrator_works_in_a_guests_view_only() -> None:
    assert policy_of("hyperplace", {"migrator": "transactional"}).stages["migrator"] == "transactional"
    with pytest.raises(StageError, match="transactional"):
        policy_of("h-tpp", {"migrator": "transactional"})


@pytest.mark.parametrize(
    ("policy", "stages"),
    [
        ("g-tpp", {"migrator": "transactional"}),
        ("tpp-mainline", {"migrator": "transactional"}),
        ("hyperplace", {"migrator": "transactional"}),
        ("nomad", {"migrator": "in-fault"}),
        ("nomad", {"migrator": "swap"}),
    ],
)
def test_its_stages_work_with_others(policy: str, stages: dict[str, str], costs: Costs) -> None:
    composed = policy_of(policy, stages)
    config = small_guest(costs, policy, params=dict(composed.warm_up), run_ms=40)
    fleet = new_fleet(msgspec.structs.replace(config, stages=stages))
    while fleet.step():
        check_memory(fleet)
    report = fleet.host.reports[0]
    assert report["outcome"] == "ok" and report["integrity"]["mismatches"] == 0
    assert report["migration"]["promoted_pages"] + report["vmstat"]["pgexchange_success"] > 0


def test_it_finds_the_hot_set(costs: Costs) -> None:
    none = run_fleet(small_guest(costs, "none", run_ms=100))[0]
    fleet = new_fleet(small_guest(costs, "nomad", params=FAST_SCAN, run_ms=100))
    fleet.run()
    assert fleet.host.reports[0]["access"]["fast_ratio"] > none["access"]["fast_ratio"]
    counters = fleet.guests[0].machine.counters
    assert counters[C.vmstat__pgpromote_success] == counters[C.vmstat__nomad_transaction_success] > 0
    gone = sum(counters[C[f"vmstat__nomad_shadow_{how}"]] for how in ("drop", "reclaim", "demote"))
    left = np.count_nonzero(fleet.guests[0].nodes.flags & F_SHADOW)
    assert gone + left == counters[C.vmstat__nomad_shadow_link] <= counters[C.vmstat__nomad_transaction_success]
