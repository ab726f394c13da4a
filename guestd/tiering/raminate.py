"""RAMinate (SoCC'16): a hypervisor that moves what is written most from slow to fast memory, with the VM paused.

Made for STT-MRAM, whose writes are what is dear. A thread per VM reads and clears all D bits of the EPT each second;
*corked multi-queues* rank pages by the seconds in which they were written, and every page sinks a level each time it
was not written for its life time; what sinks out of the lowest level is a victim if it lies in fast memory and is
forgotten otherwise. Every 5 s at most 1000 pairs trade places, the VM paused for all of them, with one INVEPT at the
end. It needs 4 KiB EPT entries, so a huge page of the host is split when it is first found dirty.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline
from guestd.meter import metered
from guestd.mm.nodes import FAST, SLOW
from guestd.params import Param
from guestd.tiering.host_help import host_help
from guestd.tiering.pages import expand
from guestd.tiering.policy import Params, Policy
from guestd.tiering.stage import DIRTY, Classifier, Evidence, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Bytes, Ints, Mask, Words
from proto.counters import C
from proto.units import PS_PER_MS

_PAPER = "SoCC'16 (RAMinate)"
LEVELS = 8
"""Queues Q0 to Q7."""
VICTIMS, NOWHERE = LEVELS, LEVELS + 1
"""Instead of a level: on the queue of victims, on none."""

SCAN_PARAMS = (
    Param("dirty_scan_ms", 1000, "ms", "time between two scans of all D bits", _PAPER, (), 1, 600_000),
    Param("flush_after_scan", True, "", "one flush request after a scan that cleared a D bit; without it a page that "
          "is dirty in a TLB looks clean", "unpublished: the paper does not say; SDM vol. 3 asks for it"),
)  # fmt: skip
QUEUE_PARAMS = (
    Param("life_ms", 5000, "ms", "life time: a page that was not written for as long sinks a level", _PAPER, (),
          1, 600_000),
    Param("sink_ms", 1000, "ms", "time between two looks at the heads of the queues", _PAPER, (), 1, 600_000),
    Param("lowest_level", 0, "level", "lowest queue from which pages are promoted",
          "unpublished: the scan begins at the highest queue; where it ends is not said", (), 0, LEVELS - 1),
)  # fmt: skip
SWAP_PARAMS = (
    Param("swap_ms", 5000, "ms", "time between two batches", _PAPER, (), 1, 600_000),
    Param("most_pairs", 1000, "pairs", "pairs of 4 KiB in a batch", _PAPER, (), 1, 1_000_000),
)  # fmt: skip


class EptDirtyScan(Tracker):
    """Which pages were written since the last scan, by the D bits of the EPT."""

    def start(self) -> None:
        self.schedule("scan", self.view.now + int(self.params["dirty_scan_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        view = self.view
        self.schedule("scan", view.now + int(self.params["dirty_scan_ms"]) * PS_PER_MS)
        pages = self._split(view.scan_dirty(0, view.pages, flush=bool(self.params["flush_after_scan"])))
        self.classifier.observe(Evidence(view, pages=pages, writes=np.ones(pages.size, np.bool_)))
        self.classifier.end_of_round()

    def _split(self, units: Words) -> Words:
        """D bits of 4 KiB are wanted: a huge page is split, and each of its pages may be the one that was written."""
        sizes = self.view.sizes(units)
        huge = np.flatnonzero(sizes > 1)
        sizes[huge[~self.view.split(units[huge])]] = 1
        return expand(units, sizes)


class Queues(NamedTuple):
    """Nine lists over pages, linked through arrays; n = pages. Heads are numbered from n on, by level."""

    updates: Words
    """int64[n]: updates seen."""
    level: Bytes
    """uint8[n]: 0 to 7, VICTIMS or NOWHERE."""
    since_ps: Words
    """int64[n]: when the page was last updated or sank."""
    next: Ints
    """int32[n + 9]: towards the tail."""
    previous: Ints
    size: Words
    """int64[9]"""


def new_queues(pages: int) -> Queues:
    """All pages on no queue."""
    links = np.arange(pages + LEVELS + 1, dtype=np.int32)
    level = np.full(pages, NOWHERE, np.uint8)
    return Queues(np.zeros(pages, np.int64), level, np.zeros(pages, np.int64), links, links.copy(),
                  np.zeros(LEVELS + 1, np.int64))  # fmt: skip


@inline
def _leave(q: Queues, page: int) -> None:
    if q.level[page] != NOWHERE:
        before, after = q.previous[page], q.next[page]
        q.next[before], q.previous[after] = after, before
        q.size[q.level[page]] -= 1
        q.level[page] = NOWHERE


@inline
def _enter(q: Queues, page: int, level: int, now: int) -> None:
    """Put a page that is on no queue on the tail of one."""
    head = q.level.size + level
    tail = q.previous[head]
    q.next[tail] = q.previous[head] = page
    q.previous[page], q.next[page] = tail, head
    q.level[page] = level
    q.size[level] += 1
    q.since_ps[page] = now


@metered
def update(q: Queues, pages: Words, now: int) -> None:
    """Each page was updated: it goes to the tail of queue floor(log2 n) after n updates, at most Q7."""
    for page in pages:
        q.updates[page] += 1
        level, rest = 0, q.updates[page] >> 1
        while rest > 0 and level < LEVELS - 1:
            level += 1
            rest >>= 1
        _leave(q, page)
        _enter(q, page, level, now)


@metered
def sink(q: Queues, now: int, life_ps: int, out: Words) -> tuple[int, int]:
    """From the head of each queue, what is older than its life time sinks a level; out of Q0, into ``out``.

    Returns how many are in ``out``, in order, and how many pages were looked at. A page sinks one level at a time.
    """
    left = visited = 0
    for level in range(LEVELS):
        head = q.level.size + level
        page = q.next[head]
        while page != head and now - q.since_ps[page] > life_ps:
            _leave(q, page)
            if level > 0:
                _enter(q, page, level - 1, now)
            else:
                out[left] = page
                left += 1
            visited += 1
            page = q.next[head]
        visited += 1
    return left, visited


@metered
def retire(q: Queues, pages: Words, fast: Mask, now: int) -> None:
    """What sank out of Q0: a victim in fast memory, forgotten in slow memory."""
    for i in range(pages.size):
        if fast[i]:
            _enter(q, pages[i], VICTIMS, now)
        else:
            q.updates[pages[i]] = 0


@metered
def forget(q: Queues, pages: Words) -> None:
    """Take pages off their queues, without a past."""
    for page in pages:
        _leave(q, page)
        q.updates[page] = 0


@metered
def from_the_top(q: Queues, lowest: int, out: Words) -> int:
    """The pages of Q7 down to queue ``lowest``, each from tail to head; how many."""
    found = 0
    for level in range(LEVELS - 1, lowest - 1, -1):
        head = q.level.size + level
        page = q.previous[head]
        while page != head:
            out[found] = page
            found += 1
            page = q.previous[page]
    return found


@metered
def victims(q: Queues, out: Words) -> int:
    """The victims, from head to tail; how many."""
    found = 0
    head = q.level.size + VICTIMS
    page = q.next[head]
    while page != head:
        out[found] = page
        found += 1
        page = q.next[page]
    return found


class CorkedMultiQueue(Classifier):
    """Eight queues by the logarithm of the number of updates, whose pages sink with time; and the queue of victims."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.queues = new_queues(view.pages)
        self._life_ps = int(params["life_ms"]) * PS_PER_MS
        self._scratch = np.empty(view.pages, np.int64)

    def start(self) -> None:
        self.schedule("sink", self.view.now + int(self.params["sink_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        view = self.view
        self.schedule("sink", view.now + int(self.params["sink_ms"]) * PS_PER_MS)
        left, visited = sink(view.meter.book, self.queues, view.now, self._life_ps, self._scratch)
        pages = self._scratch[:left].copy()
        retire(view.meter.book, self.queues, pages, view.nodes_of(pages) == FAST, view.now)
        view.meter.charge(view.costs.classify_range_ps * visited)
        self.migrator.on_ranking()

    def _observe(self, evidence: Evidence) -> None:
        view = self.view
        pages = evidence.pages[evidence.pages >= 0]
        update(view.meter.book, self.queues, view.heads(pages), view.now)
        view.meter.charge(view.costs.classify_record_ps * pages.size)

    def _promotions(self, limit: int) -> Words:
        view = self.view
        count = int(from_the_top(view.meter.book, self.queues, int(self.params["lowest_level"]), self._scratch))
        pages = self._scratch[:count]
        slow = np.flatnonzero(view.nodes_of(pages) == SLOW)
        slow = slow[np.cumsum(view.sizes(pages[slow])) <= limit]
        # The scan ends with the last page that it takes, or has seen them all.
        seen = int(slow[-1]) + 1 if slow.size else count
        view.meter.charge(view.costs.classify_range_ps * seen)
        return pages[slow].copy()

    def _demotions(self, need: int) -> Words:
        view = self.view
        pages = self._scratch[: int(victims(view.meter.book, self.queues, self._scratch))].copy()
        nodes = view.nodes_of(pages)
        forget(view.meter.book, self.queues, pages[nodes != FAST])
        pages = pages[nodes == FAST]
        sizes = view.sizes(pages)
        pages = pages[np.cumsum(sizes) - sizes < need]
        view.meter.charge(view.costs.classify_range_ps * pages.size)
        return pages

    def hot_set(self) -> Words | None:
        """As many pages as fit fast memory, from the highest queue down, the latest updates first."""
        queues = self.queues
        ranked = np.flatnonzero(queues.level < LEVELS)
        order = np.lexsort((-queues.since_ps[ranked], -queues.level[ranked].astype(np.int64)))
        return ranked[order][: int(self.view.nodes.managed[FAST])]


class PausedSwap(Migrator):
    """Every few seconds a batch of pairs trades places, with the VM paused."""

    def start(self) -> None:
        self.schedule("swap", self.view.now + int(self.params["swap_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        view = self.view
        due_ps = view.now + int(self.params["swap_ms"]) * PS_PER_MS
        wanted = self.classifier.promotions(int(self.params["most_pairs"]))
        cold = self.classifier.demotions(int(view.sizes(wanted).sum())) if wanted.size else wanted
        slow, fast = view.match(wanted, cold)
        view.counters[C.vmstat__pgpromote_success] += host_help(view).exchange_stopped(slow, fast)
        self.schedule("swap", max(due_ps, view.now))


EPT_DIRTY_SCAN = Stage(
    name="ept-dirty-scan",
    kind="tracker",
    summary="a host thread reads and clears all D bits of the EPT each second",
    source=_PAPER,
    create=EptDirtyScan,
    params=SCAN_PARAMS,
    views=("host",),
    gives=frozenset({DIRTY}),
    warm_up={"dirty_scan_ms": 2},
    min_run_ps=lambda params: int(params["dirty_scan_ms"]) * PS_PER_MS,
)
CORKED_MULTI_QUEUE = Stage(
    name="corked-multi-queue",
    kind="classifier",
    summary="eight queues by the logarithm of updates, whose pages sink with time; what sinks out is a victim",
    source=_PAPER,
    create=CorkedMultiQueue,
    params=QUEUE_PARAMS,
    warm_up={"life_ms": 8, "sink_ms": 2},
    min_run_ps=lambda params: (int(params["life_ms"]) + 2 * int(params["sink_ms"])) * PS_PER_MS,
)
PAUSED_SWAP = Stage(
    name="paused-swap",
    kind="migrator",
    summary="batches of at most 1000 pairs trade places while the VM is paused, with one INVEPT each",
    source=_PAPER,
    create=PausedSwap,
    params=SWAP_PARAMS,
    views=("host",),
    warm_up={"swap_ms": 5},
    min_run_ps=lambda params: int(params["swap_ms"]) * PS_PER_MS,
)

POLICY = composed(
    Policy(
        name="raminate",
        summary="EPT dirty bits, corked multi-queues, paused batches of swaps; it sees writes only",
        view="host",
        source="RAMinate, SoCC'16",
        left_out="the daemon that gets dirty pages from the kernel's thread: both are one thread; memory whose writes "
        "cost more than this slow tier's",
        # Pages have to rise in the queues; then a fiftieth of memory is swapped in batches (a tenth is hot).
        gains_ps=lambda params, pages: (
            (int(params["life_ms"]) + -(-pages // (50 * int(params["most_pairs"]))) * int(params["swap_ms"]))
            * PS_PER_MS
        ),
    ),
    EPT_DIRTY_SCAN,
    CORKED_MULTI_QUEUE,
    PAUSED_SWAP,
)
