"""Reuse distance, against an LRU list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.trace.reuse import FIRST_USE, reuse_distances


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=300))
def test_like_the_depth_in_an_lru_list(pages: list[int]) -> None:
    stack: list[int] = []
    expected = []
    for page in pages:
        expected.append(stack.index(page) if page in stack else FIRST_USE)
        if page in stack:
            stack.remove(page)
        stack.insert(0, page)
    assert reuse_distances(np.array(pages, np.uint64)).tolist() == expected


def test_a_cycle_has_the_distance_of_its_length() -> None:
    distances = reuse_distances(np.tile(np.arange(100, dtype=np.uint64), 3))
    assert (distances[:100] == FIRST_USE).all()
    assert (distances[100:] == 99).all()
