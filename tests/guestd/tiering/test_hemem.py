"""HeMem: a poller that owns its core, lists that decide, and copies under write protection that writers wait for."""

import numpy as np
import pytest

from fleet.in_process import InProcessFleet
from guestd.mm.nodes import FAST, SLOW
from guestd.params import resolve
from guestd.pebs import P_PERIOD
from guestd.tiering.fifo_lists import FifoLists, Thresholds
from guestd.tiering.hemem import POLICY, PebsPoller, WriteProtect
from guestd.tiering.policy import FAST_MISS, SLOW_MISS, STORES
from guestd.tiering.stage import Staged
from guestd.vcpu import AGENT
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs, copy_ps
from proto.counters import C
from proto.entry import ENTRY_VERSION_SHIFT
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated, with_thp

PAGES = 8192
SLEEPS: dict[str, Scalar] = {"poll_period": 10_000_000, "policy_ms": 60_000}


class HandFed:
    """A populated guest whose samples come from the test, as do the loops of its policy thread."""

    def __init__(self, costs: Costs, thp: str = "never", vcpus: int = 1, **params: Scalar) -> None:
        config = small_guest(costs, "hemem", params=SLEEPS | params, fast=2048, run_ms=60, vcpus=vcpus)
        self.fleet: InProcessFleet = new_fleet(with_thp(config, thp, thp_defrag="always", khugepaged_pages_to_scan=0))
        self.guest = until_populated(self.fleet)
        self.view = self.guest.view
        tiering = self.guest.tiering
        assert isinstance(tiering, Staged)
        self.tiering = tiering
        assert isinstance(tiering.tracker, PebsPoller)
        assert isinstance(tiering.classifier, FifoLists)
        assert isinstance(tiering.migrator, WriteProtect)
        self.classifier, self.migrator = tiering.classifier, tiering.migrator

    def sample(self, pages: Words, times: int) -> None:
        rows = np.zeros((pages.size * times, 5), np.int64)
        rows[:, 0] = np.tile(self.guest.workload.space.gva(pages), times)
        self.tiering.on_samples(rows)
        self.tiering.on_timer("tracker.turn")

    def loop(self) -> None:
        """One loop of the policy thread, and all copies that it begins."""
        self.tiering.on_timer("classifier.policy")
        while self.migrator._moving is not None:
            self.tiering.on_timer("migrator.copied")

    def region(self, node: int, number: int = 0) -> Words:
        """Pages of a region that lies wholly on a node."""
        found = [
            first + np.arange(512)
            for first in range(0, self.view.pages, 512)
            if int(self.view.sizes(self.view.on_node(first, 512, node, 512)).sum()) == 512
        ]
        return found[number]


def test_both_published_sets(costs: Costs) -> None:
    assert resolve(POLICY.params, {})["constants"] == "sosp"
    for name, period, thresholds in (("sosp", 5003, Thresholds(8, 8, 18)), ("head", 19_997, Thresholds(4, 4, 10))):
        fleet = new_fleet(small_guest(costs, "hemem", params={"constants": name}))
        guest = fleet.guests[0]
        assert isinstance(guest.tiering, Staged) and isinstance(guest.tiering.classifier, FifoLists)
        assert guest.tiering.classifier.thresholds == thresholds
        periods = [int(guest.machine.ds.params[P_PERIOD + event]) for event in (FAST_MISS, SLOW_MISS, STORES)]
        assert periods == [period] * 3
        assert guest.tiering.by_definition == (("track",) if name == "sosp" else ("track", "classify"))
    assert [param.name for param in POLICY.params].count("constants") == 1


def test_it_finds_the_hot_set_and_beats_first_touch(costs: Costs) -> None:
    none = run_fleet(small_guest(costs, "none"))[0]
    ours = run_fleet(small_guest(costs, "hemem"))[0]
    assert ours["access"]["fast_ratio"] > 5 * none["access"]["fast_ratio"]
    assert ours["migration"]["promoted_pages"] > 0
    assert ours["vmstat"]["numa_hint_faults"] == 0
    assert ours["time"]["hint_fault_s"] > 0, "writers waited for copies"
    assert ours["agent_cpu"]["by_definition"] == ["track"]
    assert "by_definition" not in none["agent_cpu"]


# -- the poller -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "cores", "stolen"), [("shared", 0.5, 0.5), ("extra", 1.0, 0.0)])
def test_the_poller_takes_every_second_turn_of_its_vcpu_or_a_core(
    core: str, cores: float, stolen: float, costs: Costs
) -> None:
    fleet = new_fleet(small_guest(costs, "hemem", params=SLEEPS | {"poller_core": core}, run_ms=60))
    fleet.run()
    guest = fleet.guests[0]
    elapsed = guest.now - guest.booted_ps
    track = int(guest.meter.modelled_ps[:, 0].sum())
    assert track / elapsed == pytest.approx(cores, rel=0.1)
    agent = guest.machine.vcpus.ledger[:, AGENT]
    assert agent[1] / elapsed == pytest.approx(stolen, abs=0.05)
    assert agent[0] / elapsed < 0.01


def test_a_policy_thread_that_never_sleeps_takes_its_share_too(costs: Costs) -> None:
    cores = []
    for constants in ("sosp", "head"):
        report = run_fleet(small_guest(costs, "hemem", params={"constants": constants}, run_ms=40))[0]
        cores.append(report["agent_cpu"]["modelled_s"]["classify"] / report["virtual_s"])
    assert cores[0] < 0.05
    assert cores[1] == pytest.approx(0.5, rel=0.15)


def test_records_wait_in_the_ring_for_a_turn_and_a_full_one_loses_them(costs: Costs) -> None:
    fed = HandFed(costs, poll_ring_pages=1)
    fed.classifier.regions.counts[:] = fed.classifier.regions.clock[:] = 0
    rows = np.zeros((400, 5), np.int64)
    rows[:, 0] = fed.guest.workload.space.gva(fed.region(SLOW)[:1])
    rows[:200, 3] = 1 << STORES
    fed.classifier.thresholds = Thresholds(1000, 1000, 1000)
    fed.tiering.on_samples(rows)
    assert not fed.classifier.regions.counts.any()
    fed.tiering.on_timer("tracker.turn")
    counts = fed.classifier.regions.counts.sum(axis=0).tolist()
    assert counts == [0, 107, 200], "3 events, 4096 bytes each, records of 40"


# -- moves ------------------------------------------------------------------------------------------------------------


def test_a_hot_region_goes_up_whole_and_a_cold_one_makes_room(costs: Costs) -> None:
    fed = HandFed(costs)
    fed.loop()
    hot, first_in = fed.region(SLOW, 1), fed.view.on_node(0, 1024, FAST, 1024)
    assert 512 < first_in.size < 1024, "the first leaf table maps less than 2 MiB, so that two have to go"
    fed.sample(hot[5:6], 8)
    before, now = fed.view.counters.copy(), fed.view.now
    fed.loop()
    moved = fed.view.counters - before
    assert (fed.view.nodes_of(hot) == FAST).all()
    assert (fed.view.nodes_of(first_in) == SLOW).all(), "first in, first out"
    assert moved[C.vmstat__pgpromote_success] == 512
    assert moved[C.vmstat__pgdemote_kswapd] == first_in.size
    assert moved[C.vmstat__nr_tlb_local_flush_all] == 6, "one for the protection and one for the remap of each"
    assert moved[C.vmstat__nr_tlb_local_flush_one] == 0
    copies = 512 * copy_ps(costs, True, False) + first_in.size * copy_ps(costs, False, True)
    assert fed.view.now - now >= copies
    named = fed.classifier.hot_set()
    assert named is not None and np.array_equal(named, hot)
    check_memory(fed.fleet)
    migrated = int(fed.view.counters[C.bytes__migrated])
    fed.loop()
    assert fed.view.counters[C.bytes__migrated] == migrated, "the lists follow, so that there is nothing left to do"


def test_without_a_cold_region_nothing_goes_down(costs: Costs) -> None:
    fed = HandFed(costs)
    for number in range(3):
        fed.sample(fed.region(FAST, number)[:1], 8)
    slow = fed.view.on_node(0, fed.view.pages, SLOW, 400)
    fed.sample(slow[:1], 8)
    fed.loop()
    demoted = int(fed.view.counters[C.vmstat__pgdemote_kswapd])
    assert demoted < 512, "no more than a region of which only a part is fast"
    check_memory(fed.fleet)


def test_the_cap_of_a_loop_holds(costs: Costs) -> None:
    fed = HandFed(costs)
    fed.loop()
    for number in range(3):
        fed.sample(fed.region(SLOW, number)[:1], 8)
    first_in = fed.view.on_node(0, 1024, FAST, 1024)
    fed.migrator._left = 600
    fed.migrator._next()
    while fed.migrator._moving is not None:
        fed.tiering.on_timer("migrator.copied")
    assert fed.view.counters[C.bytes__migrated] == first_in.size * 4096, "two moves, then the cap is passed"


def test_copying_threads_share_the_work(costs: Costs) -> None:
    spent, modelled = [], []
    for threads in (1, 2):
        fed = HandFed(costs, vcpus=2, copy_threads=threads)
        now, before = fed.view.now, int(fed.view.meter.modelled_ps.sum())
        fed.view.flush.vcpu = 0
        lost = int(fed.guest.machine.vcpus.ledger[1, AGENT])
        fed.view.work_together(threads, PS_PER_MS)
        spent.append(fed.view.now - now)
        modelled.append(int(fed.view.meter.modelled_ps.sum()) - before)
        assert fed.guest.machine.vcpus.ledger[1, AGENT] - lost == (threads - 1) * PS_PER_MS // 2
    assert spent == [PS_PER_MS, PS_PER_MS // 2]
    assert modelled == [PS_PER_MS, PS_PER_MS]


@pytest.mark.parametrize("thp", ["never", "always"])
def test_writers_wait_until_the_copy_is_done_and_lose_nothing(thp: str, costs: Costs) -> None:
    fed = HandFed(costs, thp)
    view, gpt = fed.view, fed.guest.machine.gpt
    units = view.on_node(0, view.pages, FAST, 512)
    pages = units[0] + np.arange(512) if thp == "always" else units
    until = fed.guest.now + 25 * PS_PER_MS
    view.meter.now = fed.guest.now
    view.write_protect(units)
    fed.migrator._moving, fed.migrator._until = (units, SLOW), until
    fed.migrator.schedule("copied", until)
    versions, others = gpt[pages] >> ENTRY_VERSION_SHIFT, gpt >> ENTRY_VERSION_SHIFT
    waited = int(fed.guest.machine.vcpus.ledger[:, 3].sum())
    assert fed.fleet.step() and fed.fleet.step()
    assert fed.guest.now < until
    assert np.array_equal(gpt[pages] >> ENTRY_VERSION_SHIFT, versions), "no write got through"
    assert not np.array_equal(gpt >> ENTRY_VERSION_SHIFT, others), "until then others did"
    assert int(fed.guest.machine.vcpus.ledger[:, 3].sum()) - waited > 15 * PS_PER_MS
    assert fed.fleet.step()
    assert (view.nodes_of(pages) == SLOW).all()
    check_memory(fed.fleet)
    while fed.fleet.step():
        pass
    assert not np.array_equal(gpt[pages] >> ENTRY_VERSION_SHIFT, versions), "now they do"
    assert fed.fleet.host.failures == []
    assert fed.fleet.host.reports[0]["integrity"]["mismatches"] == 0
    assert fed.fleet.host.reports[0]["virtual_s"] == pytest.approx(60 * PS_PER_MS / PS_PER_S)
