"""HeteroVisor (VEE'15, on Xen): the hypervisor finds hot pages by A bits of the guest's page table and moves them.

Each period a thread of the host walks the guest's page table, reads and clears its A bits, and flushes the whole VM,
as it knows no gVA to flush by. Pages are kept in order of their last use (LRU): the latest in slow memory are promoted,
and the ones not used for longest in fast memory make room, each moved by a remap with a flush of its own. Period and
batch are unpublished.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline
from guestd.meter import metered
from guestd.mm.nodes import FAST, SLOW, WMARK_HIGH
from guestd.params import Param
from guestd.tiering.host_help import host_help
from guestd.tiering.policy import Params, Policy
from guestd.tiering.stage import ACCESSED, Classifier, Evidence, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Ints, Words
from proto.counters import C
from proto.units import PS_PER_MS, PS_PER_NS

_PAPER = "VEE'15 (HeteroVisor)"

SCAN_PARAMS = (
    Param("gpt_scan_ms", 100, "ms", "time between two walks of the guest's page table",
          "unpublished: the abstract names none; the short end of what such scans use (100 ms to 1 s)", (), 1, 600_000),
)  # fmt: skip
REMAP_PARAMS = (
    Param("batch_pages", 512, "pages", "most pages promoted after a scan", "unpublished: 2 MiB, as migrate_pages takes",
          (), 1, 1_000_000),
)  # fmt: skip


class GptAccessScan(Tracker):
    """A bits of the guest's page table, read by the host: one full flush a scan."""

    def start(self) -> None:
        self.schedule("scan", self.view.now + int(self.params["gpt_scan_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        help_ = host_help(self.view)
        if name == "scan":
            self._due_ps = self.view.now + int(self.params["gpt_scan_ms"]) * PS_PER_MS
            help_.request_guest_walk()
            self.schedule("read", help_.barrier_ps)
        else:
            self.classifier.observe(Evidence(self.view, pages=help_.accessed_in_guest()))
            self.classifier.end_of_round()
            self.schedule("scan", max(self._due_ps, self.view.now))


class Order(NamedTuple):
    """A list over pages from the latest used (after the head, number n) to the one not used for longest; n = pages."""

    next: Ints
    """int32[n + 1]: -1 for a page that was never used."""
    previous: Ints
    used: Words
    """int64[n]: number of the scan that found it used last; 0 = none."""


def new_order(pages: int) -> Order:
    """No page was used yet."""
    links = np.full(pages + 1, -1, np.int32)
    links[pages] = pages
    return Order(links, links.copy(), np.zeros(pages, np.int64))


@inline
def _unlink(order: Order, page: int) -> None:
    before, after = order.previous[page], order.next[page]
    order.next[before], order.previous[after] = after, before


@metered
def use(order: Order, pages: Words, scan: int) -> None:
    """Each page was used by the time of ``scan``: it is the latest now."""
    head = order.used.size
    for page in pages:
        if order.next[page] >= 0:
            _unlink(order, page)
        first = order.next[head]
        order.next[head] = order.previous[first] = page
        order.previous[page], order.next[page] = head, first
        order.used[page] = scan


@metered
def used_since(order: Order, scan: int, out: Words) -> int:
    """The pages used in ``scan`` or later, the latest first; how many."""
    found = 0
    page = order.next[order.used.size]
    while page != order.used.size and order.used[page] >= scan:
        out[found] = page
        found += 1
        page = order.next[page]
    return found


@metered
def unused_since(order: Order, scan: int, out: Words) -> int:
    """The pages last used before ``scan``, the one not used for longest first; how many."""
    found = 0
    page = order.previous[order.used.size]
    while page != order.used.size and order.used[page] < scan:
        out[found] = page
        found += 1
        page = order.previous[page]
    return found


class LastUse(Classifier):
    """Pages in order of their last use: hot is what the last round found, cold what it did not, oldest first."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.order = new_order(view.pages)
        self._scan = 1
        self._scratch = np.empty(view.pages, np.int64)

    def _observe(self, evidence: Evidence) -> None:
        view = self.view
        pages = evidence.pages[evidence.pages >= 0]
        use(view.meter.book, self.order, view.heads(pages), self._scan)
        view.meter.charge(view.costs.classify_record_ps * pages.size)

    def _end_of_round(self) -> None:
        self.migrator.on_ranking()
        self._scan += 1

    def _latest(self) -> int:
        """The last round that has found anything."""
        head = self.order.used.size
        first = int(self.order.next[head])
        return int(self.order.used[first]) if first != head else 0

    def _promotions(self, limit: int) -> Words:
        pages = self._scratch[: int(used_since(self.view.meter.book, self.order, self._latest(), self._scratch))]
        return self._on_node(pages, SLOW, limit)

    def _demotions(self, need: int) -> Words:
        pages = self._scratch[: int(unused_since(self.view.meter.book, self.order, self._latest(), self._scratch))]
        return self._on_node(pages, FAST, need)

    def _on_node(self, pages: Words, node: int, limit: int) -> Words:
        """Of ``pages`` in order those on ``node``, up to ``limit`` pages; costs what it takes to come as far."""
        view = self.view
        there = np.flatnonzero(view.nodes_of(pages) == node)
        there = there[np.cumsum(view.sizes(pages[there])) <= limit]
        seen = int(there[-1]) + 1 if there.size else pages.size
        view.meter.charge(view.costs.classify_range_ps * seen)
        return pages[there].copy()

    def hot_set(self) -> Words | None:
        latest = self._latest()
        return np.flatnonzero(self.order.used == latest) if latest else np.zeros(0, np.int64)


class Remap(Migrator):
    """After each round: the hot into free fast memory, and the cold out of it, so that the next round finds room."""

    def on_ranking(self) -> None:
        view = self.view
        with view.meter.stage(self.books):
            batch = int(self.params["batch_pages"])
            wanted = self.classifier.promotions(batch)
            keep = view.watermark(FAST, WMARK_HIGH)
            room = view.free(FAST) - keep
            sizes = view.sizes(wanted)
            short = int(sizes.sum()) - max(0, room)
            moved = view.move(wanted, FAST, keep)
            view.counters[C.vmstat__pgpromote_success] += int(sizes[moved].sum())
            if short > 0:
                cold = self.classifier.demotions(short)
                sizes = view.sizes(cold)
                moved = view.move(cold, SLOW, view.watermark(SLOW, WMARK_HIGH))
                view.counters[C.vmstat__pgdemote_kswapd] += int(sizes[moved].sum())


GPT_ACCESS_SCAN = Stage(
    name="gpt-access-scan",
    kind="tracker",
    summary="the host reads and clears A bits of the guest's page table, with one full flush a scan",
    source=_PAPER,
    create=GptAccessScan,
    params=SCAN_PARAMS,
    views=("host",),
    gives=frozenset({ACCESSED}),
    warm_up={"gpt_scan_ms": 2},
    min_run_ps=lambda params: int(params["gpt_scan_ms"]) * PS_PER_MS,
)
LAST_USE = Stage(
    name="last-use",
    kind="classifier",
    summary="pages in order of their last use; hot is what the last round found",
    source=_PAPER,
    create=LastUse,
    needs=frozenset({ACCESSED}),
)
REMAP = Stage(
    name="remap",
    kind="migrator",
    summary="the host moves hot pages into free fast memory and makes room by cold ones, each with a flush",
    source=_PAPER,
    create=Remap,
    params=REMAP_PARAMS,
)


def _gains_ps(params: Params, pages: int) -> int:
    """A fiftieth of memory, of which a tenth is hot, in batches, one a scan; 100 ns to look at a page are ample."""
    scan = int(params["gpt_scan_ms"]) * PS_PER_MS + pages * 100 * PS_PER_NS
    return -(-pages // (50 * int(params["batch_pages"]))) * scan


POLICY = composed(
    Policy(
        name="heterovisor",
        summary="A bits of the guest's page table scanned by the host, LRU order, remaps",
        view="host",
        source="HeteroVisor, VEE'15",
        left_out="elasticity states, in which a VM asks for another mix of memory and speed (shares are static); what "
        "it costs to intercept a guest's page-table updates, an exit each time it maps a page",
        gains_ps=_gains_ps,
    ),
    GPT_ACCESS_SCAN,
    LAST_USE,
    REMAP,
)
