"""The range tree against a plain Python reference, on random programs of samples and epochs."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.meter import Meter
from guestd.tiering.range_tree import ACCESSED, CAPACITY, COUNT, CREATED, END, START, RangeTree

FLOOR = 2 << 20
ROOTS = [(0, 64 * FLOOR), (64 * FLOOR, 101 * FLOOR), (200 * FLOOR, 232 * FLOOR)]


def new_tree(roots: list[tuple[int, int]] | None = None, floor: int = FLOOR) -> RangeTree:
    return RangeTree(roots or ROOTS, floor, Meter().book)


@dataclass
class Leaf:
    start: int
    end: int
    count: int = 0
    created: int = 0
    accessed: int = 0


class Reference:
    """The same classifier, leaf by leaf (reference demeter.md 1.2)."""

    def __init__(self, roots: list[tuple[int, int]], floor: int) -> None:
        self.leaves = [Leaf(start, end) for start, end in roots]
        self.roots = {start for start, _ in roots}
        self.floor = floor
        self.epoch = 0

    def record(self, gvas: list[int]) -> int:
        counted = 0
        for gva in gvas:
            for leaf in self.leaves:
                if leaf.start <= gva < leaf.end:
                    leaf.count += 1
                    leaf.accessed = self.epoch
                    counted += 1
        return counted

    def advance(self, margin: int, eligible: int, *, both_neighbours: bool, decay: bool, merge_after: int) -> int:
        self.epoch += 1
        if decay:
            for leaf in self.leaves:
                leaf.count //= 2
        splits = 0
        done: list[Leaf] = []
        todo = list(self.leaves)
        while todo:
            leaf = todo.pop(0)
            beside = ([done[-1]] if done else []) + todo[:1]
            hotter = [leaf.count > other.count + margin for other in beside]
            stands_out = all(hotter) if both_neighbours else any(hotter) or not hotter
            room = len(done) + len(todo) + 1 < CAPACITY
            if stands_out and leaf.count >= eligible and leaf.end - leaf.start >= 2 * self.floor and room:
                middle = leaf.start + (leaf.end - leaf.start) // 2 // self.floor * self.floor
                right = leaf.count // 2
                done += [
                    Leaf(leaf.start, middle, leaf.count - right, self.epoch, leaf.accessed),
                    Leaf(middle, leaf.end, right, self.epoch, leaf.accessed),
                ]
                splits += 1
            else:
                done.append(leaf)
        self.leaves = done
        if merge_after:
            merged: list[Leaf] = []
            for leaf in self.leaves:
                last = merged[-1] if merged else None
                idle = last is not None and self.epoch - max(leaf.accessed, last.accessed) >= merge_after
                if last is not None and idle and leaf.start not in self.roots and leaf.count == last.count == 0:
                    last.end = leaf.end
                else:
                    merged.append(leaf)
            self.leaves = merged
        return splits


samples = st.lists(
    st.tuples(st.integers(0, 240), st.integers(0, FLOOR - 1), st.integers(1, 30)), max_size=12
)  # fmt: skip
epochs = st.lists(
    st.tuples(samples, st.integers(0, 20), st.integers(0, 10), st.booleans(), st.booleans(), st.integers(0, 3)),
    min_size=1, max_size=12,
)  # fmt: skip


@given(program=epochs)
def test_it_agrees_with_the_reference_and_keeps_partitioning_the_space(
    program: list[tuple[list[tuple[int, int, int]], int, int, bool, bool, int]],
) -> None:
    tree, reference = new_tree(), Reference(ROOTS, FLOOR)
    for drawn, margin, eligible, both, decay, merge_after in program:
        gvas = [unit * FLOOR + offset for unit, offset, times in drawn for _ in range(times)]
        assert tree.record(np.array(gvas, np.int64)) == reference.record(gvas)
        before = int(tree.leaves[COUNT].sum())
        halved = int((tree.leaves[COUNT] // 2).sum())
        splits = tree.advance(margin, eligible, both_neighbours=both, decay=decay, merge_after=merge_after)
        assert splits == reference.advance(margin, eligible, both_neighbours=both, decay=decay, merge_after=merge_after)
        # A split shares a count out and a merge joins empty ones: only halving takes any away.
        assert tree.leaves[COUNT].sum() == (halved if decay else before)
        found = [(int(leaf[START]), int(leaf[END]), int(leaf[COUNT])) for leaf in tree.leaves.T]
        assert found == [(leaf.start, leaf.end, leaf.count) for leaf in reference.leaves]
        assert tree.leaves[ACCESSED].tolist() == [leaf.accessed for leaf in reference.leaves]
        _check_partition(tree)
        _check_ranking(tree)


def _check_partition(tree: RangeTree) -> None:
    starts, ends = tree.leaves[START], tree.leaves[END]
    assert (ends > starts).all()
    assert (ends - starts >= FLOOR).all()
    joints = starts[1:] == ends[:-1]
    gaps = [(int(a), int(b)) for a, b in zip(ends[:-1][~joints], starts[1:][~joints], strict=True)]
    assert gaps == [(101 * FLOOR, 200 * FLOOR)]
    assert (starts[0], ends[-1]) == (ROOTS[0][0], ROOTS[-1][1])
    assert {start for start, _ in ROOTS} <= set(starts.tolist()), "no leaf crosses a root"


def _check_ranking(tree: RangeTree) -> None:
    order = tree.ranking()
    assert sorted(order) == list(range(tree.used))
    size = tree.leaves[END] - tree.leaves[START]
    density = tree.leaves[COUNT] * (1 << 20) // (size // FLOOR)
    ranked = [(-density[leaf], -tree.leaves[CREATED, leaf]) for leaf in order]
    assert ranked == sorted(ranked)


def test_a_split_needs_both_neighbours_to_be_colder_or_only_one() -> None:
    for both, splits in ((True, 0), (False, 1)):
        tree = new_tree()
        # As hot as the left neighbour, hotter than the right one.
        tree.record(np.array([0] * 40 + [70 * FLOOR] * 40, np.int64))
        assert tree.advance(5, 5, both_neighbours=both, decay=True, merge_after=0) == splits


def test_a_hot_spot_is_found_down_to_the_floor_and_no_further() -> None:
    tree = new_tree()
    spot = 37 * FLOOR + 5
    for _ in range(12):
        tree.record(np.full(1000, spot, np.int64))
        tree.advance(10, 10, both_neighbours=True, decay=True, merge_after=0)
    hottest = tree.leaves[:, tree.ranking()[0]]
    assert (hottest[START], hottest[END]) == (37 * FLOOR, 38 * FLOOR)


def test_what_cools_down_is_merged_again_up_to_its_root() -> None:
    tree = new_tree()
    for _ in range(8):
        tree.record(np.full(1000, 5 * FLOOR, np.int64))
        tree.advance(10, 10, both_neighbours=True, decay=True, merge_after=3)
    assert tree.used > len(ROOTS)
    for _ in range(30):
        tree.advance(10, 10, both_neighbours=True, decay=True, merge_after=3)
    assert [(int(leaf[START]), int(leaf[END])) for leaf in tree.leaves.T] == ROOTS


def test_it_stops_splitting_at_the_cap_of_the_released_code() -> None:
    tree = new_tree([(0, 4 * CAPACITY * FLOOR)])
    for _ in range(14):
        # Hotter than the right neighbour everywhere: with one neighbour, all of it splits.
        counts = np.arange(tree.used, 0, -1) * 1000
        tree.record(np.repeat(tree.leaves[START].copy(), counts // 1000 * 4))
        tree.advance(0, 0, both_neighbours=False, decay=False, merge_after=0)
    assert tree.used == CAPACITY


def test_time_in_the_tree_is_metered() -> None:
    meter = Meter()
    tree = RangeTree(ROOTS, FLOOR, meter.book)
    tree.record(np.arange(100_000, dtype=np.int64))
    assert meter.book[0] > 0
    assert meter.book[1:3].tolist() == [0, 0]
