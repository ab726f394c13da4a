"""One VM in the host: EPT violations are served from its share, and a host-side design works for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import private_memory
from guestd.mm.kswapd import SWAP_CLUSTER_MAX
from guestd.mm.nodes import FAST, SLOW, WMARK_DEMOTE, WMARK_LOW, WMARK_MIN
from guestd.tiering.registry import policies
from guestd.tiering.tpp import MAX_SCAN_WINDOW_MB, THROTTLE
from hostd.errors import RefusedMessage
from hostd.vm import Vm
from proto.arrays import Words
from proto.config import HostKernel, Scalar, launch_ps
from proto.costs import Costs
from proto.counters import C, new_counters
from proto.entry import ACCESSED, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, WRITABLE
from proto.layout import OP_FLUSH, OP_MOVE, OP_ZAP, OPERATION
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import new_fleet, small_guest

PAGES = 1024
FAST_PAGES = 256


def new_vm(costs: Costs, policy: str = "none", *, start_ms: int = 0) -> Vm:
    params = {**policies()[policy].warm_up, **({"adapt_scan_period": False} if policy == "h-tpp" else {})}
    config = small_guest(costs, policy, params=params, pages=PAGES, fast=FAST_PAGES, start_ms=start_ms)
    return Vm(config, policies()[policy], private_memory(config))


def slots(vm: Vm, gpfns: Words) -> Words:
    return (vm.memory.ept[gpfns] & FRAME_MASK) >> FRAME_SHIFT


def test_each_guest_node_is_backed_by_its_own_tier(costs: Costs) -> None:
    vm = new_vm(costs)
    gpfns = np.concatenate([np.arange(FAST_PAGES), PAGES + np.arange(PAGES - FAST_PAGES)])
    cost = vm.ept_fault(0, gpfns)
    assert (cost == costs.ept_violation_alloc_ps).all()
    assert (slots(vm, gpfns) < PAGES).tolist() == (gpfns < PAGES).tolist()
    assert np.unique(slots(vm, gpfns)).size == gpfns.size
    assert vm.used() == (FAST_PAGES, PAGES - FAST_PAGES)
    assert ((vm.memory.ept[gpfns] & (PRESENT | WRITABLE)) == (PRESENT | WRITABLE)).all()


def test_a_flat_guest_gets_fast_frames_down_to_the_watermarks_then_slow_ones(costs: Costs) -> None:
    vm = new_vm(costs, "h-tpp")
    marks = vm.nodes.watermark
    above_low = FAST_PAGES - int(marks[FAST, WMARK_LOW])
    slow_above_low = PAGES - FAST_PAGES - int(marks[SLOW, WMARK_LOW])
    gpfns = np.arange(PAGES)
    vm.ept_fault(0, gpfns)
    fast = slots(vm, gpfns) < PAGES
    assert fast[:above_low].all()
    assert not fast[above_low : above_low + slow_above_low].any()
    # Then, on both nodes, down to the minimum watermark, and last the reserve below it.
    to_min = int(marks[FAST, WMARK_LOW] - marks[FAST, WMARK_MIN])
    assert fast[above_low + slow_above_low :][:to_min].all()
    assert vm.used() == (FAST_PAGES, PAGES - FAST_PAGES)


@given(data=st.data())
@pytest.mark.parametrize("policy", ["none", "h-tpp"])
def test_a_refused_fault_changes_nothing(policy: str, data: st.DataObject, costs: Costs) -> None:
    vm, twin = new_vm(costs, policy), new_vm(costs, policy)
    limit = PAGES if vm.flat else 2 * PAGES
    backed = np.array(data.draw(st.lists(st.integers(0, FAST_PAGES - 1), unique=True)), np.int64)
    for each in (vm, twin):
        each.ept_fault(0, backed)
        each.memory.ept[backed[::2]] &= ~PRESENT
    bad = data.draw(
        st.sampled_from([
            [0, limit], [0, -1], [1 << 62], [5, 700 % limit, 5],
            list(range(limit)) if not vm.flat else [*range(limit), limit - 1],
        ])
    )  # fmt: skip
    with pytest.raises(RefusedMessage):
        vm.ept_fault(0, np.array(bad, np.int64))
    assert np.array_equal(vm.memory.ept, twin.memory.ept)
    assert vm.used() == twin.used()
    mine, other = ({**nodes._asdict(), **nodes.free._asdict()} for nodes in (vm.nodes, twin.nodes))
    for name in mine.keys() - {"free"}:
        assert np.array_equal(mine[name], other[name]), name


def test_a_share_that_is_used_up_stays_used_up_and_names_the_reason(costs: Costs) -> None:
    vm = new_vm(costs)
    vm.ept_fault(0, np.arange(FAST_PAGES))
    with pytest.raises(RefusedMessage, match="share"):
        vm.ept_fault(0, np.array([FAST_PAGES], np.int64))
    assert vm.ept_fault(0, np.array([PAGES], np.int64)).tolist() == [costs.ept_violation_alloc_ps]


def test_a_zapped_page_comes_back_at_the_price_of_a_violation(costs: Costs) -> None:
    vm = new_vm(costs)
    gpfns = np.arange(8)
    vm.ept_fault(0, gpfns)
    before = slots(vm, gpfns).copy()
    vm.memory.ept[gpfns] &= ~PRESENT
    assert vm.ept_fault(0, gpfns).tolist() == [costs.ept_violation_ps] * 8
    assert np.array_equal(slots(vm, gpfns), before)
    assert (vm.memory.ept[gpfns] & PRESENT).all()
    assert vm.used() == (8, 0)


@pytest.mark.parametrize("policy", ["none", "h-tpp"])
def test_a_populated_vm_has_all_its_memory_before_it_runs(policy: str, costs: Costs) -> None:
    config = small_guest(costs, policy, pages=PAGES, fast=FAST_PAGES, host=HostKernel(populate=True))
    vm = Vm(config, policies()[policy], private_memory(config))
    assert vm.used() == (FAST_PAGES, PAGES - FAST_PAGES)
    assert vm.pinned_pages == vm.backed_pages == PAGES
    gpfns = np.flatnonzero(vm.memory.ept & PRESENT)
    expected = np.arange(PAGES) if vm.flat else np.r_[0:FAST_PAGES, PAGES : 2 * PAGES - FAST_PAGES]
    assert gpfns.tolist() == expected.tolist(), "the frames that the guest's kernel has"
    assert np.unique(slots(vm, gpfns)).size == PAGES
    assert vm.touched() == 0
    assert launch_ps(config) == config.start_ps + PAGES * costs.populate_page_ps
    lazy = new_vm(costs, policy)
    assert (sum(lazy.used()), lazy.pinned_pages, launch_ps(lazy.config)) == (0, 0, lazy.config.start_ps)


def test_the_price_of_populating_is_told(costs: Costs) -> None:
    """A guest that uses a quarter of its memory: what the host had to back, and when the guest began."""
    half: dict[str, Scalar] = {"footprint": 0.25}
    told = {}
    for populate in (False, True):
        host = HostKernel(populate=populate)
        fleet = new_fleet(small_guest(costs, pages=PAGES, fast=FAST_PAGES, workload=half, host=host))
        core = fleet.run()
        told[populate] = (core.reports[0], core.host_report({"total_s": 0.0, "by_vm": {}})["overcommit"])
    (lazy, roomy), (full, tight) = told[False], told[True]
    touched = lazy["memory"]["touched_bytes"]
    assert touched == lazy["memory"]["backed_bytes"] == full["memory"]["touched_bytes"]
    assert 256 * 4096 <= touched <= 260 * 4096
    assert full["memory"]["backed_bytes"] == full["memory"]["pinned_bytes"] == PAGES * 4096
    assert lazy["memory"]["pinned_bytes"] == 0
    assert (tight["ratio"], roomy["ratio"]) == (1.0, PAGES * 4096 / touched)
    assert tight["promised_bytes"] == roomy["promised_bytes"] == PAGES * 4096
    assert (tight["pinned_bytes"], tight["touched_bytes"]) == (PAGES * 4096, touched)
    waited = full["populate_virtual_s"] - lazy["populate_virtual_s"]
    saved = touched // 4096 * (costs.ept_violation_alloc_ps) / 2 / 1e12
    launch = PAGES * costs.populate_page_ps / 1e12
    assert launch - 2 * saved < waited < launch
    assert full["populate"]["kvm"]["exits"]["ept_violation"] == 0 < lazy["populate"]["kvm"]["exits"]["ept_violation"]


def operations(payload: bytes) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.frombuffer(payload, OPERATION)


def test_a_guest_that_manages_itself_gets_no_operations(costs: Costs) -> None:
    vm = new_vm(costs, "g-tpp")
    vm.ept_fault(0, np.arange(FAST_PAGES))
    assert vm.prepare(0, 100 * PS_PER_MS) == b""


def test_the_scanner_zaps_on_its_period_within_the_quantum(costs: Costs) -> None:
    vm = new_vm(costs, "h-tpp")
    vm.ept_fault(0, np.arange(PAGES // 2))
    found = operations(vm.prepare(0, 5 * PS_PER_MS))
    zaps = found[found["kind"] == OP_ZAP]
    # First at 0, then as often as the bound of the scan rate allows; a pass is followed by 32 times its own time.
    request = costs.kick_base_ps + costs.kick_target_ps * vm.config.vcpus
    entries = PAGES // 2 + PAGES // 512
    period = max(
        PS_PER_S // (MAX_SCAN_WINDOW_MB // 4),
        THROTTLE * ((costs.protect_pte_ps + costs.zap_pte_ps) * entries + request),
    )
    assert zaps["time_ps"].tolist() == list(range(0, 5 * PS_PER_MS, period))
    assert zaps.size > 1
    assert (zaps["flags"] == PROTNONE).all()
    assert (zaps["a"] == 0).all()
    assert (zaps["b"] == PAGES).all()
    assert vm.counters[C.vmstat__numa_pte_updates] > 0


def test_kswapd_moves_no_more_than_the_watermark_asks_for(costs: Costs) -> None:
    vm = new_vm(costs, "h-tpp")
    vm.ept_fault(0, np.arange(PAGES - 200))
    mark = int(vm.nodes.watermark[FAST, WMARK_DEMOTE])
    short = mark - int(vm.nodes.free_count[FAST])
    assert short > 0
    end = 50 * PS_PER_MS
    found = operations(vm.prepare(0, end))
    moves = found[found["kind"] == OP_MOVE]
    moved = int(moves.size)
    assert moved == vm.counters[C.vmstat__pgdemote_kswapd]
    assert short <= moved < short + SWAP_CLUSTER_MAX, "it looks at the watermark once a batch"
    assert np.unique(moves["a"]).size == np.unique(moves["b"]).size == moved
    assert (moves["b"] >= PAGES).all()
    assert (np.diff(found["time_ps"]) >= 0).all()
    # The frames that they leave are free once the VM has come past them, not before.
    used = FAST_PAGES - mark + short
    assert vm.used()[FAST] == used
    vm.prepare(end, end + PS_PER_MS)
    assert vm.used()[FAST] == used - moved


def test_a_fault_finds_the_frames_that_moves_before_it_have_left(costs: Costs) -> None:
    vm = new_vm(costs, "h-tpp")
    vm.ept_fault(0, np.arange(PAGES - 200))
    found = operations(vm.prepare(0, 50 * PS_PER_MS))
    moves = found[found["kind"] == OP_MOVE]
    middle = moves.size // 2
    before = vm.used()
    vm.ept_fault(int(moves["time_ps"][middle]), np.array([0], np.int64))
    assert vm.used() == (before[FAST] - middle, before[SLOW])


def held_twice(costs: Costs) -> tuple[Vm, Words, Words]:
    """A VM of which all pages but 200 are backed and all other frames hold a copy ahead; those pages and frames."""
    vm = new_vm(costs, "h-tpp")
    vm.ept_fault(0, np.arange(PAGES - 200))
    held = [vm.view.copy_ahead(vm.view.on_node(0, PAGES, 1 - node, PAGES), node, 0) for node in (FAST, SLOW)]
    pages, frames = (np.concatenate(part) for part in zip(*held, strict=True))
    assert vm.nodes.free_count.sum() == 0
    assert pages.size == 200
    vm.view.take_operations(1 << 60)
    return vm, pages, frames.astype(np.int64)


def test_a_fault_that_finds_every_frame_held_twice_waits_for_the_barrier_that_has_one(costs: Costs) -> None:
    vm, pages, frames = held_twice(costs)
    late = np.array([PAGES - 1, PAGES - 7])
    both = np.concatenate([late, [3]])
    assert vm.ept_fault(0, both).tolist() == [costs.ept_violation_alloc_ps] * 2 + [costs.ept_violation_ps]
    assert vm.waiting.tolist() == sorted(both)
    vm.prepare(0, PS_PER_MS)
    assert not (vm.memory.ept[late] & PRESENT).any()
    # A switch leaves one frame: who waits gets it before tiering does.
    vm.view.switch(pages[:1], frames[:1].astype(np.int32), np.zeros(1, np.bool_))
    vm.prepare(vm.view.now + 1, vm.view.now + PS_PER_MS)
    assert vm.waiting.tolist() == sorted(both)
    assert np.flatnonzero(vm.memory.ept[late] & PRESENT).tolist() == [1]
    assert vm.nodes.free_count.sum() == 0
    vm.view.switch(pages[1:2], frames[1:2].astype(np.int32), np.zeros(1, np.bool_))
    vm.prepare(vm.view.now + 1, vm.view.now + PS_PER_MS)
    assert vm.waiting.size == 0
    assert (vm.memory.ept[both] & PRESENT).all()


def test_what_a_vm_reads_last_calls_off_the_moves_under_way(costs: Costs) -> None:
    vm, _, _ = held_twice(costs)
    vm.ept_fault(0, np.array([PAGES - 1]))
    vm.ept_fault(0, np.arange(PAGES - 200, PAGES), last=True)
    assert vm.waiting.size == 0
    assert (vm.memory.ept[:PAGES] & PRESENT).all()
    assert np.unique(slots(vm, np.arange(PAGES))).size == PAGES
    assert vm.nodes.free_count.sum() == 0
    assert vm.view.take_operations(1 << 60) == b""


def test_each_young_page_that_is_aged_costs_a_request_and_pages_that_are_not_cost_none(costs: Costs) -> None:
    vm = new_vm(costs, "h-tpp")
    gpfns = np.arange(PAGES - 200)
    vm.ept_fault(0, gpfns)
    vm.memory.ept[gpfns] |= ACCESSED
    found = operations(vm.prepare(0, 3 * PS_PER_MS))
    aged = gpfns.size - int((vm.memory.ept[gpfns] & ACCESSED != 0).sum())
    assert aged > 0
    assert (found["kind"] == OP_FLUSH).sum() == aged
    quiet = new_vm(costs, "h-tpp")
    quiet.ept_fault(0, gpfns)
    assert OP_FLUSH not in operations(quiet.prepare(0, 3 * PS_PER_MS))["kind"]


def test_the_more_vcpus_requests_kick_the_longer_the_host_thread_waits(costs: Costs) -> None:
    def last_move(kicks: int) -> int:
        vm = new_vm(costs, "h-tpp")
        vm.ept_fault(0, np.arange(PAGES - 200))
        heard = new_counters()
        heard[C.kvm__remote_tlb_flush_requests] = 10
        heard[C.exit__kick] = kicks
        vm.heard("run", heard)
        found = operations(vm.prepare(0, 50 * PS_PER_MS))
        return int(found[found["kind"] == OP_MOVE]["time_ps"].max())

    assert last_move(0) < last_move(10) < last_move(20)
    # What a guest says is no more than what its vCPUs could do.
    assert last_move(1 << 50) == last_move(20)
    assert last_move(-5) == last_move(0)


def test_a_tenant_that_starts_later_is_left_alone_until_then(costs: Costs) -> None:
    vm = new_vm(costs, "h-tpp", start_ms=20)
    assert vm.prepare(0, 10 * PS_PER_MS) == b""
    vm.ept_fault(0, np.arange(64))
    found = operations(vm.prepare(20 * PS_PER_MS, 30 * PS_PER_MS))
    assert int(found["time_ps"].min()) >= 20 * PS_PER_MS
