"""RAMinate's rules (SoCC'16): queues by the logarithm of updates, sinking with time, victims, paused batches."""

from collections import deque

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet, private_memory
from guestd.mm.nodes import FAST, SLOW
from guestd.params import resolve
from guestd.tiering import raminate
from guestd.tiering.raminate import LEVELS, NOWHERE, POLICY, VICTIMS, CorkedMultiQueue
from guestd.tiering.registry import policies
from guestd.tiering.stage import Evidence, Staged
from hostd.vm import Vm
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import DIRTY
from proto.layout import OP_FLUSH, OP_PAUSE, OP_TRADE, OPERATION
from proto.units import PS_PER_MS
from tests.small_fleet import new_fleet, small_guest, small_host

PAGES = 2048
BOOK = np.zeros(6, np.int64)
MS = PS_PER_MS


class PlainQueues:
    """The same in plain Python: a queue is a deque, head first."""

    def __init__(self, pages: int) -> None:
        self.queues: list[deque[int]] = [deque() for _ in range(LEVELS + 1)]
        self.updates, self.since = [0] * pages, [0] * pages

    def leave(self, page: int) -> None:
        for queue in self.queues:
            if page in queue:
                queue.remove(page)

    def update(self, pages: list[int], now: int) -> None:
        for page in pages:
            self.updates[page] += 1
            self.leave(page)
            self.queues[min(LEVELS - 1, self.updates[page].bit_length() - 1)].append(page)
            self.since[page] = now

    def sink(self, now: int, life: int) -> list[int]:
        out = []
        for level in range(LEVELS):
            queue = self.queues[level]
            while queue and now - self.since[queue[0]] > life:
                page = queue.popleft()
                if level:
                    self.queues[level - 1].append(page)
                    self.since[page] = now
                else:
                    out.append(page)
        return out

    def retire(self, pages: list[int], fast: list[bool], now: int) -> None:
        for page, is_fast in zip(pages, fast, strict=True):
            if is_fast:
                self.queues[VICTIMS].append(page)
                self.since[page] = now
            else:
                self.updates[page] = 0

    def forget(self, pages: list[int]) -> None:
        for page in pages:
            self.leave(page)
            self.updates[page] = 0


steps = st.lists(
    st.tuples(st.sampled_from(["update", "sink", "forget"]), st.lists(st.integers(0, 11), max_size=8),
              st.integers(0, 6)),
    max_size=60,
)  # fmt: skip


@given(steps=steps, lowest=st.integers(0, LEVELS - 1))
def test_the_queues_are_those_of_plain_python(steps: list[tuple[str, list[int], int]], lowest: int) -> None:
    pages, now = 12, 0
    mine, plain, out = raminate.new_queues(pages), PlainQueues(pages), np.empty(pages, np.int64)
    for kind, named, passed in steps:
        now += passed
        if kind == "update":
            raminate.update(BOOK, mine, np.array(named, np.int64), now)
            plain.update(named, now)
        elif kind == "forget":
            raminate.forget(BOOK, mine, np.array(named, np.int64))
            plain.forget(named)
        else:
            left, visited = raminate.sink(BOOK, mine, now, 3, out)
            expected = plain.sink(now, 3)
            assert out[:left].tolist() == expected
            assert left <= visited
            fast = [page % 2 == 0 for page in expected]
            raminate.retire(BOOK, mine, out[:left].copy(), np.array(fast, np.bool_), now)
            plain.retire(expected, fast, now)
        top = []
        for level in range(LEVELS - 1, lowest - 1, -1):
            top += list(plain.queues[level])[::-1]
        assert out[: raminate.from_the_top(BOOK, mine, lowest, out)].tolist() == top
        assert out[: raminate.victims(BOOK, mine, out)].tolist() == list(plain.queues[VICTIMS])
        assert mine.updates.tolist() == plain.updates
        assert mine.size.tolist() == [len(queue) for queue in plain.queues]
        levels = [next((n for n, queue in enumerate(plain.queues) if page in queue), NOWHERE) for page in range(pages)]
        assert mine.level.tolist() == levels


class Managed:
    """A VM of the host under raminate, all but 200 of its pages backed, which the test runs quantum by quantum."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        config = small_guest(costs, "raminate", params=params, pages=PAGES, fast=400)
        self.vm = Vm(config, POLICY, private_memory(config))
        self.vm.ept_fault(0, np.arange(PAGES - 200))
        tiering = self.vm.tiering
        assert isinstance(tiering, Staged) and isinstance(tiering.classifier, CorkedMultiQueue)
        self.tiering, self.classifier, self.view = tiering, tiering.classifier, self.vm.view

    def write(self, pages: Words) -> None:
        self.vm.memory.ept[pages] |= DIRTY

    def to(self, start_ms: int, end_ms: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return np.frombuffer(self.vm.prepare(start_ms * MS, end_ms * MS), OPERATION)

    def pages(self, node: int, count: int) -> Words:
        return self.view.on_node(0, PAGES, node, count)


def test_a_scan_reads_and_clears_dirty_bits_and_asks_for_one_flush(costs: Costs) -> None:
    for flush in (True, False):
        managed = Managed(costs, flush_after_scan=flush)
        managed.write(np.array([3, 9, 900]))
        found = managed.to(0, 1001)
        assert found["kind"].tolist() == [OP_FLUSH] * flush
        assert not (managed.vm.memory.ept & DIRTY).any()
        assert np.flatnonzero(managed.classifier.queues.level == 0).tolist() == [3, 9, 900]
        assert managed.to(1001, 2001).size == 0, "nothing was written"


def test_a_page_of_fast_memory_is_a_victim_after_its_life_in_each_queue(costs: Costs) -> None:
    managed = Managed(costs)
    fast, slow = managed.pages(FAST, 2), managed.pages(SLOW, 2)
    both = np.concatenate([fast, slow])
    for second in range(1, 5):
        managed.write(both)
        managed.to(1000 * (second - 1) + 1, 1000 * second + 1)
    levels = managed.classifier.queues.level
    assert (levels[both] == 2).all(), "four updates"
    for end in range(5, 30):
        managed.to(1000 * (end - 1) + 1, 1000 * end + 1)
        # More than 5 s old, by a look each second: 6 s a level, and the first level was entered at 4 s.
        expected = 2 - (end - 4) // 6
        if expected >= 0:
            assert (levels[both] == expected).all(), end
        else:
            assert (levels[fast] == VICTIMS).all() and (levels[slow] == NOWHERE).all()
    assert managed.classifier.queues.updates[slow].tolist() == [0, 0]
    assert np.array_equal(managed.classifier.demotions(1), fast[:1])
    assert np.array_equal(managed.classifier.demotions(100), fast)
    managed.write(fast[:1])
    managed.to(29_001, 30_001)
    assert np.array_equal(managed.classifier.demotions(100), fast[1:]), "it was written again"


def test_the_most_written_come_first_and_the_latest_of_them(costs: Costs) -> None:
    managed = Managed(costs)
    slow = managed.pages(SLOW, 6)
    classifier, view = managed.classifier, managed.view
    for pages in (slow, slow[1:3], slow[2:3], slow[2:3], slow[4:5]):
        classifier.observe(Evidence(view, pages=pages))
    assert classifier.promotions(100).tolist() == slow[[2, 4, 1, 5, 3, 0]].tolist()
    assert classifier.promotions(2).tolist() == slow[[2, 4]].tolist()
    ranked = classifier.hot_set()
    assert ranked is not None and int(ranked[0]) == slow[2]


def test_a_batch_is_one_pause_with_one_flush_and_nothing_is_zapped(costs: Costs) -> None:
    managed = Managed(costs, most_pairs=30)
    view = managed.view
    fast, slow = managed.pages(FAST, 50), managed.pages(SLOW, 50)
    raminate.retire(BOOK, managed.classifier.queues, fast, np.ones(50, np.bool_), 0)
    managed.classifier.observe(Evidence(view, pages=slow))
    before = view.now
    view.meter.now = before
    managed.tiering.on_timer("migrator.swap")
    found = np.frombuffer(view.take_operations(1 << 60), OPERATION)
    assert found["kind"].tolist() == [OP_PAUSE] + [OP_TRADE] * 30
    assert (found["time_ps"] == found["time_ps"][0]).all()
    request = costs.kick_base_ps + costs.kick_target_ps * view.vcpus
    copies = costs.copy_slow_fast_ps + costs.copy_fast_slow_ps + costs.copy_fast_fast_ps
    work = 30 * (copies + 2 * costs.zap_pte_ps) + request
    assert found["b"][0] == costs.vm_pause_ps + work
    assert int(view.meter.modelled_ps[:, 2].sum()) == work, "the thread waits while the VM stops"
    assert found["a"][1:].tolist() == slow[::-1][:30].tolist()
    assert found["b"][1:].tolist() == fast[:30].tolist()
    assert view.counters[C.vmstat__pgpromote_success] == view.counters[C.vmstat__pgexchange_success] == 30
    assert view.counters[C.bytes__migrated] == 60 * 4096


def test_without_a_pair_the_vm_runs_on(costs: Costs) -> None:
    managed = Managed(costs)
    managed.classifier.observe(Evidence(managed.view, pages=managed.pages(SLOW, 5)))
    managed.tiering.on_timer("migrator.swap")
    assert managed.view.take_operations(1 << 60) == b""


def test_the_parameters_are_the_paper_s() -> None:
    found = resolve(POLICY.params, {})
    assert (found["dirty_scan_ms"], found["life_ms"], found["sink_ms"]) == (1000, 5000, 1000)
    assert (found["swap_ms"], found["most_pairs"]) == (5000, 1000)
    assert policies()["raminate"].view == "host"


def test_it_finds_the_pages_that_are_written_most(costs: Costs) -> None:
    """At the published times' ratios, a thousand times faster, with a pause to match."""
    fast_costs = msgspec.structs.replace(costs, vm_pause_ps=costs.vm_pause_ps // 1000)
    params: dict[str, Scalar] = {
        "dirty_scan_ms": 1, "life_ms": 4, "sink_ms": 1, "swap_ms": 5, "lowest_level": 2, "most_pairs": 200,
    }  # fmt: skip
    reports = {}
    for policy, given_params in (("none", {}), ("raminate", params)):
        guest = small_guest(fast_costs, policy, params=given_params, run_ms=120)
        guest = msgspec.structs.replace(guest, engine=msgspec.structs.replace(guest.engine, quantum_ps=MS))
        host = msgspec.structs.replace(small_host(fast_costs), engine=guest.engine)
        core = InProcessFleet(host, [guest]).run()
        assert core.failures == []
        reports[policy] = core.reports[0]
    none, found = reports["none"], reports["raminate"]
    assert found["integrity"]["mismatches"] == 0
    assert found["access"]["fast_ratio"] > 5 * none["access"]["fast_ratio"]
    assert found["transactions"] > none["transactions"]
    moved = found["migration"]
    assert moved["swapped_pairs"] == moved["promoted_pages"] == moved["demoted_pages"] > 100
    pauses = found["kvm"]["exits"]["paused"]
    assert 0 < pauses <= 2 * 24
    # One flush a scan that found anything, one a batch, on each of two vCPUs.
    assert found["kvm"]["tlb_flush"] <= 2 * 120 + pauses
    assert found["kvm"]["remote_tlb_flush_requests"] <= 120 + pauses // 2
    assert found["kvm"]["mmu_zapped"] == found["kvm"]["exits"]["ept_violation"] == 0


def test_content_survives_pauses(costs: Costs) -> None:
    report = new_fleet(small_guest(costs, "raminate", run_ms=100)).run().reports[0]
    assert report["integrity"]["mismatches"] == 0
    assert report["migration"]["swapped_pairs"] > 0
    assert report["vcpu_time"][0]["paused_ps"] > 0
