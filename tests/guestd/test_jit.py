"""How kernels are compiled: cached, without the GIL; a prefetch changes nothing."""

import numpy as np

from guestd.jit import inline, kernel, prefetch
from proto.arrays import Words


@inline
def twice(value: int) -> int:
    return 2 * value


@kernel
def prefetched_sum(values: Words, order: Words) -> int:
    total = 0
    for i in range(order.size):
        prefetch(values, order[i])
    for i in range(order.size):
        total += twice(values[order[i]])
    return total


def test_prefetch_changes_no_element_and_inlined_functions_work() -> None:
    values = np.arange(1000, dtype=np.int64)
    order = np.random.default_rng(3).integers(0, 1000, 500)
    assert prefetched_sum(values, order) == 2 * int(values[order].sum())
    assert (values == np.arange(1000)).all()


def test_kernels_release_the_gil_and_are_cached() -> None:
    options = prefetched_sum.targetoptions  # type: ignore[attr-defined]
    assert options["nogil"] and not options["boundscheck"]
    stats = prefetched_sum.stats  # type: ignore[attr-defined]
    assert stats.cache_path
