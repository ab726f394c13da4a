"""HyperPlace: what it gains, and that every parameter that departs from the paper changes what it says."""

from typing import Any

import numpy as np
import pytest

from fleet.in_process import InProcessFleet
from guestd.mm.nodes import FAST, SLOW, WMARK_HIGH
from guestd.params import resolve
from guestd.tiering.hyperplace import POLICY, RangeRanking
from guestd.tiering.range_tree import COUNT, END, START
from guestd.tiering.stage import Staged
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.units import PAGE_SIZE
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated

PAGES = 4096
QUICK: dict[str, Scalar] = {"load_period": 31, "epoch_ms": 5, "tau_split": 2, "initial": "ram"}
"""As in the paper, but for periods and the initial ranges, which a small guest would take long to split down to."""
HAND_FED: dict[str, Scalar] = {"load_period": 10_000_000, "epoch_ms": 60_000, "tau_split": 2, "initial": "ram"}


def report(costs: Costs, **params: Scalar) -> dict[str, Any]:
    return run_fleet(small_guest(costs, "hyperplace", params=QUICK | params, run_ms=100))[0]


DOWN = 14
"""Epochs that are enough to split a GiB or two down to 2 MiB."""


class HandFed:
    """A populated guest whose tree gets its samples from the test."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        config = small_guest(costs, "hyperplace", params=HAND_FED | params, pages=PAGES, run_ms=10, vcpus=1)
        self.fleet: InProcessFleet = new_fleet(config)
        guest = until_populated(self.fleet)
        self.view: PageView = guest.view
        assert isinstance(guest.tiering, Staged)
        self.tiering = guest.tiering
        assert isinstance(guest.tiering.classifier, RangeRanking)
        self.tree = guest.tiering.classifier.tree
        self.space = guest.workload.space

    def sample(self, pages: Words, times: int) -> None:
        rows = np.zeros((pages.size * times, 5), np.int64)
        rows[:, 0] = np.tile(self.space.gva(pages), times) + 64
        self.tiering.on_samples(rows)

    def epochs(self, hot: Words, count: int = 1, times: int = 40) -> None:
        for _ in range(count):
            self.sample(hot, times)
            self.tiering.on_timer("classifier.epoch")

    def relocate_all(self) -> None:
        """Whatever the last epoch chose, batch after batch."""
        before = -1
        while before != self.view.counters[C.vmstat__pgexchange_success]:
            before = int(self.view.counters[C.vmstat__pgexchange_success])
            self.tiering.on_timer("migrator.relocate")

    def slow_end(self) -> Words:
        """64 slow pages of one 2 MiB range."""
        table = int(self.view.on_node(0, self.view.pages, SLOW, self.view.pages)[-1]) // 512 - 1
        return table * 512 + np.arange(64)

    def leaves(self) -> list[tuple[int, int, int]]:
        return [(int(leaf[START]), int(leaf[END]), int(leaf[COUNT])) for leaf in self.tree.leaves.T]


def test_it_finds_the_hot_set_and_beats_first_touch(costs: Costs) -> None:
    none = run_fleet(small_guest(costs, "none", run_ms=100))[0]
    ours = report(costs)
    assert ours["access"]["fast_ratio"] > 5 * none["access"]["fast_ratio"]
    assert ours["hotness"]["f1"] > none["hotness"]["f1"]
    assert ours["pebs"]["records"] > 0
    assert ours["pebs"]["pmi"] == 0, "records are drained at context switches, before the buffer is full"


def test_the_defaults_are_the_papers() -> None:
    found = resolve(POLICY.params, {})
    assert (found["load_period"], found["load_latency_ns"], found["store_period"]) == (4093, 64, 0)
    assert (found["epoch_ms"], found["tau_split"], found["alpha"], found["floor_mb"]) == (500, 15, 2, 2)
    assert (found["neighbours"], found["decay"], found["initial"]) == ("both", True, "space")
    assert (found["migrate_on"], found["swap"], found["fill_free"]) == ("epoch", "batched", False)


def test_a_swap_leaves_free_memory_as_it_was(costs: Costs) -> None:
    fed = HandFed(costs)
    free = (fed.view.free(FAST), fed.view.free(SLOW))
    hot = fed.slow_end()
    fed.epochs(hot, DOWN)
    fed.relocate_all()
    assert fed.view.counters[C.vmstat__pgexchange_success] > 0
    assert (fed.view.frames(hot) < PAGES).all()
    assert (fed.view.free(FAST), fed.view.free(SLOW)) == free
    check_memory(fed.fleet)


def test_free_fast_memory_is_used_only_if_told_to(costs: Costs) -> None:
    used = []
    for fill in (False, True):
        fed = HandFed(costs, fill_free=fill)
        fed.view.move(fed.view.on_node(0, fed.view.pages, FAST, 200), SLOW, 0)
        before = fed.view.free(FAST)
        fed.epochs(fed.slow_end(), DOWN)
        fed.relocate_all()
        used.append(before - fed.view.free(FAST))
        assert fed.view.free(FAST) >= fed.view.watermark(FAST, WMARK_HIGH)
    assert used[0] == 0
    assert used[1] > 0


def test_the_hottest_ranges_that_fit_fast_memory_are_wanted(costs: Costs) -> None:
    fed = HandFed(costs)
    fast = fed.view.on_node(0, fed.view.pages, FAST, PAGES)
    fed.epochs(fast[:64], DOWN)  # what is hot lies in fast memory already
    fed.relocate_all()
    assert (fed.view.frames(fast[:64]) < PAGES).all()


def test_samples_outside_the_ranges_change_nothing(costs: Costs) -> None:
    fed = HandFed(costs)
    rows = np.zeros((50, 5), np.int64)
    rows[:, 0] = PAGE_SIZE
    fed.tiering.on_samples(rows)
    assert not any(count for _, _, count in fed.leaves())


@pytest.mark.parametrize(("decay", "left"), [(True, 40), (False, 80)])
def test_counts_are_halved_every_epoch_unless_told_not_to(decay: bool, left: int, costs: Costs) -> None:
    fed = HandFed(costs, decay=decay)
    fed.sample(fed.slow_end()[:1], 80)
    fed.tiering.on_timer("classifier.epoch")
    assert sum(count for _, _, count in fed.leaves()) == left


def test_a_higher_unit_of_significance_or_margin_splits_less(costs: Costs) -> None:
    def splits(**params: Scalar) -> int:
        fed = HandFed(costs, initial="space", **params)
        fed.epochs(fed.slow_end(), 5, times=1)
        return fed.tree.used

    assert splits() > splits(tau_split=100) == 2
    assert splits() > splits(alpha=1000) == 2


def test_one_neighbour_is_enough_if_told_so(costs: Costs) -> None:
    def splits(neighbours: str) -> int:
        fed = HandFed(costs, initial="space", neighbours=neighbours)
        top = fed.slow_end()
        rows = np.zeros((400, 5), np.int64)
        rows[:200, 0] = 1 << 21  # the lower half of the space, as hot as the upper
        fed.epochs(top, 2, times=4)
        rows[200:, 0] = fed.space.gva(top[:1])
        for _ in range(3):
            fed.tiering.on_samples(rows)
            fed.tiering.on_timer("classifier.epoch")
        return fed.tree.used

    assert splits("one") > splits("both")


def test_idle_ranges_are_merged_unless_told_not_to(costs: Costs) -> None:
    used = []
    for merge_after in (2, 0):
        fed = HandFed(costs, initial="space", merge_after=merge_after)
        fed.epochs(fed.slow_end(), 8, times=2)
        grown = fed.tree.used
        for _ in range(12):
            fed.tiering.on_timer("classifier.epoch")
        used.append((grown, fed.tree.used))
    assert 2 <= used[0][1] < used[0][0]
    assert used[1][1] == used[1][0]


@pytest.mark.parametrize("floor_mb", [2, 4])
def test_no_range_is_smaller_than_the_floor(floor_mb: int, costs: Costs) -> None:
    fed = HandFed(costs, floor_mb=floor_mb)
    fed.epochs(fed.slow_end()[:1], 20, times=1000)
    assert min(end - start for start, end, _ in fed.leaves()) == floor_mb << 20


def test_the_initial_ranges_are_the_space_or_what_the_released_code_guesses(costs: Costs) -> None:
    space = HandFed(costs, initial="space")
    assert [leaf[:2] for leaf in space.leaves()] == [(0, 0x6AAA_AAA0_0000), (0x6AAA_AAA0_0000, 1 << 47)]
    ram = HandFed(costs)
    first, last = ram.view.address_bounds()
    starts, ends = [leaf[0] for leaf in ram.leaves()], [leaf[1] for leaf in ram.leaves()]
    assert min(starts) <= first
    assert max(ends) >= last
    assert all(bound % (1 << 30) == 0 for bound in starts + ends)


def test_relocation_may_wait_for_a_split_down_to_the_smallest_range(costs: Costs) -> None:
    moved = []
    for migrate_on in ("epoch", "split"):
        fed = HandFed(costs, migrate_on=migrate_on, initial="space")
        fed.epochs(fed.slow_end(), 4)
        moved.append(int(fed.view.counters[C.vmstat__pgexchange_success]))
        assert fed.tree.used > 2
    assert moved[1] == 0
    fed = HandFed(costs, migrate_on="split")
    fed.epochs(fed.slow_end(), 30, times=200)
    fed.relocate_all()
    assert fed.view.counters[C.vmstat__pgexchange_success] > 0


def test_a_batch_is_bounded_and_the_rest_follows(costs: Costs) -> None:
    fed = HandFed(costs, batch_pairs=10)
    fed.epochs(fed.slow_end(), DOWN)
    swapped = int(fed.view.counters[C.vmstat__pgexchange_success])
    assert 0 < swapped <= 10 * DOWN
    fed.tiering.on_timer("migrator.relocate")
    assert fed.view.counters[C.vmstat__pgexchange_success] == swapped + 10


def test_swaps_flush_once_per_batch_or_once_per_page(costs: Costs) -> None:
    batched, pairwise = report(costs), report(costs, swap="pairwise")
    assert batched["vmstat"]["nr_tlb_local_flush_one"] == 0
    assert batched["vmstat"]["nr_tlb_local_flush_all"] > 0
    pairs = pairwise["migration"]["swapped_pairs"]
    assert pairwise["vmstat"]["nr_tlb_local_flush_one"] == pairwise["vmstat"]["nr_tlb_remote_flush"] == 2 * pairs > 0
    assert pairwise["flushes"]["total"] > batched["flushes"]["total"]


def test_the_sampling_is_what_the_parameters_say(costs: Costs) -> None:
    def records(**params: Scalar) -> int:
        found = report(costs, epoch_ms=1000, **params)  # without migration, so that runs are alike
        return int(found["pebs"]["records"])

    per_load = []
    for period in (31, 4 * 31):
        found = report(costs, epoch_ms=1000, load_period=period)
        per_load.append(found["pebs"]["records"] / found["transactions"])
    assert per_load[0] / per_load[1] == pytest.approx(4, rel=0.01)
    assert records(load_latency_ns=65_535) == 0
    assert records(store_period=1000) > records()


def test_the_epoch_sets_the_pace(costs: Costs) -> None:
    assert report(costs, epoch_ms=1000)["migration"]["swapped_pairs"] == 0
    slower, faster = report(costs, epoch_ms=40), report(costs, epoch_ms=5)
    assert slower["agent_cpu"]["modelled_s"]["classify"] > 0
    assert faster["access"]["fast_ratio"] > slower["access"]["fast_ratio"]
