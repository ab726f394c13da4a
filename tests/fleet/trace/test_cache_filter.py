"""The cache filter, against lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.trace.cache_filter import CacheFilter
from guestd.llc import WAYS
from proto.errors import TraceError


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 14), st.sampled_from([1, 8, 64, 200])), max_size=400), st.integers(0, 400)
)
def test_like_lists(references: list[tuple[int, int]], cut: int) -> None:
    sets = 2
    lists: list[list[int]] = [[] for _ in range(sets)]
    expected = []
    for address, size in references:
        missed = False
        for line in range(address // 64, (address + size - 1) // 64 + 1):
            ways = lists[(line ^ line >> 1) % sets]
            missed |= line not in ways
            if line in ways:
                ways.remove(line)
            ways.insert(0, line)
            del ways[WAYS:]
        expected.append(missed)
    cache = CacheFilter(sets * WAYS * 64)
    found: list[bool] = []
    for part in (references[:cut], references[cut:]):
        columns = np.array(part, np.int64).reshape(-1, 2)
        found += cache.misses(columns[:, 0].astype(np.uint64), columns[:, 1].astype(np.uint16)).tolist()
    assert found == expected


@pytest.mark.parametrize("capacity", [0, 512, 1500, 3072])
def test_impossible_sizes(capacity: int) -> None:
    with pytest.raises(TraceError, match="power of two"):
        CacheFilter(capacity)
