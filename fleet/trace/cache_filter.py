"""A cache in front of a trace: drops the references that hit, so that what is left is what memory would see.

One level, set-associative, LRU, 64-byte lines, write-allocate; the set is (line ^ line >> log2(sets)) mod sets, so that
power-of-two strides spread. Left out: write-backs, prefetching, more levels and sharing. A reference across two lines
is kept if either misses.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from fleet.trace.batch import Mask
from guestd.llc import LINE_SHIFT, WAYS, use_line
from proto.errors import TraceError
from proto.units import LINE_SIZE


class CacheFilter:
    """The cache's state between batches."""

    def __init__(self, capacity_bytes: int) -> None:
        """Raises TraceError unless the capacity is a power of two and at least one set."""
        sets = capacity_bytes // (LINE_SIZE * WAYS)
        if sets < 1 or capacity_bytes != sets * LINE_SIZE * WAYS or sets & (sets - 1):
            raise TraceError(
                f"a cache of {capacity_bytes} bytes cannot be modelled; --cache takes a power of two from 1KiB"
            )
        self._tags = np.full((sets, WAYS), -1, np.int64)

    def misses(self, address: npt.NDArray[np.uint64], size: npt.NDArray[np.uint16]) -> Mask:
        """Which of these references, the next ones in order, miss: bool[n]. Addresses are within user space."""
        return np.asarray(_misses(self._tags, address.astype(np.int64), size.astype(np.int64)), np.bool_)


@njit(cache=True, nogil=True)  # type: ignore[misc, unused-ignore]
def _misses(
    tags: npt.NDArray[np.int64], address: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    sets = tags.shape[0]
    fold = 0
    while 1 << fold < sets:
        fold += 1
    missed = np.zeros(len(address), np.bool_)
    for index in range(len(address)):
        first = address[index] >> LINE_SHIFT
        last = (address[index] + size[index] - 1) >> LINE_SHIFT
        for line in range(first, last + 1):
            missed[index] |= not use_line(tags[(line ^ (line >> fold)) & (sets - 1)], line)
    return missed
