"""Where first touch puts pages: what comes first by type, in order of address, as far as fast memory goes."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.address_space import AddressSpace, heap_region, mmap_regions
from guestd.mm.nodes import FAST
from guestd.placement import by_type, preferred
from guestd.tiering.registry import policies
from guestd.workloads.gups import Gups
from proto.costs import Costs
from proto.entry import FRAME_MASK, FRAME_SHIFT
from tests.small_fleet import new_fleet, small_guest, until_populated


@given(
    seed=st.integers(0, 1000), heap=st.integers(1, 2000), mapped=st.lists(st.integers(1, 2000), min_size=1, max_size=3)
)
def test_a_heap_is_worth_more_than_what_is_mapped(seed: int, heap: int, mapped: list[int]) -> None:
    regions = mmap_regions([(f"m{i}", pages) for i, pages in enumerate(mapped)], seed)
    space = AddressSpace([heap_region("heap", heap, seed), *regions])
    worth = by_type(space)
    first = space.first_page("heap")
    assert (worth[first : first + heap] == 2).all() and np.count_nonzero(worth == 2) == heap
    assert np.count_nonzero(worth == 1) == sum(mapped)
    for vma in regions:
        assert (worth[space.first_page(vma.name) :][: vma.pages] == 1).all()


@pytest.mark.parametrize("huge", [False, True])
def test_only_what_fits_is_preferred_fast(huge: bool, costs: Costs) -> None:
    workload = Gups(small_guest(costs))
    capacity = 1100
    prefer = preferred(policies()["heteroos"], workload, capacity, huge)
    fast = np.flatnonzero(prefer == FAST)
    first = workload.first_page // 512 * 512 if huge else workload.first_page
    unit = 512 if huge else 1
    assert fast.size == capacity // unit * unit
    if not huge:
        assert np.array_equal(fast, first + np.arange(fast.size))
    assert preferred(policies()["none"], workload, capacity, huge).size == 0


def test_a_heap_that_is_touched_last_finds_fast_memory_all_the_same(costs: Costs) -> None:
    """Of a B-tree the nodes are heap; without placement by type, what was touched first has the fast node."""
    share = {}
    for policy in ("none", "heteroos"):
        config = small_guest(costs, policy, params={}, fast=2600, workload={"footprint": 0.6})
        guest = until_populated(new_fleet(msgspec.structs.replace(config, workload="btree")))
        space = guest.workload.space
        nodes = next(vma for vma in space.vmas if vma.name == "nodes")
        first = space.first_page("nodes")
        gpt = guest.machine.gpt[first : first + nodes.pages]
        frames = (gpt[gpt != 0] & FRAME_MASK) >> FRAME_SHIFT
        share[policy] = float((frames < config.total_pages).mean())
    # Tables that are needed late, too, lie where there is room left for them.
    tables = guest.machine.tables.upper
    assert ((tables[tables != 0] & FRAME_MASK) >> FRAME_SHIFT < config.total_pages).all()
    assert share["heteroos"] == 1.0 > share["none"]
