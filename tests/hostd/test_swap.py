"""Host swap: cold pages go, accessed ones get a second chance, and content comes back whole."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import private_memory
from guestd.fault import table_frames
from guestd.mm.nodes import F_BUSY, FAST, SLOW
from guestd.mm.page_alloc import is_free
from guestd.tiering.registry import policies
from hostd.swap import CLUSTER, Swap
from hostd.vm import Vm
from proto.config import HostKernel, Scalar
from proto.costs import Costs
from proto.entry import ACCESSED, FRAME_MASK, FRAME_SHIFT, PRESENT, WRITABLE
from proto.layout import OP_FLUSH, OP_ZAP, OPERATION
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import check_memory, new_fleet, small_guest, until_populated

PAGES = 1024
QUANTUM = 10 * PS_PER_MS
RATE = 40_000
"""400 pages a quantum; the thread has the time for it."""


def new_vm(costs: Costs, policy: str = "none", rate: int = RATE) -> tuple[Vm, Swap]:
    """All pages of the share backed (of a flat VM so many that kswapd rests), each with a content, none accessed."""
    params: dict[str, Scalar] = {"scan_delay_ms": 600_000} if policy == "h-tpp" else {}
    config = small_guest(costs, policy, params=params, pages=PAGES, fast=256, host=HostKernel(swap_pages_per_s=rate))
    vm = Vm(config, policies()[policy], private_memory(config))
    vm.ept_fault(0, np.arange(150) if vm.flat else np.concatenate([np.arange(256), PAGES + np.arange(PAGES - 256)]))
    backed = np.flatnonzero(vm.memory.ept)
    vm.memory.stamps[(vm.memory.ept[backed] & FRAME_MASK) >> FRAME_SHIFT] = 1000 + backed
    assert vm.swap is not None
    return vm, vm.swap


def operations(payload: bytes) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.frombuffer(payload, OPERATION)


def execute(vm: Vm, found: np.ndarray[tuple[int], np.dtype[np.void]]) -> None:
    """What the VM's hardware does with zaps."""
    for operation in found:
        if operation["kind"] == OP_ZAP:
            vm.memory.ept[operation["a"]] &= ~PRESENT


def test_what_is_accessed_is_spared_and_asks_for_a_flush(costs: Costs) -> None:
    vm, swap = new_vm(costs)
    hot = np.flatnonzero(vm.memory.ept)[:100]
    vm.memory.ept[hot] |= ACCESSED
    looked = -(-RATE * QUANTUM // PS_PER_S // CLUSTER) * CLUSTER
    found = operations(vm.prepare(0, QUANTUM))
    assert swap.scanned_pages == looked == 416, "clusters of 32, the last of them due before the end"
    assert (found["kind"] == OP_FLUSH).sum() == 100, "one for each young page"
    zapped = found[found["kind"] == OP_ZAP]["a"]
    assert zapped.size == looked - 100 and not np.isin(zapped, hot).any()
    assert not (vm.memory.ept[hot] & ACCESSED).any()
    assert (np.diff(found["time_ps"]) > 0).all() and found["time_ps"][-1] < QUANTUM
    gaps = np.diff(found["time_ps"])
    assert (gaps > QUANTUM // 40).sum() == looked // CLUSTER - 1, (
        "one cluster after the other, at the thread's own pace"
    )
    vm.prepare(QUANTUM, 2 * QUANTUM)
    vm.prepare(2 * QUANTUM, 3 * QUANTUM)
    assert swap.scanned_pages > 1200, "more than there are: the hand is round, and takes the first hundred"
    assert (vm.nodes.flags[(vm.memory.ept[hot] & FRAME_MASK) >> FRAME_SHIFT] & F_BUSY).all()


@pytest.mark.parametrize("policy", ["none", "h-tpp"])
def test_a_page_goes_out_with_its_content_and_comes_back_with_it(policy: str, costs: Costs) -> None:
    vm, swap = new_vm(costs, policy)
    used = sum(vm.used())
    found = operations(vm.prepare(0, QUANTUM))
    execute(vm, found)
    gone = found[found["kind"] == OP_ZAP]["a"]
    gone = gone[vm.memory.ept[gone] & PRESENT == 0]
    vm.prepare(QUANTUM, QUANTUM + 1)
    assert swap.out_pages == gone.size > 0
    assert sum(vm.used()) == used - gone.size
    assert not vm.memory.ept[gone].any()
    assert swap.away[gone].all() and (swap.content[gone] == 1000 + gone).all()
    assert vm.touched() == used
    assert vm.ept_fault(QUANTUM, gone).tolist() == [costs.swap_in_ps] * gone.size
    assert swap.in_pages == gone.size and not swap.away.any()
    assert (vm.memory.stamps[(vm.memory.ept[gone] & FRAME_MASK) >> FRAME_SHIFT] == 1000 + gone).all()
    assert sum(vm.used()) == used
    assert (vm.nodes.free_count >= 0).all()


def test_a_page_that_is_wanted_before_it_is_written_never_left(costs: Costs) -> None:
    vm, swap = new_vm(costs)
    found = operations(vm.prepare(0, QUANTUM))
    execute(vm, found)
    gone = found[found["kind"] == OP_ZAP]["a"]
    early = gone[:10]
    assert vm.ept_fault(QUANTUM // 2, early).tolist() == [costs.ept_violation_ps] * 10, "found in the swap cache"
    vm.prepare(QUANTUM, QUANTUM + 1)
    assert swap.out_pages == gone.size - 10
    assert (vm.memory.ept[early] & (PRESENT | WRITABLE) == PRESENT | WRITABLE).all()
    assert not (vm.nodes.flags & F_BUSY).any()


def test_a_thread_without_time_for_the_rate_makes_up_for_nothing(costs: Costs) -> None:
    vm, swap = new_vm(costs, rate=10_000_000)
    request = costs.kick_base_ps + costs.kick_target_ps * vm.config.vcpus
    each = costs.rmap_walk_ps + costs.scan_pte_ps + costs.swap_out_ps + costs.zap_pte_ps + request
    for quanta in range(1, 5):
        vm.memory.ept[vm.memory.ept != 0] |= PRESENT
        execute(vm, operations(vm.prepare((quanta - 1) * QUANTUM, quanta * QUANTUM)))
        assert quanta * QUANTUM // each <= swap.scanned_pages <= quanta * QUANTUM // each + CLUSTER
        vm.ept_fault(quanta * QUANTUM - 1, np.flatnonzero(swap.away))


@given(rate=st.integers(1, 100_000), quanta=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_the_rate_is_kept_over_any_quanta(rate: int, quanta: list[int], costs: Costs) -> None:
    vm, swap = new_vm(msgspec.structs.replace(costs, swap_out_ps=0, kick_base_ps=0, kick_target_ps=0), rate=rate)
    now = 0
    for ms in quanta:
        vm.memory.ept[vm.memory.ept != 0] |= ACCESSED
        vm.prepare(now, now + ms * PS_PER_MS)
        now += ms * PS_PER_MS
    assert 0 <= swap.scanned_pages - rate * now // PS_PER_S <= CLUSTER


@pytest.mark.parametrize("policy", ["none", "g-tpp", "h-tpp", "hyperplace"])
def test_content_survives_whatever_runs_above_it(policy: str, costs: Costs) -> None:
    """Whole guests: pages, page tables and PEBS buffers come and go, and each access finds what it left."""
    host = HostKernel(swap_pages_per_s=300_000)
    fleet = new_fleet(small_guest(costs, policy, pages=PAGES, fast=256, run_ms=60, host=host))
    until_populated(fleet)
    check_memory(fleet)
    guest = fleet.guests[0]
    report = fleet.run().reports[0]
    swap = report["swap"]
    assert report["integrity"]["mismatches"] == 0
    assert report["integrity"]["pages_checked"] == PAGES * 7 // 8
    assert swap["out_pages"] > 100 and swap["in_pages"] > 100
    vm = fleet.host.vms[0]
    assert vm.swap is not None
    # What stays away is what the guest's kernel has freed.
    left = np.flatnonzero(vm.swap.away)
    assert swap["out_pages"] == swap["in_pages"] + report["integrity"]["pages_brought_back"] + left.size
    assert is_free(guest.nodes.free, guest.nodes.page.size // 2)[left].all()
    tables = table_frames(guest.machine.tables)
    assert (guest.machine.ept[tables] & WRITABLE).all()
    assert vm.nodes.free_count[FAST] + vm.nodes.free_count[SLOW] == PAGES - sum(vm.used())


def test_a_lost_page_is_seen(costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs, pages=PAGES, fast=256, run_ms=60, host=HostKernel(swap_pages_per_s=300_000)))
    swap = fleet.host.vms[0].swap
    assert swap is not None
    while not swap.away.any():
        assert fleet.step()
    lost = np.flatnonzero(swap.away)[0]
    swap.content[lost] += 1
    assert fleet.run().reports[0]["integrity"]["mismatches"] > 0


def test_pinned_memory_is_never_swapped(costs: Costs) -> None:
    host = HostKernel(swap_pages_per_s=300_000, populate=True)
    fleet = new_fleet(small_guest(costs, pages=PAGES, fast=256, run_ms=30, host=host))
    report: dict[str, Any] = fleet.run().reports[0]
    assert "swap" not in report
    assert report["memory"]["pinned_bytes"] == report["memory"]["backed_bytes"] == PAGES * 4096
