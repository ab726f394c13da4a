"""HeteroVisor's rules (VEE'15): A bits of the guest's page table, one full flush a scan, LRU order, remaps."""

from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet, private_memory
from guestd.fault import table_frames
from guestd.mm.nodes import FAST, SLOW, WMARK_HIGH
from guestd.tiering import heterovisor
from guestd.tiering.heterovisor import POLICY, LastUse
from guestd.tiering.stage import Evidence, Staged
from hostd.vm import Vm
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.layout import OP_MOVE, OP_WALK_GPT, OPERATION, W_VISITED, W_YOUNG
from proto.units import PS_PER_MS, TABLE_PAGES
from tests.small_fleet import check_memory, new_fleet, small_guest, small_host, until_populated

PAGES = 2048
BOOK = np.zeros(6, np.int64)


@given(rounds=st.lists(st.lists(st.integers(0, 15), max_size=8, unique=True), max_size=12), since=st.integers(0, 13))
def test_the_order_is_that_of_plain_python(rounds: list[list[int]], since: int) -> None:
    order, plain, used, out = heterovisor.new_order(16), list[int](), dict[int, int](), np.empty(16, np.int64)
    for scan, pages in enumerate(rounds, 1):
        heterovisor.use(BOOK, order, np.array(pages, np.int64), scan)
        for page in pages:
            if page in plain:
                plain.remove(page)
            plain.insert(0, page)
            used[page] = scan
        recent = out[: heterovisor.used_since(BOOK, order, since, out)].tolist()
        assert recent == [page for page in plain if used[page] >= since]
        old = out[: heterovisor.unused_since(BOOK, order, since, out)].tolist()
        assert old == [page for page in plain[::-1] if used[page] < since]


class Managed:
    """A VM of the host under heterovisor, all but 200 of its pages backed."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        config = small_guest(costs, "heterovisor", params=params, pages=PAGES, fast=400)
        self.vm = Vm(config, POLICY, private_memory(config))
        self.vm.ept_fault(0, np.arange(PAGES - 200))
        assert isinstance(self.vm.tiering, Staged) and isinstance(self.vm.tiering.classifier, LastUse)
        self.classifier, self.view = self.vm.tiering.classifier, self.vm.view

    def saw(self, pages: Words, visited: int = 0) -> None:
        """What a walk in the quantum before would have handed over."""
        for page in pages:
            self.vm.memory.walk[W_YOUNG, page >> 6] |= np.int64(np.uint64(1 << int(page & 63)).view(np.int64))
        self.vm.memory.walk[W_VISITED, 0] += visited

    def to(self, start_ms: int, end_ms: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return np.frombuffer(self.vm.prepare(start_ms * PS_PER_MS, end_ms * PS_PER_MS), OPERATION)

    def pages(self, node: int, count: int) -> Words:
        return self.view.on_node(0, PAGES, node, count)


def test_a_scan_is_asked_for_each_period_and_read_at_the_barrier_after_it(costs: Costs) -> None:
    managed = Managed(costs)
    assert managed.to(0, 100).size == 0
    (walk,) = managed.to(100, 104)
    assert (walk["kind"], walk["time_ps"], walk["flags"]) == (OP_WALK_GPT, 100 * PS_PER_MS, 0)
    fast = managed.pages(FAST, 3)
    managed.saw(fast, visited=5000)
    before = int(managed.vm.meter.modelled_ps[:, 0].sum())
    assert managed.to(104, 108).size == 0
    assert int(managed.vm.meter.modelled_ps[:, 0].sum()) - before == 5000 * costs.scan_pte_ps
    hot = managed.classifier.hot_set()
    assert hot is not None and hot.tolist() == fast.tolist()
    assert not managed.vm.memory.walk.any()
    assert managed.to(108, 204)["kind"].tolist() == [OP_WALK_GPT], "the period is from scan to scan"


def test_the_latest_used_take_free_frames_and_the_oldest_make_room(costs: Costs) -> None:
    managed = Managed(costs, batch_pages=40)
    view, classifier = managed.view, managed.classifier
    fast, slow = managed.pages(FAST, PAGES), managed.pages(SLOW, PAGES)
    view.take_operations(1 << 60)
    classifier.observe(Evidence(view, pages=fast[:10]))
    classifier.end_of_round()
    classifier.observe(Evidence(view, pages=fast[10:]))
    classifier.end_of_round()
    room = view.free(FAST) - view.watermark(FAST, WMARK_HIGH)
    before = view.counters.copy()
    classifier.observe(Evidence(view, pages=np.concatenate([fast[100:], slow[:60]])))
    classifier.end_of_round()
    delta = view.counters - before
    assert delta[C.vmstat__pgpromote_success] == min(max(room, 0), 40)
    assert delta[C.vmstat__pgdemote_kswapd] == 40 - max(room, 0)
    gone = fast[view.nodes_of(fast) == SLOW]
    assert gone.tolist() == fast[: gone.size].tolist(), "the ones not used for longest, in their order"
    moves = np.frombuffer(view.take_operations(1 << 60), OPERATION)
    assert (moves["kind"] == OP_MOVE).all() and moves.size == 40


def test_what_the_last_round_found_gives_way_to_nothing(costs: Costs) -> None:
    managed = Managed(costs)
    classifier = managed.classifier
    everything = np.arange(PAGES - 200)
    for _ in range(2):
        classifier.observe(Evidence(managed.view, pages=everything))
        classifier.end_of_round()
    assert classifier.demotions(1000).size == 0


def test_the_walk_finds_the_pages_that_the_guest_accessed(costs: Costs) -> None:
    """The bits that the host gets are those of the gPA pages that a running guest touched, tables not among them."""
    fleet = new_fleet(small_guest(costs, "heterovisor", params={"gpt_scan_ms": 600_000}, run_ms=40))
    guest = until_populated(fleet)
    vm = fleet.host.vms[0]
    vm.view.meter.now = max(vm.view.now, vm.until_ps)
    vm.view.request_guest_walk()
    while vm.view.operations or not vm.memory.walk[W_VISITED, 0]:
        assert fleet.step()
    visited = int(vm.memory.walk[W_VISITED, 0])
    before = vm.view.now
    found = vm.view.accessed_in_guest()
    assert vm.view.now - before == visited * costs.scan_pte_ps
    assert visited == (1 + TABLE_PAGES) * (visited // (1 + TABLE_PAGES))
    heat = guest.workload.heat()
    assert heat is not None
    assert found.size == np.count_nonzero(heat), "populating touched each page"
    assert not np.isin(found, table_frames(guest.machine.tables)).any()
    check_memory(fleet)


def run(costs: Costs, policy: str, params: dict[str, Scalar]) -> dict[str, Any]:
    guest = small_guest(costs, policy, params=params, run_ms=60)
    guest = msgspec.structs.replace(guest, engine=msgspec.structs.replace(guest.engine, quantum_ps=4 * PS_PER_MS))
    core = InProcessFleet(msgspec.structs.replace(small_host(costs), engine=guest.engine), [guest]).run()
    assert core.failures == []
    return core.reports[0]


def test_it_finds_the_hot_set_at_the_price_of_full_flushes(costs: Costs) -> None:
    none, found = run(costs, "none", {}), run(costs, "heterovisor", {"gpt_scan_ms": 4})
    assert found["integrity"]["mismatches"] == 0
    assert found["access"]["fast_ratio"] > 10 * none["access"]["fast_ratio"]
    assert found["transactions"] > 2 * none["transactions"]
    assert found["kvm"]["mmu_zapped"] > 300
    scans = found["kvm"]["remote_tlb_flush_requests"] - found["kvm"]["mmu_zapped"]
    assert 10 <= scans <= 16, "one flush a scan, one a page that a move zapped"
    assert found["vmstat"]["nr_tlb_local_flush_one"] == found["vmstat"]["nr_tlb_local_flush_all"] == 0
