"""The tree: it holds what was inserted, in the shape and the order of allocation of a plain one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.workloads.bptree import (
    BATCH,
    EMPTY,
    HEIGHT,
    INNERS,
    KEY_BITS,
    KEYS,
    LEAF,
    LEAVES,
    MAX_HEIGHT,
    Halves,
    Shape,
    Touch,
    Tree,
    aligned_shape,
    descend,
    insert,
    new_tree,
    nodes_for,
)
from guestd.workloads.silo import MASSTREE
from tests.guestd.workloads.plain_bptree import PlainTree, Step

NODES, RECORDS = 1 << 12, 1 << 16
RECORD_BYTES = 100


def build(shape: Shape, keys: list[int], batches: list[int]) -> tuple[Tree, Touch]:
    """A tree of ``keys``, inserted in batches of these sizes, over and over."""
    tree = new_tree(shape, NODES << 12, len(keys) + 64)
    order = np.full(1 << 16, -1, np.int32)
    touch = Touch(order, np.zeros(1, np.int64), np.array([NODES, RECORDS]), np.zeros(2, np.int64))
    paths = np.zeros((BATCH + 2, MAX_HEIGHT + 2), np.int64)
    done = turn = 0
    while done < len(keys):
        size = batches[turn % len(batches)]
        insert(tree, np.array(keys[done : done + size]), touch, RECORD_BYTES, paths)
        done += size
        turn += 1
    return tree, touch


def search(tree: Tree, keys: list[int]) -> tuple[list[list[Step]], list[bool]]:
    """Of each key the steps, and whether it is in the leaf."""
    steps, there = [], []
    height = int(tree.state[HEIGHT])
    for start in range(0, len(keys), BATCH):
        batch = np.array(keys[start : start + BATCH], np.int64)
        paths = np.zeros((BATCH, MAX_HEIGHT + 2), np.int64)
        descend(tree, batch, paths)
        for key, path in zip(batch.tolist(), paths.tolist(), strict=False):
            steps.append([(step >> 16, step >> 8 & 0xFF, step & 0xFF) for step in path[: height + 1]])
            slot = steps[-1][-1][2]
            there.append(slot > 0 and int(tree.leaves[path[LEAF] * tree.order + slot - 1]) == key)
    return steps, there


def leaf_keys(tree: Tree) -> Halves:
    """uint32[leaves, order - 1]"""
    return tree.leaves.reshape(-1, tree.order)[: int(tree.state[LEAVES]), :-1]


SHAPES = st.one_of(st.builds(aligned_shape, st.integers(4, 20)), st.just(MASSTREE))
BATCHES = st.lists(st.integers(1, BATCH), min_size=1, max_size=5)
KEY = st.one_of(st.integers(0, 400), st.integers(0, (1 << KEY_BITS) - 1))


@given(shape=SHAPES, keys=st.lists(KEY, unique=True, min_size=1, max_size=300), batches=BATCHES, absent=st.lists(KEY))
def test_it_is_the_plain_tree(shape: Shape, keys: list[int], batches: list[int], absent: list[int]) -> None:
    tree, _ = build(shape, keys, batches)
    plain = PlainTree(shape.order)
    for key in keys:
        plain.insert(key)
    steps, there = search(tree, keys + absent)
    assert steps == [plain.search(key) for key in keys + absent]
    assert there == [key in set(keys) for key in keys + absent]
    assert int(tree.state[KEYS]) == len(keys)
    assert int(tree.state[LEAVES] + tree.state[INNERS]) == plain.allocated


@given(shape=SHAPES, count=st.integers(1, 1000), batches=BATCHES)
def test_keys_in_order_leave_full_leaves(shape: Shape, count: int, batches: list[int]) -> None:
    tree, _ = build(shape, list(range(count)), batches)
    leaves = int(tree.state[LEAVES])
    counts = (leaf_keys(tree) < EMPTY).sum(axis=1).tolist()
    assert counts[:-1] == [shape.order - 1] * (leaves - 1)
    assert sum(counts) == count
    assert leaves + int(tree.state[INNERS]) <= nodes_for(shape, count, False) + MAX_HEIGHT


@pytest.mark.parametrize("order", [4, 6, 16, 64])
def test_shuffled_keys_take_about_the_nodes_that_are_reserved(order: int) -> None:
    shape = aligned_shape(order)
    keys = np.random.default_rng(order).permutation(40_000)
    tree, _ = build(shape, keys.tolist(), [BATCH])
    expected = nodes_for(shape, keys.size, True)
    assert 0.85 * expected < int(tree.state[LEAVES] + tree.state[INNERS]) < 1.1 * expected
    every = leaf_keys(tree)
    assert np.sort(every[every < EMPTY]).tolist() == list(range(keys.size))


@given(shape=SHAPES, keys=st.lists(KEY, unique=True, min_size=1, max_size=300), batches=BATCHES)
def test_pages_are_touched_once_when_nodes_and_records_are_allocated(
    shape: Shape, keys: list[int], batches: list[int]
) -> None:
    _, touch = build(shape, keys, batches)
    plain = PlainTree(shape.order)
    expected: list[int] = []
    for inserted, key in enumerate(keys, start=1):
        plain.insert(key)
        for region, size in ((RECORDS, inserted * RECORD_BYTES), (NODES, plain.allocated * shape.node_bytes)):
            expected += [page for page in range(region, region + -(-size // 4096)) if page not in expected]
    known = int(touch.known[0])
    assert touch.order[:known].tolist() == expected
    assert (touch.order[known:] == -1).all()


def test_shapes_are_as_the_programs_lay_them_out() -> None:
    assert aligned_shape(6) == Shape(order=6, keys_at=64, pointers_at=128, node_bytes=192)
    assert aligned_shape(16) == Shape(order=16, keys_at=64, pointers_at=192, node_bytes=320)
    assert MASSTREE.pointers_at == MASSTREE.keys_at + 8 * 15
    assert MASSTREE.node_bytes % 64 == 0 and MASSTREE.pointers_at + 8 * 16 <= MASSTREE.node_bytes
