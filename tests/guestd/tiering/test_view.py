"""What an algorithm sees through a PageView, on a guest's real memory after populating."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet
from guestd.mm.nodes import ACTIVE, FAST, INACTIVE, NO_PAGE, SLOW, WMARK_HIGH
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, YOUNG
from tests.small_fleet import check_memory, new_fleet, small_guest, until_populated

PAGES = 2048


class Populated:
    """A guest that has touched all of its memory once, and the law that nothing of it is lost."""

    def __init__(self, costs: Costs) -> None:
        self.fleet: InProcessFleet = new_fleet(small_guest(costs, pages=PAGES, run_ms=10))
        self.guest = until_populated(self.fleet)
        self.view: PageView = self.guest.view

    def pages(self, node: int, count: int = PAGES) -> Words:
        return self.view.on_node(0, self.view.pages, node, count)

    def content(self) -> Words:
        """The stamp behind every mapped page, through both tables."""
        machine = self.guest.machine
        mapped = np.flatnonzero(machine.gpt & (PRESENT | PROTNONE))
        slots = (machine.ept[(machine.gpt[mapped] & FRAME_MASK) >> FRAME_SHIFT] & FRAME_MASK) >> FRAME_SHIFT
        return machine.stamps[slots]


@pytest.fixture
def populated(costs: Costs) -> Populated:
    return Populated(costs)


def test_pages_are_found_on_their_node_in_order_of_address(populated: Populated) -> None:
    view = populated.view
    fast, slow = populated.pages(FAST), populated.pages(SLOW)
    assert fast.size + slow.size == view.count_mapped(0, view.pages) == int(PAGES * 0.875)
    assert (np.diff(np.union1d(fast, slow)) == 1).all()
    assert (view.frames(fast) < PAGES).all()
    assert (view.frames(slow) >= PAGES).all()
    assert populated.pages(SLOW, 5).tolist() == slow[:5].tolist()
    assert view.on_node(int(slow[3]), 10, SLOW, 4).tolist() == slow[3:7].tolist()
    hole = np.setdiff1d(np.arange(view.pages), np.union1d(fast, slow))
    assert (view.frames(hole) == NO_PAGE).all()
    assert view.on_node(0, view.pages, SLOW, 0).size == 0


def test_looking_costs_what_was_looked_at(populated: Populated, costs: Costs) -> None:
    view = populated.view
    first = int(populated.pages(SLOW, 1)[0])
    before = view.now
    assert view.on_node(first, 100, SLOW, 3).size == 3
    assert view.now - before == 4 * costs.scan_pte_ps, "a PDE, and the pages up to the first that finds no room"
    before = view.now
    view.test_and_clear_young(populated.pages(SLOW, 7))
    assert view.now - before >= 7 * (costs.rmap_walk_ps + costs.scan_pte_ps)


def test_accessed_bits_are_read_once_and_nothing_is_flushed(populated: Populated) -> None:
    view, gpt = populated.view, populated.guest.machine.gpt
    pages = populated.pages(SLOW, 6)
    view.test_and_clear_young(pages)
    gpt[pages[[0, 2]]] |= ACCESSED
    gpt[pages[5]] |= YOUNG
    tlb = populated.guest.machine.vcpus.stlb_tag.copy()
    flushes = view.counters[C.vmstat__nr_tlb_local_flush_one] + view.counters[C.vmstat__nr_tlb_local_flush_all]
    assert view.test_and_clear_young(pages).tolist() == [True, False, True, False, False, True]
    assert not view.test_and_clear_young(pages).any()
    after = view.counters[C.vmstat__nr_tlb_local_flush_one] + view.counters[C.vmstat__nr_tlb_local_flush_all]
    assert after == flushes
    assert np.array_equal(populated.guest.machine.vcpus.stlb_tag, tlb), "the guest's TLB keeps its stale entries"


def test_looking_at_accessed_bits_leaves_them_and_clearing_flushes_nothing(populated: Populated, costs: Costs) -> None:
    view, gpt = populated.view, populated.guest.machine.gpt
    pages = populated.pages(SLOW, 6)
    gpt[pages] &= ~ACCESSED
    gpt[pages[[0, 2]]] |= ACCESSED
    gpt[pages[5]] |= YOUNG
    expected = [True, False, True, False, False, True]
    flushed, before = view.counters.copy(), view.now
    assert view.test_young(pages).tolist() == expected
    assert view.test_young(pages).tolist() == expected
    assert view.clear_young(pages).tolist() == expected
    assert not view.clear_young(pages).any()
    assert view.now - before == 4 * 6 * (costs.rmap_walk_ps + costs.scan_pte_ps)
    assert np.array_equal(view.counters, flushed)


@pytest.mark.parametrize("count", [0, 1, 33, 34])
def test_clearing_dirty_bits_flushes_the_dirty_pages_once(count: int, populated: Populated) -> None:
    view, machine = populated.view, populated.guest.machine
    pages = populated.pages(SLOW, 40)
    machine.gpt[pages] &= ~DIRTY
    machine.gpt[pages[:count]] |= DIRTY
    before = view.counters.copy()
    assert view.test_and_clear_dirty(pages).tolist() == [i < count for i in range(40)]
    assert not (machine.gpt[pages] & DIRTY).any()
    delta = view.counters - before
    whole = count > populated.guest.config.kernel.single_page_flush_ceiling
    assert delta[C.vmstat__nr_tlb_local_flush_one] == (0 if whole else count)
    assert delta[C.vmstat__nr_tlb_local_flush_all] == whole
    assert delta[C.vmstat__nr_tlb_remote_flush] == (count > 0)
    assert not view.test_and_clear_dirty(pages).any()


def test_protection_covers_slow_pages_and_comes_off_in_the_fault(populated: Populated) -> None:
    view, gpt = populated.view, populated.guest.machine.gpt
    slow = populated.pages(SLOW)
    assert view.protect(0, view.pages) == slow.size
    assert ((gpt[slow] & (PRESENT | PROTNONE)) == PROTNONE).all()
    assert (gpt[populated.pages(FAST)] & PRESENT).all()
    assert view.protect(0, view.pages) == 0
    assert populated.pages(SLOW).tolist() == slow.tolist(), "a protected page keeps its frame"
    assert view.counters[C.vmstat__numa_pte_updates] == slow.size
    assert view.counters[C.vmstat__nr_tlb_local_flush_all] == 1
    view.unprotect(slow)
    assert ((gpt[slow] & (PRESENT | PROTNONE)) == PRESENT).all()


def test_a_range_below_the_flush_ceiling_is_flushed_page_by_page(populated: Populated) -> None:
    view = populated.view
    ceiling = populated.guest.config.kernel.single_page_flush_ceiling
    first = int(populated.pages(SLOW, 1)[0])
    view.protect(first, ceiling)
    assert view.counters[C.vmstat__nr_tlb_local_flush_one] == ceiling
    assert view.counters[C.vmstat__nr_tlb_local_flush_all] == 0
    view.protect(first + ceiling, ceiling + 1)
    assert view.counters[C.vmstat__nr_tlb_local_flush_one] == ceiling
    assert view.counters[C.vmstat__nr_tlb_local_flush_all] == 1
    assert view.counters[C.vmstat__nr_tlb_remote_flush] == 2


def test_a_move_takes_content_list_and_reverse_map_along(populated: Populated) -> None:
    view, guest = populated.view, populated.guest
    before = populated.content()
    pages = populated.pages(FAST, 40)
    old = view.frames(pages)
    free = (view.free(FAST), view.free(SLOW))
    assert view.move(pages, SLOW, 0).all()
    assert (view.frames(pages) >= PAGES).all()
    assert view.was_demoted(view.frames(pages)).all()
    assert not view.is_active(view.frames(pages)).any()
    assert (view.free(FAST), view.free(SLOW)) == (free[FAST] + 40, free[SLOW] - 40)
    assert (guest.nodes.page[old] == NO_PAGE).all()
    assert np.array_equal(populated.content(), before)
    assert view.counters[C.vmstat__pgmigrate_success] == 40
    assert view.counters[C.bytes__migrated] == 40 << 12
    check_memory(populated.fleet)


def test_a_move_leaves_free_what_it_is_told_to(populated: Populated) -> None:
    view = populated.view
    fast = populated.pages(FAST, 90)
    view.move(fast, SLOW, 0)
    keep = view.free(FAST) - 30
    moved = view.move(populated.pages(SLOW, 50), FAST, keep)
    assert moved.tolist() == [True] * 30 + [False] * 20
    assert view.free(FAST) == keep
    assert not view.move(populated.pages(FAST, 3), FAST, 0).any(), "already there"
    assert view.move(np.zeros(0, np.int64), FAST, 0).size == 0


def test_migration_flushes_once_per_page_and_a_protected_page_not_at_all(populated: Populated) -> None:
    view = populated.view
    view.move(populated.pages(FAST, 90), SLOW, 0)
    assert view.counters[C.vmstat__nr_tlb_local_flush_one] == 90
    assert view.counters[C.vmstat__nr_tlb_remote_flush] == 90
    pages = populated.pages(SLOW, 40)
    view.protect(int(pages[0]), 40)
    before = view.counters.copy()
    assert view.move(pages, FAST, 0).all()
    delta = view.counters - before
    assert delta[C.vmstat__nr_tlb_local_flush_one] == delta[C.vmstat__nr_tlb_remote_flush] == 0


def test_migration_in_batches_flushes_once_per_batch(costs: Costs) -> None:
    size: dict[str, Scalar] = {"footprint": 0.4}
    fleet = new_fleet(small_guest(costs, pages=PAGES, fast=1024, run_ms=10, workload=size, batched_unmap_flush=True))
    view = until_populated(fleet).view
    pages = view.on_node(0, view.pages, FAST, 600)
    assert view.move(pages[:512], SLOW, 0).all()
    assert view.counters[C.vmstat__nr_tlb_local_flush_all] == 1
    assert view.move(pages[512:], SLOW, 0).all()
    assert view.counters[C.vmstat__nr_tlb_local_flush_all] == 2
    assert view.counters[C.vmstat__nr_tlb_local_flush_one] == 0
    check_memory(fleet)


def test_an_exchange_needs_no_free_frame(populated: Populated) -> None:
    view = populated.view
    before = populated.content()
    free = (view.free(FAST), view.free(SLOW))
    slow, fast = populated.pages(SLOW, 20), populated.pages(FAST, 25)
    places = (view.frames(slow), view.frames(fast[:20]))
    view.mark_accessed(places[1])
    view.mark_accessed(places[1])
    assert view.is_active(places[1]).all()
    assert view.exchange(slow, fast, batched=True) == 20
    assert np.array_equal(view.frames(slow), places[1])
    assert np.array_equal(view.frames(fast[:20]), places[0])
    assert view.is_active(places[0]).all(), "the active bit goes with the page"
    assert not view.is_active(places[1]).any()
    assert (view.free(FAST), view.free(SLOW)) == free
    assert np.array_equal(populated.content(), before)
    assert view.counters[C.vmstat__pgexchange_success] == 20
    assert view.counters[C.bytes__migrated] == 40 << 12
    assert view.counters[C.vmstat__nr_tlb_local_flush_all] == 1
    check_memory(populated.fleet)


def test_an_exchange_of_pages_on_the_wrong_nodes_does_nothing(populated: Populated) -> None:
    view = populated.view
    slow, fast = populated.pages(SLOW, 4), populated.pages(FAST, 4)
    before = view.frames(np.concatenate([slow, fast]))
    assert view.exchange(fast, slow, batched=True) == 0
    assert view.counters[C.vmstat__pgmigrate_fail] == 8
    assert np.array_equal(view.frames(np.concatenate([slow, fast])), before)


def test_marking_accessed_activates_at_the_second_time(populated: Populated) -> None:
    view = populated.view
    frames = view.frames(populated.pages(SLOW, 3))
    view.mark_accessed(frames)
    assert not view.is_active(frames).any()
    view.mark_accessed(frames[:2])
    assert view.is_active(frames).tolist() == [True, True, False]
    assert view.counters[C.vmstat__pgactivate] == 2


def test_isolated_frames_come_oldest_first_and_go_back_where_told(populated: Populated) -> None:
    view, size = populated.view, populated.guest.nodes.size
    on_list = int(size[INACTIVE])
    frames = view.isolate(FAST, INACTIVE, 10)
    assert view.pages_of(frames).tolist() == populated.pages(FAST, 10).tolist()
    assert size[INACTIVE] == on_list - 10
    active = np.arange(10) < 4
    view.put_back(frames, active, ~active)
    assert (size[INACTIVE], size[ACTIVE]) == (on_list - 4, 4)
    assert view.isolate(FAST, ACTIVE, 10).tolist() == frames[:4].tolist()
    view.put_back(frames[:4], active[:4], active[:4])
    check_memory(populated.fleet)


operations = st.lists(
    st.tuples(st.sampled_from(["promote", "demote", "exchange", "pairwise", "protect", "unprotect", "age"]),
              st.integers(0, PAGES - 1), st.integers(1, 300)),
    min_size=1, max_size=12,
)  # fmt: skip


@given(program=operations)
def test_whatever_is_done_memory_is_conserved_and_the_guest_runs_on(
    program: list[tuple[str, int, int]], costs: Costs
) -> None:
    populated = Populated(costs)
    view = populated.view
    before = populated.content()
    actions: dict[str, Callable[[int, int], object]] = {
        "promote": lambda at, n: view.move(view.on_node(at, n, SLOW, n), FAST, view.watermark(FAST, WMARK_HIGH)),
        "demote": lambda at, n: view.move(view.on_node(at, n, FAST, n), SLOW, 0),
        "exchange": lambda at, n: view.exchange(view.on_node(at, n, SLOW, n), populated.pages(FAST, n), batched=True),
        "pairwise": lambda at, n: view.exchange(view.on_node(at, n, SLOW, n), populated.pages(FAST, n), batched=False),
        "protect": view.protect,
        "unprotect": lambda at, n: view.unprotect(view.on_node(at, n, SLOW, n)),
        "age": lambda at, n: view.test_and_clear_young(view.on_node(at, n, FAST, n)),
    }
    for action, drawn, count in program:
        at = drawn % view.pages
        actions[action](at, min(count, view.pages - at))
    check_memory(populated.fleet)
    assert np.array_equal(populated.content(), before)
    populated.fleet.run()
    (report,) = populated.fleet.host.reports.values()
    assert report["integrity"]["mismatches"] == 0
    assert report["transactions"] > 0
