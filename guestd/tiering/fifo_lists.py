"""HeMem's classifier (SOSP'21, 3.3; src/pebs.c): 2 MiB regions, hot or cold by fixed thresholds, in FIFO lists.

A region counts its sampled loads from each tier and its stores; it is hot with enough of either. When a count exceeds
the cooling threshold a clock moves on, and each region halves its counts when it is next sampled or looked at. Four
lists (fast or slow, hot or cold) keep regions in the order in which they came; the policy thread looks through the hot
ones again after a cooling. A region is what one leaf table maps. With guest.thp=always it is a huge page, as in the
design; of 4 KiB pages all that it has move together. New regions are listed by the policy thread, not by the fault that
maps them, whose userfaultfd costs are left out; small allocations are managed like all others.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline
from guestd.meter import metered
from guestd.mm.nodes import FAST, SLOW, Nodes
from guestd.params import Param
from guestd.tiering.policy import AgentThread, Params
from guestd.tiering.stage import Classifier, Evidence, Stage
from guestd.tiering.view import PageView
from proto.arrays import Bytes, Ints, Mask, Words
from proto.units import PS_PER_MS, TABLE_PAGES, TABLE_SHIFT

NO_LIST = -1
COLD, HOT = 0, 1
LOADS_FAST, LOADS_SLOW, STORED = 0, 1, 2
"""Columns of `Regions.counts`."""
CLOCK, CURSOR = 0, 1
"""Entries of `Regions.state`: the cooling clock; from CURSOR on, for each node, the region at which looking through its
hot list goes on (`AT_START`, or `DONE`)."""
AT_START, DONE = -1, -2
_FAR = 62


class Regions(NamedTuple):
    """All regions of a view, R, and the four lists 2 * node + hot."""

    counts: Words
    """int64[R, 3]"""
    clock: Words
    """int64[R]: cooling clock up to which the counts were halved."""
    which: Ints
    """int32[R]: the list that it is on, or NO_LIST."""
    next: Ints
    """int32[R + 4]: links; the last four are the heads of the lists."""
    previous: Ints
    state: Words
    """int64[3]"""


class Thresholds(NamedTuple):
    """When a region is hot, and when all counts are halved."""

    loads: int
    stores: int
    cooling: int


def new_regions(count: int) -> Regions:
    """None is on a list."""
    links = np.arange(count + 4, dtype=np.int32)
    which = np.full(count, NO_LIST, np.int32)
    state = np.array([0, DONE, DONE], np.int64)
    return Regions(np.zeros((count, 3), np.int64), np.zeros(count, np.int64), which, links, links.copy(), state)


@inline
def _append(regions: Regions, region: int, which: int) -> None:
    """Put a region at the end of a list, off the one that it is on."""
    if regions.which[region] != NO_LIST:
        after, before = regions.next[region], regions.previous[region]
        regions.next[before], regions.previous[after] = after, before
    head = regions.which.size + which
    last = regions.previous[head]
    regions.next[last], regions.previous[region] = region, last
    regions.next[region], regions.previous[head] = head, region
    regions.which[region] = which


@inline
def _is_hot(regions: Regions, region: int, thresholds: Thresholds) -> bool:
    """Whether a region is hot, now that its counts have caught up with the clock."""
    behind = min(_FAR, regions.state[CLOCK] - regions.clock[region])
    counts = regions.counts[region]
    for column in range(3):
        counts[column] >>= behind
    regions.clock[region] = regions.state[CLOCK]
    return counts[STORED] >= thresholds.stores or counts[LOADS_FAST] + counts[LOADS_SLOW] >= thresholds.loads


@metered
def record(regions: Regions, half: int, pages: Words, frames: Ints, writes: Mask, thresholds: Thresholds) -> None:
    """Count samples of mapped pages, and list their regions anew. ``half``: first frame of the slow node."""
    for i in range(pages.size):
        region = pages[i] >> TABLE_SHIFT
        node = SLOW if frames[i] >= half else FAST
        _is_hot(regions, region, thresholds)
        column = STORED if writes[i] else node
        regions.counts[region, column] += 1
        hot = HOT if _is_hot(regions, region, thresholds) else COLD
        which = regions.which[region]
        # One page in slow memory is enough for a region to be listed there.
        if which != NO_LIST and which >> 1 == SLOW:
            node = SLOW
        if which != 2 * node + hot:
            _append(regions, region, 2 * node + hot)
        if regions.counts[region, column] > thresholds.cooling:
            regions.state[CLOCK] += 1
            regions.state[CURSOR + FAST] = regions.state[CURSOR + SLOW] = AT_START


@metered
def look_again(regions: Regions, node: int, limit: int, thresholds: Thresholds) -> int:
    """Go on through a node's hot list: up to ``limit`` regions, which may have become cold; how many were looked at."""
    which = 2 * node + HOT
    head = regions.which.size + which
    region = regions.state[CURSOR + node]
    if region == DONE:
        return 0
    if region == AT_START or regions.which[region] != which:
        region = regions.next[head]
    visited = 0
    while region != head and visited < limit:
        after = regions.next[region]
        if not _is_hot(regions, region, thresholds):
            _append(regions, region, 2 * node + COLD)
        visited += 1
        region = after
    regions.state[CURSOR + node] = DONE if region == head else region
    return visited


@metered
def list_new(regions: Regions, nodes: Nodes, places: Bytes) -> int:
    """List, as cold, the regions with mapped pages that are on no list; how many. ``places``: uint8[R], scratch."""
    half = nodes.page.size // 2
    places[:] = 0
    for frame in range(nodes.page.size):
        if nodes.page[frame] >= 0:
            places[nodes.page[frame] >> TABLE_SHIFT] |= 2 if frame >= half else 1
    found = 0
    for region in range(places.size):
        if places[region] != 0 and regions.which[region] == NO_LIST:
            _append(regions, region, 2 * (SLOW if places[region] & 2 else FAST) + COLD)
            found += 1
    return found


@metered
def listed(regions: Regions, which: int, out: Words) -> int:
    """The regions of a list in order (``out``: int64[R]); how many."""
    head = regions.which.size + which
    region = regions.next[head]
    count = 0
    while region != head:
        out[count] = region
        count += 1
        region = regions.next[region]
    return count


@metered
def relist(regions: Regions, region: int, which: int) -> None:
    """Put a region at the end of a list."""
    _append(regions, region, which)


CONSTANTS = Param("constants", "sosp", "", "HeMem's two published sets: that of the paper's submission (a sample in "
                  "5003 events, hot at 8, cooling above 18, all at once), or that of the public code (19997, 4, 10, "
                  "8192 regions at a time, and a policy thread that never sleeps)", "cuhk-mass/hemem, aaa78a9 and HEAD",
                  ("sosp", "head"))  # fmt: skip
TURN = Param("turn_ms", 3, "ms", "turns in which a thread that never sleeps shares its vCPU with the workload",
             "kernel/sched/fair.c: sched_min_granularity of 8 CPUs or more", (), 1, 1000)  # fmt: skip
SETS = {"sosp": (Thresholds(8, 8, 18), 0), "head": (Thresholds(4, 4, 10), 8192)}
"""Thresholds, and how many regions are looked at again at a time (0 = all)."""
POLICY_CPU = 2
"""The CPU that the policy thread is pinned to (src/hemem.h)."""


class FifoLists(Classifier):
    """Regions in four lists; the first hot slow ones are to go up, the first cold fast ones down."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        published, self._batch = SETS[str(params["constants"])]
        own = (int(params[name]) for name in ("hot_loads", "hot_stores", "cooling_count"))
        self.thresholds = Thresholds(*(mine or theirs for mine, theirs in zip(own, published, strict=True)))
        count = -(-view.pages // TABLE_PAGES)
        self.regions = new_regions(count)
        # Compiled before the VM runs: whether a page moves behind the lists' back, no short run can tell.
        relist(np.zeros_like(view.meter.book), new_regions(1), 0, 0)
        self._scratch, self._order = np.zeros(count, np.uint8), np.zeros(count, np.int64)
        self._resident = 0
        """Pages in use when new regions were last looked for."""
        self.never_sleeps = params["constants"] == "head"

    def start(self) -> None:
        self.schedule("policy", self.view.now + int(self.params["policy_ms"]) * PS_PER_MS)

    def thread_of(self, name: str) -> AgentThread:
        return AgentThread(vcpu=POLICY_CPU % self.view.vcpus, user=True)

    def _observe(self, evidence: Evidence) -> None:
        view = self.view
        pages, writes = evidence.pages, evidence.writes
        pages, writes = pages[pages >= 0], writes[pages >= 0]
        frames = view.frames(pages)
        mapped = frames >= 0
        half = view.nodes.page.size // 2
        record(view.meter.book, self.regions, half, pages[mapped], frames[mapped], writes[mapped], self.thresholds)
        view.meter.charge(view.costs.classify_record_ps * int(mapped.sum()))

    def on_timer(self, name: str) -> None:
        """One loop of the policy thread; the migrator works in it."""
        view = self.view
        began = view.now
        resident = int((view.nodes.managed - view.nodes.free_count).sum())
        visited = 0
        if resident - self._resident >= TABLE_PAGES or (resident > self._resident and self._resident == 0):
            self._resident = resident
            visited = list_new(view.meter.book, self.regions, view.nodes, self._scratch)
        for node in (FAST, SLOW):
            limit = self._batch or self.regions.which.size
            visited += look_again(view.meter.book, self.regions, node, limit, self.thresholds)
        view.meter.charge(view.costs.classify_range_ps * visited)
        self.migrator.on_ranking()
        interval = int(self.params["policy_ms"]) * PS_PER_MS
        if self.never_sleeps:
            turn = int(self.params["turn_ms"]) * PS_PER_MS
            view.meter.charge(max(0, turn - (view.now - began)))
            interval = turn
        self.schedule("policy", view.now + interval)

    def _promotions(self, limit: int) -> Words:
        return self._first(SLOW, HOT, limit)

    def _demotions(self, need: int) -> Words:
        return self._first(FAST, COLD, need)

    def _first(self, node: int, hot: int, limit: int) -> Words:
        """Units of the first regions of a list, whole regions, up to ``limit`` pages but one region at least."""
        view = self.view
        found, pages = [np.zeros(0, np.int64)], 0
        if limit > 0:
            count = int(listed(view.meter.book, self.regions, 2 * node + hot, self._order))
            for region in self._order[:count].tolist():
                units = view.on_node(region << TABLE_SHIFT, TABLE_PAGES, node, TABLE_PAGES)
                size = int(view.sizes(units).sum())
                if size == 0:
                    # It was moved since.
                    relist(view.meter.book, self.regions, region, 2 * (1 - node) + hot)
                    continue
                if pages and pages + size > limit:
                    break
                found.append(units)
                pages += size
                if pages >= limit:
                    break
        return np.concatenate(found)

    def hot_set(self) -> Words | None:
        hot = np.flatnonzero((self.regions.which != NO_LIST) & (self.regions.which & 1 == HOT))
        pages = (hot[:, None] * TABLE_PAGES + np.arange(TABLE_PAGES)).reshape(-1)
        return pages[pages < self.view.pages].astype(np.int64)


FIFO_LISTS = Stage(
    name="fifo-lists",
    kind="classifier",
    summary="2 MiB regions, hot by fixed thresholds of loads or stores; first in, first out",
    source="HeMem, SOSP'21, 3.3; src/pebs.c",
    create=FifoLists,
    params=(
        CONSTANTS,
        TURN,
        Param("hot_loads", 0, "samples", "loads that make a region hot; 0 = by `constants`", "src/pebs.h", (),
              0, 1 << 30),
        Param("hot_stores", 0, "samples", "stores that do; 0 = by `constants` (4 in the paper, in no commit)",
              "src/pebs.h", (), 0, 1 << 30),
        Param("cooling_count", 0, "samples", "a count above which all are halved; 0 = by `constants`", "src/pebs.h", (),
              0, 1 << 30),
        Param("policy_ms", 10, "ms", "sleep of the policy thread between two loops", "PEBS_KSWAPD_INTERVAL", (),
              1, 60_000),
    ),
    warm_up={"policy_ms": 2, "hot_loads": 4, "hot_stores": 4, "cooling_count": 64},
    min_run_ps=lambda params: int(params["policy_ms"]) * PS_PER_MS,
)  # fmt: skip
