"""Ground truth: which pages are really hot, and how a policy's hot set and its fast ratio compare with that.

True heat is the law that a workload draws its accesses by, where it has one that does not change (`Workload.steady`);
otherwise each access is counted at its page, over one sampling interval (several, if a VM makes few accesses). The true
hot set are the hottest pages that fit the VM's fast memory. Pages that are equally hot, of which only some fit, may be
in it: none of them is asked of a policy, and as many as fit count as right. All of it is the emulator's own: it takes
no virtual time, and no CPU of an agent. The sums are kept in the group ``truth`` of the counters, so that they can be
had for any interval.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import kernel
from guestd.workloads.base import Workload
from proto.arrays import Bytes, Words
from proto.counters import C, Counters
from proto.entry import FRAME_MASK, FRAME_SHIFT, HUGE, WRITABLE
from proto.units import PAGE_SHIFT, TABLE_PAGES, TABLE_SHIFT

POLICY, FAST_NODE = "policy", "fast node"
"""What is taken for a policy's hot set: its own, or what lies in fast memory."""
PAGES_PER_ACCESS = 4
"""An interval with fewer accesses than a fourth of the pages is judged with the next: judging looks at all pages."""


def placement_by_heat(heat: Words, capacity: int) -> Bytes:
    """Preferred node per page (uint8[pages]): 0 for the ``capacity`` hottest, ties by page number, 1 for the others."""
    prefer = np.ones(heat.size, np.uint8)
    prefer[np.argsort(-heat, kind="stable")[: max(0, capacity)]] = 0
    return prefer


class HotSet(NamedTuple):
    """The true hot set: the pages of at least ``cut``, and ``room`` of those of exactly ``tied``."""

    cut: int
    tied: int
    """-1: there is no such class."""
    room: int
    pages: int
    """How many have at least ``cut``."""
    accesses: int
    """Heat of the whole set: what an ideal placement serves from fast memory."""
    total: int
    """Heat of all pages."""


def true_hot_set(heat: Words, capacity: int) -> HotSet:
    """The ``capacity`` (> 0) hottest of the pages that are touched at all. ``heat``: int64[pages], >= 0."""
    touched = heat[heat > 0]
    total = int(touched.sum())
    if touched.size <= capacity:
        return HotSet(1, -1, 0, touched.size, total, total)
    least = int(np.partition(touched, touched.size - capacity)[touched.size - capacity])
    above = touched[touched > least]
    room = capacity - above.size
    accesses = int(above.sum()) + room * least
    if int((touched == least).sum()) == room:
        return HotSet(least, -1, 0, capacity, accesses, total)
    return HotSet(least + 1, least, room, above.size, accesses, total)


@kernel
def compare(heat: Words, believed: Bytes, cut: int, tied: int, found: Words) -> None:
    """Count the pages of ``believed`` (uint8[pages]) into ``found`` (int64[3]): all; at least ``cut``; ``tied``."""
    for page in range(heat.size):
        if believed[page] != 0:
            found[0] += 1
            if heat[page] >= cut:
                found[1] += 1
            elif heat[page] == tied:
                found[2] += 1


@kernel
def count_pages(address: Words, start: int, end: int, heat: Words) -> None:
    """Count the accesses ``address[start:end]`` (dense byte addresses) at their pages."""
    for i in range(start, end):
        heat[address[i] >> PAGE_SHIFT] += 1


@kernel
def in_fast(gpt: Words, ept: Words, slow_frames: int, believed: Bytes) -> None:
    """Mark (uint8[pages]) the pages that lie in fast frames, through both tables."""
    for page in range(gpt.size):
        entry = ept[(gpt[page] & FRAME_MASK) >> FRAME_SHIFT]
        backed = gpt[page] != 0 and (entry & WRITABLE) != 0
        believed[page] = backed and (entry & FRAME_MASK) >> FRAME_SHIFT < slow_frames


@kernel
def mark_mapped(gpt: Words, upper: Words, pages: Words, believed: Bytes) -> None:
    """Mark those of ``pages`` (int64[n]) that are mapped, and all of a huge page whose head is named.

    ``upper``: the entries above the leaves (`guestd.walk.PageTables`).
    """
    for page in pages:
        if gpt[page] != 0:
            head = page & (TABLE_PAGES - 1) == 0 and (upper[page >> TABLE_SHIFT] & HUGE) != 0
            for leaf in range(page, page + TABLE_PAGES if head else page + 1):
                believed[leaf] = 1


@kernel
def mark_frames(gpt: Words, bitmap: Words, believed: Bytes) -> None:
    """Mark the pages whose gPA frames have their bit in ``bitmap`` (int64[frames / 64])."""
    for page in range(gpt.size):
        gpfn = (gpt[page] & FRAME_MASK) >> FRAME_SHIFT
        believed[page] = gpt[page] != 0 and (bitmap[gpfn >> 6] >> (gpfn & 63)) & 1


class Truth:
    """The truth about one VM's accesses in the run phase. ``capacity``: pages of its fast memory, > 0."""

    def __init__(self, workload: Workload, capacity: int, counters: Counters) -> None:
        self._workload = workload
        self._capacity = capacity
        self._counters = counters
        self._law: HotSet | None = None
        self.heat = np.zeros(workload.space.pages, np.int64)
        """The law's, or what was counted since the last `judge`."""
        self._seen = (0, 0)
        self.believed = np.zeros(workload.space.pages, np.uint8)
        """What the policy takes for hot: the caller marks it before `judge`."""

    def begin(self) -> None:
        """The run phase begins; a program that builds its data first has built them."""
        self._seen = self._accesses()
        heat = self._workload.heat() if self._workload.steady else None
        if heat is not None:
            self.heat, self._law = heat, true_hot_set(heat, self._capacity)

    def executed(self, address: Words, start: int, end: int) -> None:
        """The accesses ``address[start:end]`` were made."""
        if self._law is None:
            count_pages(address, start, end, self.heat)

    def due(self) -> bool:
        """Have there been enough accesses for a judgement?"""
        return (self._accesses()[0] - self._seen[0]) * PAGES_PER_ACCESS >= self.heat.size

    def judge(self) -> None:
        """End an interval: compare what is `believed` with the truth, and begin the next one."""
        total, fast = self._accesses()
        accesses, fast = total - self._seen[0], fast - self._seen[1]
        self._seen = (total, self._seen[1] + fast)
        hot = self._law or true_hot_set(self.heat, self._capacity)
        if accesses and hot.total:
            found = np.zeros(3, np.int64)
            compare(self.heat, self.believed, hot.cut, hot.tied, found)
            believed, sure, tied = (int(count) for count in found)
            tied = min(tied, hot.room)
            counters = self._counters
            counters[C.truth__believed] += believed
            counters[C.truth__right] += sure + tied
            # Where all that is touched is equally hot, any pages that fill fast memory are the hot set.
            counters[C.truth__asked] += hot.pages or hot.room
            counters[C.truth__found] += sure if hot.pages else tied
            counters[C.truth__accesses] += accesses
            counters[C.truth__fast] += fast
            counters[C.truth__oracle_fast] += accesses * hot.accesses // hot.total
        if self._law is None:
            self.heat[:] = 0

    def _accesses(self) -> tuple[int, int]:
        return int(self._counters[C.access__total]), int(self._counters[C.access__fast])


def scores(counters: Counters) -> dict[str, float]:
    """Precision, recall and F1 of a policy's hot set, and fast ratio against the oracle's, over what was judged."""
    if counters[C.truth__accesses] == 0:
        return {}
    both, believed = int(counters[C.truth__right]), int(counters[C.truth__believed])
    precision = both / max(1, believed)
    recall = int(counters[C.truth__found]) / max(1, int(counters[C.truth__asked]))
    oracle = int(counters[C.truth__oracle_fast])
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "oracle_fast_ratio": oracle / int(counters[C.truth__accesses]),
        "share_of_oracle": int(counters[C.truth__fast]) / max(1, oracle),
    }
