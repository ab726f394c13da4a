"""HeteroOS (ISCA'17, on Xen): a guest that knows of both tiers places by type and decides; the host scans for it.

The guest has a node for each tier. On first touch it puts what should be fast there at once (`guestd.placement`), to
save migrations. Each period it hands the host a list of gPA ranges: those that hold its user's pages, and neither free
frames nor page tables, as many at a time as a list takes. A thread of the host reads and clears the EPT's A bits of
exactly that list, with one flush of the whole VM, as it knows no gVA (`guestd.tiering.host_scan`). From the bits that
come back the guest ranks its pages: of each it knows in which of the last scans it was accessed, the latest weighing
most, so that their order is about that of their last use (ageing). It migrates what it decides to, on its own vCPUs and
with its own flushes: first out of the fast node as much as it takes, then into it. VMs share the host's fast memory by
weight (`fleet.weighted_sharing`). Neither period nor sizes were published. The host's work is its own CPU, in its
accounts of the VM; the policy's stages have the guest's part.
"""

from typing import NamedTuple

import numpy as np

from guestd.meter import metered
from guestd.mm.nodes import FAST, NO_PAGE, SLOW, WMARK_HIGH, Nodes
from guestd.params import Param
from guestd.tiering.host_scan import host_scan
from guestd.tiering.policy import Params, Policy
from guestd.tiering.stage import ACCESSED, Classifier, Evidence, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Bytes, Words
from proto.counters import C
from proto.messages import MOST_LISTED, MOST_RANGES
from proto.units import PS_PER_MS

_PAPER = "ISCA'17 (HeteroOS)"

LIST_PARAMS = (
    Param("list_ms", 1000, "ms", "time between two lists for the host", "unpublished: 100 ms to 1 s is commonly quoted",
          (), 1, 600_000),
    Param("list_pages", MOST_LISTED, "pages", "most pages of a list; the next list goes on where it ended",
          "unpublished: 4 GiB, of which the host has then looked at each 4 KiB page in tens of milliseconds", (), 1,
          MOST_LISTED),
)  # fmt: skip
AGEING_PARAMS = (
    Param("scans", 8, "scans", "how many scans of a page are remembered", "unpublished: a byte a page", (), 1, 8),
    Param("hot_scans", 7, "scans", "a page is hot if it was accessed in as many of them",
          "unpublished: all but one, as in a second of a busy VM many cold pages are accessed, too", (), 1, 8),
)  # fmt: skip
MIGRATE_PARAMS = (
    Param("most_promoted", 4096, "pages", "most pages promoted after a scan", "unpublished: 16 MiB", (), 1, 10_000_000),
)
SHARE_PARAMS = (
    Param("weight", 1, "", "of the VM: the fast memory of all VMs of this design is pooled, and shared in proportion",
          "unpublished: equal", (), 1, 1_000_000),
)  # fmt: skip

HISTORIES = 256
"""What a byte of history can be."""


class Listed(NamedTuple):
    """A list of gPA ranges."""

    ranges: int
    pages: int
    frames: int
    """Frames that were looked at for it."""
    end: int
    """The frame to go on from."""


@metered
def _list(nodes: Nodes, start: int, limit: int, ranges: Words) -> tuple[int, int, int, int]:
    """See `list_frames`."""
    span = nodes.page.size >> 1
    count = pages = looked = 0
    frame = start
    while frame < nodes.page.size:
        node = 1 if frame >= span else 0
        if frame - node * span >= nodes.managed[node]:
            frame = (node + 1) * span
            continue
        if nodes.page[frame] != NO_PAGE:
            follows = count > 0 and ranges[count - 1, 0] + ranges[count - 1, 1] == frame
            if pages == limit or (not follows and count == ranges.shape[0]):
                break
            if follows:
                ranges[count - 1, 1] += 1
            else:
                ranges[count, 0], ranges[count, 1] = frame, 1
                count += 1
            pages += 1
        looked += 1
        frame += 1
    return count, pages, looked, frame


def list_frames(book: Words, nodes: Nodes, start: int, limit: int, ranges: Words) -> Listed:
    """The frames from ``start`` on that hold a page of the user: ``limit`` at most, and no more than fit ``ranges``.

    ``ranges``: int64[n, 2], (first, count) each, rising.
    """
    return Listed(*(int(value) for value in _list(book, nodes, start, limit, ranges)))


@metered
def accessed(ranges: Words, bits: Bytes, out: Words) -> int:
    """The frames of a list whose bits are set, in its order; how many."""
    at = found = 0
    for i in range(ranges.shape[0]):
        for frame in range(ranges[i, 0], ranges[i, 0] + ranges[i, 1]):
            if (bits[at >> 3] >> (at & 7)) & 1 != 0:
                out[found] = frame
                found += 1
            at += 1
    return found


@metered
def age(history: Bytes, seen: Bytes, scans: int) -> None:
    """All pages were scanned once more: each one's highest of ``scans`` bits is now as ``seen``, which is emptied."""
    for page in range(history.size):
        history[page] = (history[page] >> 1) | (seen[page] << (scans - 1))
        seen[page] = 0


@metered
def in_order(history: Bytes, least: int, hot: bool, starts: Words, out: Words) -> int:
    """Pages that are ``hot``, the latest used first, or that are not, the ones not used for longest first; how many.

    Hot: accessed in ``least`` scans. By a sort into buckets, pages alike by number. ``starts``: int64[257], scratch.
    """
    starts[:] = 0
    for page in range(history.size):
        starts[history[page]] += 1
    total = 0
    for i in range(256):
        value = 255 - i if hot else i
        bits = 0
        for bit in range(8):
            bits += (value >> bit) & 1
        size = starts[value]
        starts[value] = total if (bits >= least) == hot else -1
        total += size if (bits >= least) == hot else 0
    for page in range(history.size):
        value = history[page]
        if starts[value] >= 0:
            out[starts[value]] = page
            starts[value] += 1
    return total


class HostScanList(Tracker):
    """Lists for the host, one a period, round the user's frames; what the host found goes on to the classifier."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._ranges = np.empty((MOST_RANGES, 2), np.int64)
        self._cursor = 0
        self._due_ps = 0

    def start(self) -> None:
        self.schedule("list", self.view.now + int(self.params["list_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        view = self.view
        if name == "list":
            self._due_ps = view.now + int(self.params["list_ms"]) * PS_PER_MS
            self._request()
        elif view.now < host_scan(view).due_ps():
            self.schedule("read", host_scan(view).due_ps())
        else:
            self._read()

    def _request(self) -> None:
        view, costs = self.view, self.view.costs
        listed = list_frames(view.meter.book, view.nodes, self._cursor, int(self.params["list_pages"]), self._ranges)
        self._cursor = listed.end if listed.end < view.nodes.page.size else 0
        view.meter.charge(costs.scan_pte_ps * listed.frames)
        if listed.ranges:
            # The host is told by a hypercall; the list itself lies in memory that both share.
            view.meter.charge(costs.vmexit_ps)
            host_scan(view).request(self._ranges[: listed.ranges].copy())
            self.schedule("read", host_scan(view).due_ps())
        else:
            self.schedule("list", max(self._due_ps, view.now))

    def _read(self) -> None:
        view = self.view
        answer = host_scan(view).take_answer()
        frames = np.empty(int(answer.ranges[:, 1].sum()), np.int64)
        count = int(accessed(view.meter.book, answer.ranges, answer.bits, frames))
        view.meter.charge(view.costs.scan_pte_ps * (answer.bits.size // 8 + count))
        self.classifier.observe(Evidence(view, pages=view.pages_of(frames[:count].astype(np.int32))))
        if self._cursor == 0:
            self.classifier.end_of_round()
        self.schedule("list", max(self._due_ps, view.now))


class Ageing(Classifier):
    """Of each page, in which of the last scans it was accessed; hot is what was in enough of them."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.history = np.zeros(view.pages, np.uint8)
        self._seen = np.zeros(view.pages, np.uint8)
        self._starts = np.empty(HISTORIES, np.int64)
        self._order = np.empty(view.pages, np.int64)

    def _observe(self, evidence: Evidence) -> None:
        view = self.view
        pages = view.heads(evidence.pages[evidence.pages >= 0])
        self._seen[pages] = 1
        view.meter.charge(view.costs.classify_record_ps * pages.size)

    def _end_of_round(self) -> None:
        view = self.view
        age(view.meter.book, self.history, self._seen, int(self.params["scans"]))
        resident = int((view.nodes.managed - view.nodes.free_count).sum())
        view.meter.charge(view.costs.classify_range_ps * resident)
        self.migrator.on_ranking()

    def _promotions(self, limit: int) -> Words:
        return self._some(True, SLOW, limit)

    def _demotions(self, need: int) -> Words:
        return self._some(False, FAST, need)

    def _some(self, hot: bool, node: int, limit: int) -> Words:
        view = self.view
        least = int(self.params["hot_scans"])
        count = int(in_order(view.meter.book, self.history, least, hot, self._starts, self._order))
        pages = self._order[:count]
        there = np.flatnonzero(view.nodes_of(pages) == node)
        sizes = view.sizes(pages[there])
        there = there[np.cumsum(sizes) - sizes < limit]
        view.meter.charge(view.costs.classify_range_ps * (int(there[-1]) + 1 if there.size else count))
        # A page in a huge one that was collapsed since has a history, and is nobody's head.
        return pages[there][view.heads(pages[there]) == pages[there]]

    def hot_set(self) -> Words | None:
        bits = np.unpackbits(self.history[:, None], axis=1).sum(axis=1)
        return np.flatnonzero(bits >= int(self.params["hot_scans"]))


class GuestDecides(Migrator):
    """After each round a kernel thread of the guest: the cold out of fast memory, as much as the hot will take."""

    def on_ranking(self) -> None:
        view = self.view
        with view.meter.stage(self.books):
            wanted = self.classifier.promotions(int(self.params["most_promoted"]))
            keep = view.watermark(FAST, WMARK_HIGH)
            short = int(view.sizes(wanted).sum()) + keep - view.free(FAST)
            if wanted.size and short > 0:
                self._move(self.classifier.demotions(short), SLOW, view.watermark(SLOW, WMARK_HIGH))
            self._move(wanted, FAST, keep)

    def _move(self, pages: Words, node: int, keep: int) -> None:
        view = self.view
        sizes = view.sizes(pages)
        moved = view.move(pages, node, keep)
        name = C.vmstat__pgpromote_success if node == FAST else C.vmstat__pgdemote_kswapd
        view.counters[name] += int(sizes[moved].sum())


HOST_SCAN_LIST = Stage(
    name="host-scan-list",
    kind="tracker",
    summary="the guest lists gPA ranges, and the host reads and clears their A bits, with one full flush a list",
    source=_PAPER,
    create=HostScanList,
    params=LIST_PARAMS,
    views=("guest",),
    gives=frozenset({ACCESSED}),
    warm_up={"list_ms": 1},
    min_run_ps=lambda params: int(params["list_ms"]) * PS_PER_MS,
)
AGEING = Stage(
    name="ageing",
    kind="classifier",
    summary="of each page, in which of the last scans it was accessed; hot by their number, in order of last use",
    source=_PAPER,
    create=Ageing,
    params=AGEING_PARAMS,
    warm_up={"scans": 2, "hot_scans": 2},
)
GUEST_DECIDES = Stage(
    name="guest-decides",
    kind="migrator",
    summary="a kernel thread of the guest demotes as much as its hot pages need, and promotes them",
    source=_PAPER,
    create=GuestDecides,
    params=MIGRATE_PARAMS,
)

POLICY = composed(
    Policy(
        name="heteroos",
        summary="placement by type in the guest; the host scans a list that the guest gives it; the guest migrates",
        view="guest",
        source="HeteroOS, ISCA'17; notes on it, as neither code nor full text was at hand",
        left_out="shares that follow a VM's demand (it is taken to want all of its memory, so weights alone decide); "
        "types beside page tables, heap and other anonymous memory (page cache, slab, network buffers); the host's "
        "scan in its stages' CPU (it is in the host's account of the VM)",
        places_by_type=True,
        shares_fast=True,
        own_params=SHARE_PARAMS,
        no_gain="between two scans of a page, a second or more apart, GUPS accesses cold pages, too, so that A bits "
        "say nothing; with shorter ones it finds the hot set (tests/guestd/tiering/test_heteroos.py)",
    ),
    HOST_SCAN_LIST,
    AGEING,
    GUEST_DECIDES,
)
