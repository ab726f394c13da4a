"""Where first touch puts pages when a policy has a say in it: on which node each page of the workload would rather be.

The oracle knows the workload's true heat. A kernel that places by type (HeteroOS, ISCA'17) knows only who asks: page
tables come first, for which room is left, then heaps, then other mapped regions, each in order of address as long as it
fits; what does not fit goes to the slow node at once, so that what comes first by type finds room whenever it is
touched. Left out: page cache, slab and network buffers, which no workload here has.
"""

import numpy as np

from guestd.address_space import AddressSpace
from guestd.hotness import placement_by_heat
from guestd.tiering.policy import Policy
from guestd.workloads.base import Workload
from proto.arrays import Bytes, Words
from proto.units import PAGE_SHIFT, TABLE_PAGES

_HEAP, _MAPPED = 2, 1


def preferred(policy: Policy, workload: Workload, capacity: int, huge: bool) -> Bytes:
    """Node that each page prefers (uint8[pages], 0 = fast), of which ``capacity`` are fast; empty: all prefer it.

    ``huge``: the workload's memory is mapped by huge pages, so that whole tables compete.
    """
    worth = workload.heat() if policy.places_by_heat else None
    if policy.places_by_type:
        worth = by_type(workload.space)
    if worth is None:
        return np.zeros(0, np.uint8)
    # Of a huge page the whole goes where its first access says.
    unit = TABLE_PAGES if huge else 1
    return placement_by_heat(worth.reshape(-1, unit).sum(axis=1), capacity // unit).repeat(unit)


def by_type(space: AddressSpace) -> Words:
    """What a page of each type is worth (int64[pages]): heap over mapped region over nothing."""
    worth = np.zeros(space.pages, np.int64)
    for vma in space.vmas:
        first = int(space.page_of(vma.start))
        last = int(space.page_of(vma.start + (vma.pages - 1 << PAGE_SHIFT)))
        worth[first : last + 1] = _HEAP if vma.heap else _MAPPED
    return worth
