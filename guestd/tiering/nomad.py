"""Nomad (OSDI'24): TPP's hint faults, but promotion off the fault path, by transactions, and not exclusive.

A page that faults goes on a list. Each later fault looks back at the 20 last of them (decide_queue_page of Nomad's
module): one that is young and active is put on the promotion queue, one that is young and inactive is marked accessed,
one that is neither is forgotten once it is further back. One worker drains the queue, a ring of 512. It copies a page
while it stays mapped, and takes the copy for good only if the page was not written meanwhile; otherwise it tries again,
up to 10 passes in all. The old frame stays as the page's shadow until the page is written, so that demoting it while
it is clean takes no copy. kswapd is TPP's. Left out: huge pages, which move as in TPP but by the worker; the retry of
pages with several mappings; the kernel's LRU add batches (pagevecs).
"""

import numpy as np

from guestd.meter import metered
from guestd.mm.kswapd import SWAP_CLUSTER_MAX, Kswapd
from guestd.mm.nodes import F_ACTIVE, FAST, NO_PAGE, SLOW, WMARK_DEMOTE, WMARK_HIGH, WMARK_LOW, WMARK_MIN, Nodes, mark
from guestd.params import Param
from guestd.tiering.copies import CopyView
from guestd.tiering.policy import Params, Policy
from guestd.tiering.stage import Evidence, Migrator, Stage, composed
from guestd.tiering.tpp import HINT_FAULTS, FaultRanked, gains_ps
from guestd.tiering.view import PageView
from proto.arrays import Ints, Mask, Words
from proto.counters import C

CHUNK = 64
"""Pages that the worker copies in one go before it lets the scheduler choose a vCPU for it again; unpublished."""


@metered
def look_back(nodes: Nodes, recent: Words, frames: Ints, young: Mask, length: int, distance: int, faults: Words,
              fault_frames: Ints, hot: Words) -> tuple[int, int, int, int, int]:  # fmt: skip
    """Look back from each fault in turn at the ones before, newest first; then it is the newest, and young.

    ``recent``, ``frames``, ``young``: the list, of which ``length`` are filled: pages, the frames that they were seen
    in (NO_PAGE: it has changed, the page is forgotten), accessed bits. Returns its new length, the number of ``hot``
    pages (young and active), entries looked at, pages marked accessed and pages activated.
    """
    found = visited = marked = activated = 0
    for fault in range(faults.size):
        kept = 0
        for i in range(length):
            page, frame = recent[i], frames[i]
            visited += 1
            if frame == NO_PAGE:
                continue
            if young[i] and (nodes.flags[frame] & F_ACTIVE) != 0:
                hot[found] = page
                found += 1
                continue
            if young[i]:
                activated += mark(nodes, frame)
                marked += 1
            elif i > distance:
                continue
            recent[kept], frames[kept], young[kept] = page, frame, young[i]
            kept += 1
        length = min(kept + 1, recent.size)
        for i in range(length - 1, 0, -1):
            recent[i], frames[i], young[i] = recent[i - 1], frames[i - 1], young[i - 1]
        recent[0], frames[0], young[0] = faults[fault], fault_frames[fault], True
    return length, found, visited, marked, activated


class LookBack(FaultRanked):
    """See the module. A page is wanted when a later fault finds it hot, or when it faults again before it was moved."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._distance = int(params["look_back"])
        # What is young stays on the list beyond the distance until it is active, at most two faults more.
        room = self._distance + 8
        self._recent, self._frames = np.zeros(room, np.int64), np.zeros(room, np.int32)
        self._length = 0

    def _wants(self, evidence: Evidence) -> Mask:
        view, length = self.view, self._length
        pages = view.heads(evidence.pages)
        again = np.isin(pages, self._distinct_hot())
        frames = view.frames(pages)
        slow = view.nodes_of(pages) == SLOW
        known = self._recent[:length]
        young = np.zeros(self._recent.size, np.bool_)
        young[:length] = view.test_young(known, rmap=False)
        self._frames[:length][view.frames(known) != self._frames[:length]] = NO_PAGE
        hot = np.empty(length + pages.size, np.int64)
        self._length, found, visited, marked, activated = look_back(
            view.meter.book, view.nodes, self._recent, self._frames, young, length, self._distance, pages[slow],
            frames[slow], hot)  # fmt: skip
        view.counters[C.vmstat__pgactivate] += activated
        # The first look at each was charged above.
        view.meter.charge(view.costs.scan_pte_ps * max(0, visited - length) + view.costs.lru_page_ps * marked)
        if found:
            self._keep(hot[:found])
            self.migrator.on_ranking()
        return again


class Transactional(Migrator):
    """Promotes by a worker, in transactions; demotes by kswapd, to shadows where there are."""

    reclaim_mark: int | None = WMARK_DEMOTE

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        assert isinstance(view, CopyView), "works in a guest's view only"
        self._copies = view
        self._shadow = bool(params["shadow_pages"])
        if self._shadow:
            view.keep_shadows()
        self._kswapd = Kswapd(view, WMARK_DEMOTE, protect=True)
        self._queue = np.zeros(0, np.int64)
        self._todo = np.zeros(0, np.int64)
        """What is left of this pass over what was taken off the queue."""
        self._again = np.zeros(0, np.int64)
        """What is to be tried again in the next."""
        self._passes = 0
        self._working = False

    def on_ranking(self) -> None:
        with self.view.meter.stage(self.books):
            self._enqueue(self.classifier.promotions(int(self.params["promotion_queue"])))

    def on_faults(self, pages: Words, wanted: Mask, cost_ps: Words) -> None:
        with self.view.meter.stage(self.books):
            self._enqueue(pages[wanted])

    def _enqueue(self, pages: Words) -> None:
        view, counters = self.view, self.view.counters
        heads = view.heads(pages)
        pages = heads[np.sort(np.unique(heads, return_index=True)[1])]
        pages = pages[view.nodes_of(pages) == SLOW]
        for known in (self._queue, self._todo, self._again):
            pages = pages[~np.isin(pages, known)]
        room = int(self.params["promotion_queue"]) - self._queue.size
        counters[C.vmstat__nomad_queue_full] += max(0, pages.size - room)
        pages = pages[:room]
        sizes = view.sizes(pages)
        counters[C.vmstat__nomad_queued] += pages.size
        counters[C.vmstat__pgpromote_candidate] += int(sizes.sum())
        counters[C.vmstat__pgpromote_candidate_demoted] += int(sizes[view.was_demoted(view.frames(pages))].sum())
        self._queue = np.concatenate([self._queue, pages])
        if pages.size and not self._working:
            self._working = True
            self.schedule("worker", view.now + view.costs.context_switch_ps)

    def on_timer(self, name: str) -> None:
        """The worker: what was copied arrives, the next chunk departs."""
        pages, done = self._copies.finish_copies()
        self._promoted(int(done.sum()))
        self._again = np.concatenate([self._again, pages[~done]])
        self._reclaim_shadows()
        if self._todo.size == 0:
            self._next_pass()
        chunk, self._todo = self._todo[:CHUNK], self._todo[CHUNK:]
        if chunk.size == 0:
            self._working = False
            return
        self.schedule("worker", self._depart(chunk))

    def _next_pass(self) -> None:
        counters = self.view.counters
        if self._again.size and self._passes < int(self.params["migrate_passes"]):
            self._todo, self._passes = self._again, self._passes + 1
            counters[C.vmstat__nomad_retry] += self._todo.size
        else:
            counters[C.vmstat__pgmigrate_fail] += self._again.size
            self.tracker.on_failed(self._again.size)
            self._todo, self._queue, self._passes = self._queue, self._queue[:0], 1
        self._again = self._again[:0]

    def _depart(self, chunk: Words) -> int:
        """Begin to copy, whole huge pages at once; returns until when it takes."""
        view = self.view
        sizes = view.sizes(chunk)
        huge, base = chunk[sizes > 1], chunk[sizes == 1]
        base = base[view.nodes_of(base) == SLOW]
        # alloc_promote_page: GFP_THISNODE without reclaim falls through to the min watermark.
        keep = view.watermark(FAST, WMARK_MIN)
        moved = view.move(huge, FAST, keep)
        self._promoted(int(view.sizes(huge[moved]).sum()))
        started, until = self._copies.start_copies(base, keep, shadow=self._shadow)
        refused = int(view.sizes(huge[~moved]).sum()) + int((~started).sum())
        view.counters[C.vmstat__pgmigrate_fail_dst_node_full] += refused
        self.tracker.on_failed(refused)
        return until

    def _promoted(self, pages: int) -> None:
        self.view.counters[C.vmstat__pgpromote_success] += pages
        self.view.counters[C.vmstat__numa_pages_migrated] += pages

    def _reclaim_shadows(self) -> None:
        """kswapd of the slow node: below the low watermark, shadows go until the high one (shrink_lruvec's half)."""
        view = self._copies
        if view.free(SLOW) < view.watermark(SLOW, WMARK_LOW):
            while view.free(SLOW) < view.watermark(SLOW, WMARK_HIGH):
                if not view.reclaim_shadows(SWAP_CLUSTER_MAX // 2):
                    break

    def on_pressure(self, budget_ps: int) -> None:
        self._reclaim_shadows()
        self._kswapd.run(budget_ps)


LOOK_BACK = Stage(
    name="look-back",
    kind="classifier",
    summary="a page is hot when one of the next faults finds it young and active",
    source="Nomad 3.1; async_promote_main.c, decide_queue_page",
    create=LookBack,
    params=(
        Param("look_back", 20, "faults", "how far each fault looks back",
              "async_promote_main.c, PG_FAULT_LOOKBACK_DIST", (), 1, 4096),
    ),
)  # fmt: skip
TRANSACTIONAL = Stage(
    name="transactional",
    kind="migrator",
    summary="a worker copies pages while they stay mapped, and keeps their old frames as shadows; kswapd demotes",
    source="Nomad 3.1, 3.2; async_promote_main.c, mm/migrate.c of the patch",
    create=Transactional,
    params=(
        Param("promotion_queue", 512, "pages", "length of the promotion queue",
              "async_promote_main.c, PROMOTE_QUEUE_LEN", (), 1, 1 << 20),
        Param("migrate_passes", 10, "", "passes over pages whose copy was in vain", "mm/migrate.c, nomad_transit_pages",
              (), 1, 1000),
        Param("shadow_pages", True, "", "keep the old frame of a promoted page until it is written", "Nomad 3.2"),
    ),
    views=("guest",),
)  # fmt: skip

POLICY = composed(
    Policy(
        name="nomad",
        summary="TPP's faults with transactional, asynchronous promotion and shadow pages",
        view="guest",
        source="Nomad, OSDI'24; lingfenghsiang/Nomad",
        left_out="huge pages, which move as in TPP but by the worker; the retry of pages with several mappings; the "
        "kernel's LRU add batches (pagevecs)",
        gains_ps=gains_ps,
    ),
    HINT_FAULTS,
    LOOK_BACK,
    TRANSACTIONAL,
)
