"""Loading under a tree: as far as asked for, within the room there is; heat is what all searches together touch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.address_space import AddressSpace, heap_region, mmap_region
from guestd.jit import kernel
from guestd.workloads import indexed
from guestd.workloads.base import Buffer
from guestd.workloads.bptree import EMPTY, INNERS, KEYS, LEAVES, Shape, Tree, aligned_shape, new_tree
from guestd.workloads.indexed import STEP_ACCESSES, Indexed
from guestd.workloads.scramble import new_scrambler
from guestd.workloads.silo import MASSTREE
from proto.arrays import Words
from proto.costs import Costs
from tests.guestd.machines import guest_config
from tests.guestd.workloads.plain_bptree import PlainTree, touches
from tests.guestd.workloads.test_scramble import plain

NAMES = new_scrambler(3, 20)


@kernel
def emit_step(tree: Tree, step: int, leaf: bool, address: Words) -> int:
    return indexed.emit_step(tree, step, leaf, address, 0)


class Loaded(Indexed):
    """Records of 100 bytes; searches above the leaves only."""

    def __init__(self, costs: Costs, shape: Shape, count: int, nodes: int, shuffled: bool) -> None:
        self.space = AddressSpace([heap_region("nodes", 1 << 10, 1), mmap_region("records", 1 << 10, 1)])
        tree = new_tree(shape, self.space.first_page("nodes") << 12, nodes)
        records = self.space.first_page("records")
        super().__init__(guest_config(costs), tree, records << 12, 100, count, NAMES, shuffled, np.array([7, 5]))

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        raise AssertionError("nobody searches it here")

    def leaf_heat(self, weight: Words, heat: Words, scratch: Words) -> None:
        rows = self.tree.leaves.reshape(-1, self.tree.order)[: weight.size, :-1]
        weight[:] = (rows < EMPTY).sum(axis=1)


@given(count=st.integers(1, 127), data=st.data(), leaf=st.booleans(), order=st.sampled_from((6, 16, 128)))
def test_a_step_touches_what_a_binary_search_does(count: int, data: st.DataObject, leaf: bool, order: int) -> None:
    count = min(count, order - 1)
    slot = data.draw(st.integers(int(leaf), count))
    shape = aligned_shape(order)
    out = np.zeros(STEP_ACCESSES, np.int64)
    found = emit_step(new_tree(shape, 1 << 12, 8), 5 << 16 | count << 8 | slot, leaf, out)
    # In the plain version the last step is the leaf's; a step behind it makes this one an inner node's.
    steps = [(5, count, slot)] if leaf else [(5, count, slot), (9, 0, 0)]
    expected = touches(shape, 1 << 12, steps)
    assert out[:found].tolist() == [address for address in expected if address < (1 << 12) + 6 * shape.node_bytes]


@pytest.mark.parametrize("shape", [aligned_shape(6), MASSTREE])
@pytest.mark.parametrize("shuffled", [False, True])
def test_heat_above_the_leaves_is_that_of_a_search_for_each_key(shape: Shape, shuffled: bool, costs: Costs) -> None:
    count = 2000
    loaded = Loaded(costs, shape, count, 4000, shuffled)
    tree = PlainTree(shape.order)
    keys = [plain(NAMES, i) if shuffled else i for i in range(count)]
    for key in keys:
        tree.insert(key)
    expected: Counter[int] = Counter()
    for key in keys:
        steps = tree.search(key)
        inner = touches(shape, loaded.tree.base, [*steps[:-1], (10**6, 0, 0)])
        expected.update(address >> 12 for address in inner if address < loaded.tree.base + 10**6 * shape.node_bytes)
    heat = loaded.tree_heat()
    assert {page: int(heat[page]) for page in np.flatnonzero(heat)} == expected


def test_it_loads_no_further_than_the_touches_that_are_asked_for(costs: Costs) -> None:
    loaded = Loaded(costs, MASSTREE, 10_000, 4000, False)
    assert loaded.first_touch[:2].tolist() == [7, 5]
    assert loaded.build(2) == 2 and int(loaded.tree.state[KEYS]) == 0, "what was filled before comes first"
    assert loaded.build(20) == 20
    assert 0 < int(loaded.tree.state[KEYS]) < 10_000
    loaded.finish()
    assert int(loaded.tree.state[KEYS]) == 10_000
    known = loaded.build(1 << 40)
    assert loaded.build(1 << 40) == known == np.unique(loaded.first_touch[:known]).size


@pytest.mark.parametrize("nodes", [64, 200])
def test_it_stops_before_the_tree_outgrows_its_room(nodes: int, costs: Costs) -> None:
    loaded = Loaded(costs, aligned_shape(6), 10_000, nodes, True)
    loaded.finish()
    allocated = int(loaded.tree.state[LEAVES] + loaded.tree.state[INNERS])
    assert nodes // 2 < allocated <= nodes
    assert 0 < int(loaded.tree.state[KEYS]) < 10_000
