"""The B+ tree workload: a plain Python tree, loaded and searched in the same order, touches the same addresses."""

from bisect import bisect_left
from typing import Any

import numpy as np
import pytest

from guestd.random import streams
from guestd.workloads.bptree import BATCH, INNERS, KEYS, LEAVES, aligned_shape
from guestd.workloads.btree import ELEMENT, RECORD, BTree
from proto.costs import Costs
from proto.trace import LOAD, MODIFY
from tests.guestd.machines import guest_config
from tests.guestd.test_random import splitmix64
from tests.guestd.workloads.accesses import populated, take
from tests.guestd.workloads.plain_bptree import PlainTree, touches
from tests.guestd.workloads.test_scramble import plain


def make(costs: Costs, vcpus: int = 1, **params: Any) -> BTree:
    return BTree(guest_config(costs, workload="btree", workload_params={"footprint": 0.1} | params, vcpus=vcpus))


def key(btree: BTree, i: int) -> int:
    return plain(btree.names, i) if btree.shuffled else i


def plain_tree(btree: BTree) -> PlainTree:
    tree = PlainTree(btree.tree.order)
    for i in range(int(btree.tree.state[KEYS])):
        tree.insert(key(btree, i))
    return tree


PARAMS: list[dict[str, Any]] = [{}, {"load": "sorted"}, {"order": 32}, {"order": 128, "load": "sorted"}]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("vcpu", [0, 1])
def test_lookups_are_those_of_a_plain_tree(params: dict[str, Any], vcpu: int, costs: Costs) -> None:
    btree = make(costs, vcpus=2, **params)
    found = take(btree, 5000, vcpu)
    tree, shape = plain_tree(btree), aligned_shape(btree.tree.order)
    array = sorted(key(btree, i) for i in range(btree.count))
    state = int(streams(11, 2)[vcpu, 0])
    expected: list[tuple[int, int]] = []
    while len(expected) < len(found):
        state, drawn = splitmix64(state)
        i = (drawn >> 32) * btree.count >> 32
        steps = tree.search(key(btree, i))
        leaf = next(leaf for leaf in tree.leaves() if leaf.number == steps[-1][0])
        assert leaf.keys[steps[-1][2] - 1] == array[bisect_left(array, key(btree, i))] == key(btree, i)
        expected += [(address, LOAD) for address in touches(shape, btree.tree.base, steps)]
        expected += [(btree.records + RECORD * i, MODIFY), (btree.elements + ELEMENT * i, LOAD)]
    assert [(address, kind) for address, kind, _ in found.tolist()] == expected[: len(found)]
    assert (found[:, 2] == 1500).all()


def test_footprint_and_private_memory(costs: Costs) -> None:
    btree = make(costs, footprint=0.875)
    pages = populated(btree)
    assert 0.85 * 4096 < len(pages) < 0.88 * 4096
    assert int(btree.tree.state[KEYS]) == btree.count
    used = btree.tree.state
    private = (int(used[LEAVES]) * 6 + int(used[INNERS]) * 12) * 4
    assert private * 15 < len(pages) * 4096


def test_first_touch_is_the_program_s(costs: Costs) -> None:
    """All elements, then a record before its key goes in, and nodes as splits need them."""
    btree = make(costs)
    pages = populated(btree)
    first = {vma.name: btree.space.first_page(vma.name) for vma in btree.space.vmas}
    tree = PlainTree(6)
    expected = [first["elements"] + page for page in range(-(-btree.count * ELEMENT // 4096))]
    seen = set(expected)
    for i in range(btree.count):
        tree.insert(key(btree, i))
        for name, size in (("records", (i + 1) * RECORD), ("nodes", tree.allocated * 192)):
            page = first[name] + (size - 1) // 4096
            for new in (page - 1, page):
                if new >= first[name] and new not in seen:
                    seen.add(new)
                    expected.append(new)
    assert pages == expected


@pytest.mark.parametrize("params", PARAMS)
def test_heat_is_one_lookup_of_each_key(params: dict[str, Any], costs: Costs) -> None:
    btree = make(costs, **params)
    heat = btree.heat()
    tree, shape = plain_tree(btree), aligned_shape(btree.tree.order)
    addresses: list[int] = []
    for i in range(btree.count):
        addresses += touches(shape, btree.tree.base, tree.search(key(btree, i)))
        addresses += [btree.records + RECORD * i, btree.elements + ELEMENT * i]
    expected = np.bincount(np.array(addresses) >> 12, minlength=btree.space.pages)
    assert heat is not None
    assert np.array_equal(heat, expected)


def test_a_batch_is_finished_in_the_next_buffer(costs: Costs) -> None:
    """Searches are made in batches; a buffer that ends inside one loses none of them."""
    whole = take(make(costs), 3000, sizes=(5000,))
    pieces = take(make(costs), 3000, sizes=(513, 600, 1024))
    assert len(pieces) > BATCH
    common = min(len(whole), len(pieces))
    assert np.array_equal(whole[:common], pieces[:common])
