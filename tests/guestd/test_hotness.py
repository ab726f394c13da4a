"""Ground truth against definitions written out in Python."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.address_space import AddressSpace, Vma
from guestd.hotness import (
    Truth,
    compare,
    count_pages,
    mark_frames,
    mark_mapped,
    placement_by_heat,
    scores,
    true_hot_set,
)
from guestd.workloads.base import Buffer, Workload
from proto.arrays import Words
from proto.costs import Costs
from proto.counters import C, new_counters
from proto.entry import FRAME_SHIFT, HUGE, PRESENT
from tests.small_fleet import new_fleet, small_guest

HEATS = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@given(heats=HEATS, capacity=st.integers(-3, 70))
def test_placement_puts_the_hottest_in_fast_memory(heats: list[int], capacity: int) -> None:
    prefer = placement_by_heat(np.array(heats, np.int64), capacity)
    fast = [page for page in range(len(heats)) if prefer[page] == 0]
    ranked = sorted(range(len(heats)), key=lambda page: (-heats[page], page))
    assert fast == sorted(ranked[: max(0, capacity)])


class _Law(Workload):
    """A workload of so many pages whose heat does not change."""

    steady = True

    def __init__(self, heats: list[int]) -> None:
        self.space = AddressSpace([Vma("all", 1 << 30, len(heats))])
        self._heat = np.zeros(self.space.pages, np.int64)
        self._heat[: len(heats)] = heats

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        raise AssertionError("no access is made: the test counts them itself")

    def heat(self) -> Words:
        return self._heat


def _judged(heats: list[int], believed: set[int], capacity: int, accesses: int = 1000) -> dict[str, float]:
    """What `Truth` says of a policy that takes ``believed`` for hot."""
    counters = new_counters()
    truth = Truth(_Law(heats), capacity, counters)
    truth.begin()
    counters[C.access__total] += accesses
    truth.believed[list(believed)] = 1
    truth.judge()
    return scores(counters)


@given(heats=HEATS, data=st.data(), capacity=st.integers(1, 70))
def test_a_policy_is_asked_for_what_every_true_hot_set_has(
    heats: list[int], data: st.DataObject, capacity: int
) -> None:
    """Against the definition: the pages that all sets of the hottest that fit have, and the best of those sets."""
    believed = data.draw(st.sets(st.integers(0, len(heats) - 1)))
    result = _judged(heats, believed, capacity)
    touched = [page for page, heat in enumerate(heats) if heat]
    if not touched:
        assert result == {}
        return
    size = min(capacity, len(touched))
    best = sorted((heats[page] for page in touched), reverse=True)[:size]
    spare = size < len(touched)

    def in_some(page: int) -> bool:
        return heats[page] >= best[-1]

    sure = {page for page in touched if heats[page] > best[-1]}
    if not spare or sum(heats[page] == best[-1] for page in touched) == best.count(best[-1]):
        sure = {page for page in touched if in_some(page)}
    even = {page for page in touched if in_some(page)} - sure
    allowed = min(len(even & believed), size - len(sure))
    right = len(sure & believed) + allowed
    found = len(sure & believed) / len(sure) if sure else allowed / size
    assert result["precision"] == pytest.approx(right / len(believed) if believed else 0)
    assert result["recall"] == pytest.approx(found)
    assert result["oracle_fast_ratio"] == 1000 * sum(best) // sum(heats) / 1000
    assert 0 <= result["f1"] <= max(result["precision"], result["recall"]) <= 1


@given(heats=HEATS, capacity=st.integers(1, 70))
def test_any_ideal_placement_is_faultless(heats: list[int], capacity: int) -> None:
    if any(heats):
        prefer = placement_by_heat(np.array(heats), capacity)
        ideal = {page for page in range(len(heats)) if prefer[page] == 0 and heats[page]}
        result = _judged(heats, ideal, capacity)
        assert (result["precision"], result["recall"], result["f1"]) == (1, 1, 1)


@given(heats=HEATS, less=st.integers(1, 70), more=st.integers(1, 70))
def test_more_fast_memory_serves_no_less(heats: list[int], less: int, more: int) -> None:
    heat = np.array(heats, np.int64)
    small, large = true_hot_set(heat, min(less, more)), true_hot_set(heat, max(less, more))
    assert small.accesses <= large.accesses <= large.total == sum(heats)
    assert true_hot_set(heat, len(heats)).accesses == sum(heats), "all of it is all-fast"


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=60), st.integers(0, 60),
       st.integers(-1, 60))  # fmt: skip
def test_the_comparison_counts_as_python_does(pages: list[tuple[int, bool]], cut: int, tied: int) -> None:
    found = np.zeros(3, np.int64)
    heat, believed = np.array([heat for heat, _ in pages]), np.array([held for _, held in pages], np.uint8)
    compare(heat, believed, cut, tied, found)
    held = [heat for heat, held in pages if held]
    hot = [heat for heat in held if heat >= cut]
    assert found.tolist() == [len(held), len(hot), sum(heat == tied and heat < cut for heat in held)]


@given(st.lists(st.integers(0, (20 << 12) - 1), min_size=1, max_size=99), st.data())
def test_accesses_are_counted_at_their_pages(addresses: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(addresses)))
    end = data.draw(st.integers(start, len(addresses)))
    heat = np.zeros(20, np.int64)
    count_pages(np.array(addresses), start, end, heat)
    assert heat.tolist() == np.bincount([a >> 12 for a in addresses[start:end]], minlength=20).tolist()


@given(
    st.lists(st.integers(-1, 127), min_size=1, max_size=40), st.sets(st.integers(0, 127)), st.sets(st.integers(0, 39))
)
def test_hot_sets_of_either_view_name_pages_of_the_guest(frames: list[int], hot: set[int], pages: set[int]) -> None:
    gpt = np.array([0 if frame < 0 else frame << FRAME_SHIFT | PRESENT for frame in frames], np.int64)
    believed = np.ones(gpt.size, np.uint8)
    words = [sum(1 << bit - 64 * word for bit in hot if bit // 64 == word) for word in (0, 1)]
    mark_frames(gpt, np.array(words, np.uint64).view(np.int64), believed)
    assert believed.tolist() == [int(frame in hot) for frame in frames]
    believed[:] = 0
    named = np.array(sorted(page for page in pages if page < gpt.size), np.int64)
    mark_mapped(gpt, np.zeros(1, np.int64), named, believed)
    assert np.flatnonzero(believed).tolist() == [page for page in named if frames[page] >= 0]


def test_the_head_of_a_huge_page_names_all_of_it() -> None:
    gpt, believed = np.full(3 * 512, PRESENT, np.int64), np.zeros(3 * 512, np.uint8)
    mark_mapped(gpt, np.array([PRESENT, PRESENT | HUGE, PRESENT], np.int64), np.array([0, 7, 512, 1024]), believed)
    assert np.flatnonzero(believed).tolist() == [0, 7, *range(512, 1024), 1024]


def test_an_interval_without_accesses_is_not_judged() -> None:
    assert _judged([1, 2], {0}, 1, accesses=0) == {}


@pytest.mark.parametrize("workload", ["gups", "scan", "btree", "silo", "pagerank", "bfs"])
def test_the_counted_truth_is_every_access_of_the_run(workload: str, costs: Costs) -> None:
    """Nothing placed within an interval beats what is counted, and each access of the run phase is in one interval."""
    config = msgspec.structs.replace(small_guest(costs, "none", run_ms=30), workload=workload)
    fleet = new_fleet(config)
    guest = fleet.guests[0]
    guest.workload.steady = False
    host = fleet.run()
    counters = guest.machine.counters
    report = host.reports[0]
    assert counters[C.truth__accesses] == report["access"]["total"]
    assert counters[C.truth__fast] == report["access"]["fast"]
    assert 0 < report["hotness"]["share_of_oracle"] <= 1
    assert report["hotness"]["hot_set"] == "fast node"
