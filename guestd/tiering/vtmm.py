"""vTMM (EuroSys'23): a hypervisor that scans a guest's page table, but only where the log of dirty pages points.

With EPT A/D bits the hardware's setting of an A or D bit in a guest's page table is a write to that table's page, so
the table is logged (PML). Each monitoring window harvests the log, and a walk looks only at the tables that it names (a
module in the guest passes their places). After 8 windows a page's count is the number of windows that found its A bit.
A page found again rises a level, and one that was not falls; at level L it is looked at each 2^(L-1) windows, and
counts as accessed in between. Counts are its temperature; sorted into buckets, the hottest pages that fit the VM's
share of fast memory belong there. Migration copies pages while they are mapped, copies again what the log reports as
written, and stops the VM for the switch only. One flush a window, one a switch.

No code was published, and the paper's text was not at hand: window length, number of levels, batch and the weight of
writes are unpublished; pages are weighted by accesses alone.
"""

from typing import NamedTuple

import numpy as np

from guestd.meter import metered
from guestd.mm.nodes import FAST, SLOW, WMARK_HIGH
from guestd.params import Param
from guestd.tiering.host_help import host_help
from guestd.tiering.policy import Params, Policy
from guestd.tiering.stage import ACCESSED, DIRTY_LOG, Classifier, Evidence, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Bytes, Ints, Mask, Words
from proto.counters import C
from proto.units import PS_PER_MS

_PAPER = "EuroSys'23 (vTMM)"

WINDOW_PARAMS = (
    Param("window_ms", 100, "ms", "length of a monitoring window", "unpublished: a round of 8 takes about a second", (),
          1, 600_000),
    Param("windows", 8, "windows", "windows a round", _PAPER, (), 1, 64),
    Param("levels", 4, "levels", "highest level, at which a page is looked at each 2^(levels - 1) windows",
          "unpublished: then a page is left alone for a round at most", (), 1, 16),
)  # fmt: skip
COPY_PARAMS = (
    Param("copy_batch", 512, "pages", "pages copied ahead in one direction at a time", "unpublished", (), 1, 1_000_000),
    Param("recopies", 1, "copies", "how often a page that was written is copied again before it is copied in the pause",
          "unpublished", (), 0, 100),
)  # fmt: skip


BUCKETS = 64
"""Of the sort by temperature; what is hotter is in the last one."""


class Levels(NamedTuple):
    """What the tracker keeps of each page; n = pages."""

    level: Bytes
    """uint8[n]: L - 1; 0 for a page whose A bit each window looks at."""
    rest: Words
    """int64[n]: windows for which it is left alone yet."""
    windows: Words
    """int64[n]: windows of the round in which it counted as accessed."""


def new_levels(pages: int) -> Levels:
    """No page was found yet."""
    return Levels(np.zeros(pages, np.uint8), np.zeros(pages, np.int64), np.zeros(pages, np.int64))


@metered
def window_over(levels: Levels, found: Words, highest: int, leave: Words) -> int:
    """A window ended that found the A bits of ``found`` (rising): levels, from 1 to ``highest``, and counts follow.

    At level L a page is looked at every 2^(L-1) windows. Returns how many pages the next window leaves alone, which are
    in ``leave``, rising.
    """
    left = at = 0
    for page in range(levels.level.size):
        while at < found.size and found[at] < page:
            at += 1
        if levels.rest[page] > 0:
            levels.rest[page] -= 1
            levels.windows[page] += 1
        else:
            if at < found.size and found[at] == page:
                levels.windows[page] += 1
                levels.level[page] = min(highest - 1, levels.level[page] + 1)
            elif levels.level[page] > 0:
                levels.level[page] -= 1
            levels.rest[page] = (1 << levels.level[page]) - 1
        if levels.rest[page] > 0:
            leave[left] = page
            left += 1
    return left


@metered
def take_counts(count: Words, pages: Words, counts: Words) -> int:
    """Pages with a count, rising, and their counts, which start anew; how many."""
    found = 0
    for page in range(count.size):
        if count[page] > 0:
            pages[found], counts[found] = page, count[page]
            count[page] = 0
            found += 1
    return found


@metered
def hottest(temperature: Words, highest: int, bucket: Words, out: Words) -> int:
    """Pages with a temperature, hottest first, by a sort into buckets, pages of a bucket by address; how many.

    ``bucket``: int64[highest + 2], scratch.
    """
    bucket[:] = 0
    for page in range(temperature.size):
        if temperature[page] > 0:
            bucket[min(highest, temperature[page])] += 1
    total = 0
    for warm in range(highest, 0, -1):
        size = bucket[warm]
        bucket[warm] = total
        total += size
    for page in range(temperature.size):
        if temperature[page] > 0:
            warm = min(highest, temperature[page])
            out[bucket[warm]] = page
            bucket[warm] += 1
    return total


@metered
def warm(warmth: Words, pages: Words) -> None:
    """Each access makes its page warmer."""
    for page in pages:
        warmth[page] += 1


class PmlWindowScan(Tracker):
    """A bits of the guest's page table, in the tables that the log of dirty pages names, window by window."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.levels = new_levels(view.pages)
        self._leave = np.empty(view.pages, np.int64)
        self._left = 0
        self._window = 0
        self._due_ps = 0

    def start(self) -> None:
        self.schedule("window", self.view.now + int(self.params["window_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        help_ = host_help(self.view)
        if name == "window":
            self._due_ps = self.view.now + int(self.params["window_ms"]) * PS_PER_MS
            help_.request_guest_walk(narrow=True, leave=self._leave[: self._left])
            self.schedule("read", help_.barrier_ps)
        else:
            self._read()
            # Copies ahead, too, are over before the next harvest.
            self.schedule("window", max(self._due_ps, self.view.now))

    def _read(self) -> None:
        view, help_ = self.view, host_help(self.view)
        dirty, found = help_.harvest_dirty(), help_.accessed_in_guest()
        self._left = int(window_over(view.meter.book, self.levels, found, int(self.params["levels"]), self._leave))
        view.meter.charge(view.costs.classify_record_ps * (found.size + self._left))
        self._window += 1
        self.migrator.on_dirty(dirty)
        if self._window == int(self.params["windows"]):
            self._window = 0
            pages, counts = np.empty(view.pages, np.int64), np.empty(view.pages, np.int64)
            count = int(take_counts(view.meter.book, self.levels.windows, pages, counts))
            self.classifier.observe(Evidence(view, pages=np.repeat(pages[:count], counts[:count])))
            self.classifier.end_of_round()


class Temperature(Classifier):
    """Counts of the last round, sorted into buckets: the hottest pages that fit fast memory are hot."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._warmth = np.zeros(view.pages, np.int64)
        self._order = np.empty(view.pages, np.int64)
        self._bucket = np.empty(BUCKETS + 2, np.int64)
        self._hot: Words = np.zeros(0, np.int64)
        self._ranked: Words = self._hot

    def _observe(self, evidence: Evidence) -> None:
        view = self.view
        pages = view.heads(evidence.pages[evidence.pages >= 0])
        warm(view.meter.book, self._warmth, pages)
        view.meter.charge(view.costs.classify_record_ps * pages.size)

    def _end_of_round(self) -> None:
        view = self.view
        count = int(hottest(view.meter.book, self._warmth, BUCKETS, self._bucket, self._order))
        self._ranked = self._order[:count].copy()
        self._hot = self._ranked[np.cumsum(view.sizes(self._ranked)) <= view.nodes.managed[FAST]]
        self._warmth[:] = 0
        view.meter.charge(view.costs.classify_range_ps * count)
        self.migrator.on_ranking()

    def _promotions(self, limit: int) -> Words:
        view = self.view
        slow = self._hot[view.nodes_of(self._hot) == SLOW]
        return slow[np.cumsum(view.sizes(slow)) <= limit]

    def _demotions(self, need: int) -> Words:
        """Pages of fast memory outside the hot set: first those that no window found, then from the coldest up."""
        view = self.view
        there = view.on_node(0, view.pages, FAST, view.pages)
        never = np.setdiff1d(there, self._ranked, assume_unique=True)
        tepid = self._ranked[self._hot.size :][::-1]
        cold = np.concatenate([never, tepid[view.nodes_of(tepid) == FAST]])
        sizes = view.sizes(cold)
        return cold[np.cumsum(sizes) - sizes < need]

    def hot_set(self) -> Words | None:
        return self._hot


class Batch(NamedTuple):
    """Pages on their way to ``node``, the frames that have their copies, and how often they were copied again."""

    node: int
    pages: Words
    targets: Ints
    again: int


class PmlCopy(Migrator):
    """Copies pages while they are mapped; the log of dirty pages says which to copy again; a pause for the switch."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._batches: list[Batch] = []
        self._copied_ps = 0
        """When the copies under way are made."""
        self._written = np.zeros(0, np.int64)
        """Pages that the log named since a batch was begun, while it was not looked at."""

    def on_ranking(self) -> None:
        with self.view.meter.stage(self.books):
            self._begin()

    def on_dirty(self, pages: Words) -> None:
        with self.view.meter.stage(self.books):
            if self.view.now < self._copied_ps:
                # Another stage's timer may set its thread back to a time before copies that it has asked for.
                self._written = np.concatenate([self._written, pages])
                return
            pages, self._written = np.concatenate([self._written, pages]), self._written[:0]
            batches, self._batches = self._batches, []
            for batch in batches:
                self._go_on(batch, np.isin(batch.pages, pages))
            self._begin()

    def _go_on(self, batch: Batch, written: Mask) -> None:
        """Switch to the copies that are good; what was ``written`` is copied again, if need be in the pause."""
        view, help_ = self.view, host_help(self.view)
        stays = written if batch.again < int(self.params["recopies"]) else np.zeros(written.size, np.bool_)
        if stays.any():
            pages, targets = batch.pages[stays], batch.targets[stays]
            help_.copy_again(pages, targets)
            self._copied_ps = view.now
            self._batches.append(Batch(batch.node, pages, targets, batch.again + 1))
        done = ~stays
        help_.switch(batch.pages[done], batch.targets[done], written[done])
        name = C.vmstat__pgpromote_success if batch.node == FAST else C.vmstat__pgdemote_kswapd
        view.counters[name] += int(done.sum())

    def _begin(self) -> None:
        """Copy the next batch: promotions into what is free, and demotions to make room."""
        if self._batches:
            return
        view = self.view
        wanted = self.classifier.promotions(int(self.params["copy_batch"]))
        if wanted.size:
            keep = view.watermark(FAST, WMARK_HIGH)
            short = wanted.size - max(0, view.free(FAST) - keep)
            self._copy(wanted, FAST, keep)
            if short > 0:
                self._copy(self.classifier.demotions(short), SLOW, view.watermark(SLOW, WMARK_HIGH))

    def _copy(self, pages: Words, node: int, keep: int) -> None:
        pages, targets = host_help(self.view).copy_ahead(pages, node, keep)
        if pages.size:
            self._copied_ps = self.view.now
            self._batches.append(Batch(node, pages, targets, 0))


PML_WINDOW_SCAN = Stage(
    name="pml-window-scan",
    kind="tracker",
    summary="A bits of the guest's page table, in tables that the log of dirty pages names, in windows",
    source=_PAPER,
    create=PmlWindowScan,
    params=WINDOW_PARAMS,
    views=("host",),
    gives=frozenset({ACCESSED, DIRTY_LOG}),
    logs_dirty=True,
    warm_up={"window_ms": 1, "windows": 1, "levels": 1},
    min_run_ps=lambda params: int(params["window_ms"]) * int(params["windows"]) * PS_PER_MS,
)
TEMPERATURE = Stage(
    name="temperature",
    kind="classifier",
    summary="counts of a round sorted into buckets; the hottest pages that fit fast memory are hot",
    source=_PAPER,
    create=Temperature,
    needs=frozenset({ACCESSED}),
)
PML_COPY = Stage(
    name="pml-copy",
    kind="migrator",
    summary="copies mapped pages, copies again what the log of dirty pages names, and pauses the VM for the switch",
    source=_PAPER,
    create=PmlCopy,
    params=COPY_PARAMS,
    views=("host",),
    needs=frozenset({DIRTY_LOG}),
    logs_dirty=True,
    warm_up={"recopies": 0},
)

POLICY = composed(
    Policy(
        name="vtmm",
        summary="page-table scan narrowed by PML, in windows; bucket sort; copies ahead by PML",
        view="host",
        source="vTMM, EuroSys'23; notes on it, as neither code nor full text was at hand",
        left_out="moving shares of fast memory between VMs; the work of its module in the guest (a message for each "
        "new page table); the weight of writes",
        no_gain="a window is no shorter than a quantum, in which all of a small memory is accessed (with shorter ones "
        "it finds the hot set: tests/guestd/tiering/test_vtmm.py); in a large one copy_batch, which is unpublished, "
        "caps it at 512 pages a window",
    ),
    PML_WINDOW_SCAN,
    TEMPERATURE,
    PML_COPY,
)
