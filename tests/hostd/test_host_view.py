"""The host's view: what it changes, it changes through timestamped operations and whole-VM flushes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import private_memory
from guestd.mm.nodes import F_BUSY, FAST, INACTIVE, NO_PAGE, SLOW
from guestd.tiering.registry import policies
from hostd.host_view import PUD_PAGES, HostView
from hostd.vm import Vm
from proto.arrays import Words
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, DIRTY, PROTNONE, YOUNG
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_ZAP, OPERATION
from proto.units import PAGE_SHIFT, PS_PER_S
from tests.small_fleet import check_memory, new_fleet, small_guest, until_populated

PAGES = 2048


@pytest.fixture
def vm(costs: Costs) -> Vm:
    """A VM under h-tpp, all but 200 of its pages backed."""
    config = small_guest(costs, "h-tpp", pages=PAGES, fast=512)
    made = Vm(config, policies()["h-tpp"], private_memory(config))
    made.ept_fault(0, np.arange(PAGES - 200))
    return made


def taken(view: HostView, until_ps: int = PS_PER_S) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.frombuffer(view.take_operations(until_ps), OPERATION)


@given(quanta=st.lists(st.lists(st.integers(0, 40), max_size=100), max_size=6), step=st.integers(1, 20))
def test_operations_come_out_in_order_of_time_and_then_of_asking(
    costs: Costs, quanta: list[list[int]], step: int
) -> None:
    """However far ahead of its barrier each is due; those of one time stay in their order."""
    config = small_guest(costs, "h-tpp", pages=PAGES, fast=512)
    view = Vm(config, policies()["h-tpp"], private_memory(config)).view
    waiting: list[tuple[int, int]] = []
    asked = 0
    for barrier, times in enumerate([*quanta, [], []]):
        for time in times:
            view.stall(0, time, asked)
            waiting.append((time, asked))
            asked += 1
        until = 100 if barrier == len(quanta) + 1 else step * (barrier + 1)
        due = sorted(entry for entry in waiting if entry[0] < until)
        found = taken(view, until)
        assert list(zip(found["time_ps"].tolist(), found["b"].tolist(), strict=True)) == due
        waiting = [entry for entry in waiting if entry[0] >= until]
    assert view.take_operations(1 << 60) == b""


def test_a_young_page_costs_a_flush_of_its_own_one_after_the_other(vm: Vm, costs: Costs) -> None:
    view = vm.view
    pages = np.arange(10)
    vm.memory.ept[[1, 4]] |= ACCESSED
    vm.memory.ept[7] |= YOUNG  # accessed before it was zapped
    assert np.flatnonzero(view.test_and_clear_young(pages)).tolist() == [1, 4, 7]
    found = taken(view)
    assert found["kind"].tolist() == [OP_FLUSH] * 2, "no TLB holds what was zapped"
    gap = costs.kick_base_ps + costs.kick_target_ps * view.vcpus
    assert np.diff(found["time_ps"]).tolist() == [gap]
    assert not view.test_and_clear_young(pages).any()
    assert taken(view).size == 0


def test_looking_and_clearing_ask_for_no_flush(vm: Vm, costs: Costs) -> None:
    """KVM's test_young and clear_young, as DAMON uses them."""
    view, pages = vm.view, np.arange(10)
    vm.memory.ept[[1, 4]] |= ACCESSED
    vm.memory.ept[7] |= YOUNG
    before = view.now
    assert np.flatnonzero(view.test_young(pages)).tolist() == [1, 4, 7]
    assert np.flatnonzero(view.clear_young(pages)).tolist() == [1, 4, 7]
    assert not view.test_young(pages).any()
    assert view.now - before == 3 * 10 * (costs.rmap_walk_ps + costs.scan_pte_ps)
    assert taken(view).size == 0


def test_clearing_dirty_bits_asks_for_one_flush_of_the_vm(vm: Vm) -> None:
    view, pages = vm.view, np.arange(20)
    vm.memory.ept[[3, 9, 11]] |= DIRTY
    assert np.flatnonzero(view.test_and_clear_dirty(pages)).tolist() == [3, 9, 11]
    assert taken(view)["kind"].tolist() == [OP_FLUSH]
    assert not view.test_and_clear_dirty(pages).any()
    assert taken(view).size == 0, "nothing was dirty"


def test_a_harvest_is_requested_at_its_time_and_read_once(vm: Vm, costs: Costs) -> None:
    view = vm.view
    view.meter.now = 77
    view.request_harvest()
    (harvest,) = taken(view)
    assert (harvest["kind"], harvest["time_ps"]) == (OP_HARVEST, 77)
    wanted = [0, 5, 63, 64, 1000]
    for page in wanted:
        vm.memory.dirty[1, page // 64] |= np.int64(np.uint64(1 << page % 64).view(np.int64))
    before = view.now
    assert view.harvest_dirty().tolist() == wanted
    assert view.now - before == costs.scan_pte_ps * 5
    assert view.harvest_dirty().size == 0


def test_unmapped_pages_are_zapped_one_by_one_and_busy(vm: Vm, costs: Costs) -> None:
    view, pages = vm.view, np.array([5, 6, 90])
    times = view.unmap(pages, 1_000)
    each = 1_000 + costs.zap_pte_ps + costs.kick_base_ps + costs.kick_target_ps * view.vcpus
    assert np.diff(times).tolist() == [each, each] and view.now - times[0] == 3 * each
    found = taken(view)
    assert found[["kind", "flags", "a", "b"]].tolist() == [(OP_ZAP, 0, page, 1) for page in pages]
    assert (vm.nodes.flags[view.frames(pages)] & F_BUSY).all()
    assert not view.move(pages, SLOW, 0).any(), "nobody moves them meanwhile"


def test_a_range_is_zapped_whole_but_only_its_slow_pages_count(vm: Vm) -> None:
    view = vm.view
    slow = view.on_node(0, PAGES, SLOW, PAGES)
    assert 0 < slow.size < PAGES - 200
    assert view.protect(0, PAGES) == slow.size
    (zap,) = taken(view)
    assert (zap["kind"], zap["flags"], zap["a"], zap["b"]) == (OP_ZAP, PROTNONE, 0, PAGES)
    assert vm.counters[C.vmstat__numa_pte_updates] == slow.size


def test_a_range_is_notified_once_per_pud(costs: Costs) -> None:
    pages = PUD_PAGES + 512
    config = small_guest(costs, "h-tpp", pages=pages, fast=512)
    view = Vm(config, policies()["h-tpp"], private_memory(config)).view
    assert view.protect(256, pages - 256) == 0
    zaps = taken(view)
    assert zaps["a"].tolist() == [256, 256 + PUD_PAGES]
    assert zaps["b"].tolist() == [PUD_PAGES, 256]
    request = costs.kick_base_ps + costs.kick_target_ps * view.vcpus
    assert (zaps["hold_ps"] == request).all()
    # Nothing of it is backed, so each of the 513 tables that it reaches into costs one look.
    busy = (costs.protect_pte_ps + costs.zap_pte_ps) * (PUD_PAGES // 512 + 1) + request
    assert zaps["busy_ps"][0] == busy
    assert zaps["time_ps"].tolist() == [0, busy]


def test_moves_are_timed_and_their_frames_reserved_until_they_are_settled(vm: Vm, costs: Costs) -> None:
    view = vm.view
    pages = view.on_node(0, PAGES, FAST, 5)
    old = view.frames(pages)
    free = (view.free(FAST), view.free(SLOW))
    assert view.move(pages, SLOW, 0).all()
    # The thread sees the fast frames as free already, as they are at its own time; nobody can have them yet.
    assert (view.free(FAST), view.free(SLOW)) == (free[FAST] + 5, free[SLOW] - 5)
    assert vm.nodes.free_count[FAST] == free[FAST]
    assert np.array_equal(view.frames(pages), old), "the table changes when the VM executes the move"
    assert not view.move(pages, SLOW, 0).any()
    assert not view.move(pages, FAST, 0).any()
    found = taken(view)
    assert found["kind"].tolist() == [OP_MOVE] * 5
    assert np.array_equal(found["a"], pages)
    assert (vm.nodes.page[found["b"]] == pages).all()
    gaps = np.diff(found["time_ps"])
    assert (gaps > costs.kick_base_ps + costs.copy_fast_slow_ps).all()
    view.settle(int(found["time_ps"][2]))
    assert vm.nodes.free_count[FAST] == free[FAST] + 2
    assert (vm.nodes.page[old[:2]] == NO_PAGE).all()
    view.settle(PS_PER_S)
    assert vm.nodes.free_count[FAST] == free[FAST] + 5
    assert view.free(FAST) == free[FAST] + 5


def test_operations_wait_for_the_quantum_that_they_belong_to(vm: Vm) -> None:
    view = vm.view
    pages = view.on_node(0, PAGES, FAST, 6)
    began = view.now
    view.move(pages, SLOW, 0)
    everything = np.linspace(began, view.now, 7).astype(np.int64)[:6].tolist()
    first = taken(view, everything[2])
    assert first["time_ps"].tolist() == everything[:2]
    assert taken(view, everything[2]).size == 0
    assert taken(view)["time_ps"].tolist() == everything[2:]


def test_in_a_fault_a_move_is_done_at_once(vm: Vm) -> None:
    view = vm.view
    view.move(view.on_node(0, PAGES, FAST, 20), SLOW, 0)
    taken(view)
    view.settle(PS_PER_S)
    pages = view.on_node(700, PAGES - 1000, SLOW, 3)
    old = view.frames(pages)
    vm.memory.stamps[old] = [101, 102, 103]
    free = view.free(FAST)
    view.faulting = pages
    assert view.move(pages, FAST, 0, sync=True).all()
    new = view.frames(pages)
    assert (new < PAGES).all()
    assert vm.memory.stamps[new].tolist() == [101, 102, 103]
    assert view.free(FAST) == free - 3
    assert taken(view).size == 0, "the VM waits: nothing can hold an old translation"
    # Slow read and fast write, which no hardware of the VM books.
    assert vm.take_traffic().tolist() == [0, 3 * 4096, 3 * 4096, 0]
    assert vm.take_traffic().tolist() == [0] * 4


def test_in_a_fault_what_is_mapped_moves_after_the_barrier(vm: Vm) -> None:
    """A ranking in the fault may move other pages than the one that faults, which TLBs hold."""
    view = vm.view
    pages = view.on_node(0, PAGES, FAST, 3)
    taken(view)
    view.faulting, view.barrier_ps = np.array([PAGES - 1]), view.now + PS_PER_S
    assert view.move(pages, SLOW, 0).all()
    view.faulting = pages[:0]
    assert taken(view, view.barrier_ps).size == 0, "the VM has the operations of this quantum"
    view.settle(view.barrier_ps)
    assert (view.nodes.flags[view.frames(pages)] & F_BUSY).all()
    found = taken(view, 2 * view.barrier_ps)
    assert found["kind"].tolist() == [OP_MOVE] * 3
    assert (found["time_ps"] >= view.barrier_ps).all()


def test_addresses_are_guest_physical(vm: Vm) -> None:
    assert vm.view.address_bounds() == (0, PAGES << PAGE_SHIFT)
    assert vm.view.page_range(1 << 21, 3 << 21) == (512, 1024)
    assert vm.view.page_range(3 << 21, 1 << 40) == (1536, PAGES - 1536)
    assert vm.view.page_range(1 << 40, 1 << 41) == (PAGES, 0)


def test_pages_of_isolated_frames_are_gpa_pages(vm: Vm) -> None:
    view = vm.view
    frames = view.isolate(FAST, INACTIVE, 4)
    # The list's tail is the oldest: the first pages that faulted.
    assert view.pages_of(frames).tolist() == [0, 1, 2, 3]
    nothing = np.zeros(4, np.bool_)
    view.put_back(frames, nothing, nothing)


def test_a_swap_trades_places_and_keeps_both_contents(costs: Costs) -> None:
    """Planned at one barrier, executed by the VM within the next quantum: each pair with a flush of its own."""
    config = small_guest(costs, "h-tpp", params={"scan_delay_ms": 600_000}, pages=PAGES, fast=512)
    fleet = new_fleet(config)
    until_populated(fleet)
    vm = fleet.host.vms[0]
    view, before = vm.view, vm.counters.copy()

    def idle(node: int) -> Words:
        """20 pages of a node that kswapd has no move under way for."""
        pages = view.on_node(0, PAGES, node, PAGES)
        return pages[(view.nodes.flags[view.frames(pages)] & F_BUSY) == 0][-20:]

    slow, fast = idle(SLOW), idle(FAST)
    vm.meter.now = fleet.guests[0].now
    assert view.exchange(slow, fast, batched=True) == 20
    assert view.exchange(slow, fast, batched=True) == 0, "they are busy"
    report = fleet.run().reports[0]
    assert report["integrity"]["mismatches"] == 0
    assert report["kvm"]["remote_tlb_flush_requests"] + report["populate"]["kvm"]["remote_tlb_flush_requests"] >= 20
    assert vm.counters[C.vmstat__pgexchange_success] - before[C.vmstat__pgexchange_success] == 20
    half = PAGES
    assert (view.frames(slow) < half).all() and (view.frames(fast) >= half).all()
    check_memory(fleet)
