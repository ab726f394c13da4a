"""The contract of a generator: it fills a buffer with nothing but dense pages of its own space, touched before."""

from itertools import cycle
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.address_space import AddressSpace, heap_region
from guestd.llc import LlcFilter
from guestd.workloads.base import ROOM, Buffer, BuiltWorkload, Workload, scaled_heat
from guestd.workloads.registry import workloads
from proto.config import Scalar
from proto.costs import Costs
from proto.trace import LLC_HIT
from tests.guestd.machines import guest_config
from tests.guestd.workloads.accesses import new_buffer, populated, take

GENERATORS = sorted(set(workloads()) - {"trace"})
WHOLE_OPERATIONS = ("btree", "silo", "pagerank", "bfs")
COLD_PAGES = ("pagerank", "bfs", "idle")
"""Some of the memory is written at the start and never again (bfs: what no search reaches)."""
PARAMS: list[dict[str, Scalar]] = [{}, {"footprint": 0.05}]


def make(name: str, costs: Costs, vcpus: int = 2, seed: int = 11, **params: Any) -> Workload:
    config = guest_config(costs, workload=name, workload_params=params, vcpus=vcpus)
    return workloads()[name].create(msgspec.structs.replace(config, seed=seed))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("params", PARAMS)
def test_generators_stay_in_their_space_and_populate_what_they_will_touch(
    name: str, params: dict[str, Any], costs: Costs
) -> None:
    workload = make(name, costs, **params)
    mapped = {
        page for vma in workload.space.vmas
        for page in range(workload.space.first_page(vma.name), workload.space.first_page(vma.name) + vma.pages)
    }  # fmt: skip
    pages = populated(workload, vcpus=2)
    assert len(set(pages)) == len(pages), "each page once"
    assert set(pages) <= mapped
    for vcpu in (0, 1):
        buffer = new_buffer(50_000)
        count = workload.generate(vcpu, buffer)
        assert count == 50_000 or (name in WHOLE_OPERATIONS and 50_000 - ROOM < count <= 50_000)
        assert set((buffer.address[:count] >> 12).tolist()) <= set(pages)
        assert (buffer.kind[:count] & ~np.uint8(LLC_HIT)).max() <= 2 and buffer.think_ps[:count].min() >= 0
    heat = workload.heat()
    assert heat is not None
    assert heat.size == workload.space.pages
    hot = set(np.flatnonzero(heat).tolist())
    assert hot <= set(pages)
    # Of the last node of a tree, what its search reads may end on the page before.
    assert name in COLD_PAGES or len(hot) >= len(pages) - (name in WHOLE_OPERATIONS)


@pytest.mark.parametrize("name", WHOLE_OPERATIONS)
def test_a_data_structure_is_read_through_the_llc(name: str, costs: Costs) -> None:
    """The same accesses as without one, of which those hit that an LRU cache of the share's size holds."""
    plain, filtered = make(name, costs), make(name, costs)
    assert populated(plain, vcpus=2) == populated(filtered, vcpus=2)
    cache = LlcFilter()
    for share in (0, 1 << 18, 1 << 18, 1 << 24):
        filtered.set_llc(share)
        cache.resize(share)
        for vcpu in (0, 1):
            bare, found = new_buffer(20_000), new_buffer(20_000)
            count = plain.generate(vcpu, bare)
            assert filtered.generate(vcpu, found) == count
            assert (bare.address == found.address).all()
            cache.mark(bare.address[:count], bare.kind[:count])
            assert (bare.kind[:count] == found.kind[:count]).all()
            assert (found.kind[:count] >= LLC_HIT).any() == (share > 0)


@pytest.mark.parametrize("name", GENERATORS)
def test_heat_is_known_before_populating_and_changes_nothing(name: str, costs: Costs) -> None:
    """A policy that places by heat asks before the first touch."""
    asked, plain = make(name, costs), make(name, costs)
    before = asked.heat()
    assert populated(asked, vcpus=2) == populated(plain, vcpus=2)
    after = asked.heat()
    assert before is not None and after is not None
    assert np.array_equal(before, after)
    assert np.array_equal(take(asked, 5000), take(plain, 5000))


@pytest.mark.parametrize("name", WHOLE_OPERATIONS)
def test_heat_is_what_a_long_run_shows(name: str, costs: Costs) -> None:
    workload = make(name, costs, vcpus=1)
    heat = workload.heat()
    counts = np.zeros(workload.space.pages, np.int64)
    buffer = new_buffer(16384)
    while counts.sum() < 20_000_000:
        filled = workload.generate(0, buffer)
        counts += np.bincount(buffer.address[:filled] >> 12, minlength=counts.size)
    assert heat is not None
    # Half the sum of differences of two distributions: sampling alone makes it about 0.5 %.
    assert np.abs(heat / heat.sum() - counts / counts.sum()).sum() / 2 < 0.01


@pytest.mark.parametrize("name", WHOLE_OPERATIONS)
@given(sizes=st.lists(st.integers(ROOM, 4000), min_size=1, max_size=5))
def test_a_vcpu_s_accesses_do_not_depend_on_its_buffers(name: str, sizes: list[int], costs: Costs) -> None:
    count = 6000
    found = take(make(name, costs, vcpus=1, footprint=0.05), count, sizes=tuple(sizes))
    expected = take(make(name, costs, vcpus=1, footprint=0.05), count, sizes=(16384,))
    assert np.array_equal(found[:count], expected[:count])


@pytest.mark.parametrize("name", ["btree", "silo"])
@settings(max_examples=25)
@given(turns=st.lists(st.tuples(st.integers(0, 2), st.integers(ROOM, 4000)), min_size=1, max_size=20))
def test_vcpus_with_operations_of_their_own_do_not_meet(name: str, turns: list[tuple[int, int]], costs: Costs) -> None:
    count = 3000
    together = make(name, costs, vcpus=3, footprint=0.05)
    rows: list[list[list[int]]] = [[], [], []]
    for vcpu, size in cycle([*turns, (0, 600), (1, 600), (2, 600)]):
        rows[vcpu] += take(together, 1, vcpu, (size,)).tolist()
        if min(len(row) for row in rows) >= count:
            break
    for vcpu in range(3):
        alone = take(make(name, costs, vcpus=3, footprint=0.05), count, vcpu)
        assert rows[vcpu][:count] == alone[:count].tolist()


@pytest.mark.parametrize("name", WHOLE_OPERATIONS)
def test_a_seed_decides_all(name: str, costs: Costs) -> None:
    first, again, other = (make(name, costs, seed=seed) for seed in (1, 1, 2))
    assert populated(first, vcpus=2) == populated(again, vcpus=2)
    accesses = [take(workload, 20_000) for workload in (first, again, other)]
    assert np.array_equal(accesses[0], accesses[1])
    assert not np.array_equal(accesses[0][:10_000], accesses[2][:10_000])


class Stages(BuiltWorkload):
    """Pages 10 to 39, built three at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.space = AddressSpace([heap_region("heap", 64, 1)])
        self.first_touch = np.arange(10, 40, dtype=np.int32)
        self.built = 0

    def build(self, pages: int) -> int:
        while self.built < min(pages, 30):
            self.built += 3
        return min(pages, self.built)

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        raise AssertionError("nobody runs it here")


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_building_keeps_just_ahead_of_the_first_touches(sizes: list[int]) -> None:
    workload = Stages()
    touched: list[int] = []
    for size in sizes:
        buffer = new_buffer(size)
        count = workload.populate(0, buffer)
        assert count == min(size, 30 - len(touched))
        touched += (buffer.address[:count] >> 12).tolist()
        assert len(touched) <= workload.built <= len(touched) + 2
    assert touched == list(range(10, 10 + len(touched)))
    workload.finish()
    assert workload.built == 30


@given(heat=st.lists(st.integers(0, (1 << 62) - 1), min_size=1, max_size=50))
def test_scaled_heat_keeps_shares_and_what_is_hot(heat: list[int]) -> None:
    scaled = scaled_heat(np.array(heat))
    assert int(scaled.max()) * len(heat) < 1 << 63
    assert [value > 0 for value in heat] == (scaled > 0).tolist()
    factor = max(heat) / max(1, int(scaled.max()))
    assert scaled.tolist() == pytest.approx([value / max(1, factor) for value in heat], rel=1e-6, abs=1)
