"""HeMem's lists: a plain reference of counting, cooling and order, and that each region is on one list."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.meter import Meter
from guestd.mm.nodes import new_nodes
from guestd.tiering.fifo_lists import (
    CLOCK,
    CURSOR,
    DONE,
    NO_LIST,
    Regions,
    Thresholds,
    list_new,
    listed,
    look_again,
    new_regions,
    record,
    relist,
)

REGIONS = 6
HALF = 10_000
"""Frames from here on are slow ones."""
LIMITS = Thresholds(loads=4, stores=3, cooling=6)
BOOK = Meter().book


def lists(regions: Regions) -> list[list[int]]:
    out = np.zeros(REGIONS, np.int64)
    return [out[: listed(BOOK, regions, which, out)].tolist() for which in range(4)]


class Reference:
    """The same with lists of Python, halving everything at once."""

    def __init__(self) -> None:
        self.counts = [[0, 0, 0] for _ in range(REGIONS)]
        self.lists: list[list[int]] = [[], [], [], []]

    def where(self, region: int) -> int | None:
        return next((which for which in range(4) if region in self.lists[which]), None)

    def hot(self, region: int) -> bool:
        fast, slow, stores = self.counts[region]
        return stores >= LIMITS.stores or fast + slow >= LIMITS.loads

    def put(self, region: int, which: int) -> None:
        before = self.where(region)
        if before is not None:
            self.lists[before].remove(region)
        self.lists[which].append(region)

    def sample(self, region: int, slow: bool, write: bool) -> None:
        column = 2 if write else int(slow)
        self.counts[region][column] += 1
        before = self.where(region)
        slow = slow or (before is not None and before >= 2)
        if before != 2 * slow + self.hot(region):
            self.put(region, 2 * slow + self.hot(region))
        if self.counts[region][column] > LIMITS.cooling:
            self.counts = [[count // 2 for count in row] for row in self.counts]

    def look_again(self, node: int) -> None:
        for region in list(self.lists[2 * node + 1]):
            if not self.hot(region):
                self.put(region, 2 * node)


STEPS = st.lists(
    st.one_of(
        st.lists(st.tuples(st.integers(0, REGIONS - 1), st.booleans(), st.booleans()), min_size=1, max_size=12),
        st.integers(0, 1),
    ),
    max_size=15,
)


@settings(max_examples=150)
@given(STEPS)
def test_counts_and_lists_are_those_of_the_reference(steps: list[Any]) -> None:
    regions, reference = new_regions(REGIONS), Reference()
    for step in steps:
        if isinstance(step, int):
            due = regions.state[CURSOR + step] != DONE
            look_again(BOOK, regions, step, REGIONS, LIMITS)
            assert regions.state[CURSOR + step] == DONE
            if due:
                reference.look_again(step)
        else:
            pages = np.array([512 * region + 7 for region, _, _ in step], np.int64)
            frames = np.array([HALF * slow for _, slow, _ in step], np.int32)
            writes = np.array([write for _, _, write in step])
            record(BOOK, regions, HALF, pages, frames, writes, LIMITS)
            for region, slow, write in step:
                reference.sample(region, slow, write)
        assert lists(regions) == reference.lists
    behind = regions.state[CLOCK] - regions.clock
    assert (regions.counts >> behind[:, None]).tolist() == reference.counts
    for region in range(REGIONS):
        assert regions.which[region] == (NO_LIST if (where := reference.where(region)) is None else where)


def test_looking_again_goes_on_where_it_stopped() -> None:
    regions = new_regions(REGIONS)
    pages = np.repeat(512 * np.arange(REGIONS), 4).astype(np.int64)
    record(BOOK, regions, HALF, pages, np.zeros(pages.size, np.int32), np.zeros(pages.size, np.bool_), LIMITS)
    assert lists(regions)[1] == list(range(REGIONS))
    regions.state[CLOCK] += 1
    regions.state[CURSOR] = regions.next[REGIONS + 1]
    assert [look_again(BOOK, regions, 0, 4, LIMITS) for _ in range(3)] == [4, 2, 0]
    assert lists(regions)[:2] == [list(range(REGIONS)), []]


def test_new_regions_are_cold_and_slow_if_any_page_is() -> None:
    regions, nodes = new_regions(4), new_nodes(1024, 1024, 1024)
    for frame, page in ((3, 0), (4, 1), (5, 520), (1030, 521), (1031, 1024)):
        nodes.page[frame] = page
    relist(BOOK, regions, 0, 1)
    assert list_new(BOOK, regions, nodes, np.zeros(4, np.uint8)) == 2
    out = np.zeros(4, np.int64)
    assert [out[: listed(BOOK, regions, which, out)].tolist() for which in range(4)] == [[], [0], [1, 2], []]
    assert list_new(BOOK, regions, nodes, np.zeros(4, np.uint8)) == 0
