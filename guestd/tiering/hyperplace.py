"""HyperPlace, the seed's own design (Demeter, SOSP'25): PEBS, a range tree over gVA, balanced relocation by swaps.

Loads above a latency threshold are sampled at a fixed period; the records are drained when the sampled task is switched
out, so no thread polls and no PMI comes. Every 500 ms the range tree is split and ranked; of the hottest ranges that
fit fast memory, pages still in slow memory are swapped pairwise with pages of the coldest ranges that lie in fast
memory, which needs no free frame and wakes no reclaim. Wherever paper (SOSP'25, 3.2) and released code
(patch/demeter.patch) differ there is a parameter; its default is the paper.
"""

import numpy as np

from guestd.mm.nodes import FAST, SLOW, WMARK_HIGH
from guestd.params import Param
from guestd.tiering.policy import RECORD_GROUPS, STORES, Params, Policy, Sampling
from guestd.tiering.range_tree import COUNT, END, START, RangeTree
from guestd.tiering.stage import SAMPLES, Classifier, Evidence, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.counters import C
from proto.units import PAGE_SHIFT, PS_PER_MS, PS_PER_US

TRACKER_PARAMS = (
    Param("event", "load-latency", "", "loads that are sampled: above a latency threshold, or LLC misses of each tier",
          "paper 3.2.2: load latency, which is blind to the media", ("load-latency", "llc-miss")),
    Param("load_period", 4093, "events", "such loads per record (of LLC misses: of each tier)", "paper 3.2.2", (),
          1, 10_000_000),
    Param("load_latency_ns", 64, "ns", "load-latency threshold", "paper 3.2.2 (in cycles, really)", (), 3, 65535),
    Param("store_period", 0, "events", "stores per record; the released code samples stores too, with 65535",
          "paper: off; released code: 65535", (), 0, 100_000_000),
    Param("large_pebs", True, "", "interrupt when the buffer is nearly full, not at each record",
          "arch/x86/events/intel/ds.c, pebs_update_threshold"),
    Param("record", "memory", "", "record groups beside the basic one", "SDM vol. 3, 20.9.2 (adaptive PEBS)",
          tuple(RECORD_GROUPS)),
)  # fmt: skip

RANKING_PARAMS = (
    Param("epoch_ms", 500, "ms", "time between splits (t_split)", "paper 3.2.1", (), 1, 60_000),
    Param("tau_split", 15, "samples", "unit of significance, per vCPU", "paper 3.2.1", (), 1, 1_000_000),
    Param("alpha", 2, "tau_split", "how far a range must stand out from a neighbour", "paper 3.2.1", (), 1, 1000),
    Param("neighbours", "both", "", "stand out from both neighbours (paper) or at least one (released code)",
          "paper 3.2.1; range_tree.h", ("both", "one")),
    Param("decay", True, "", "halve all counts every epoch", "paper 3.2.1"),
    Param("merge_after", 8, "epochs", "merge neighbours idle for as long; 0 = never (released code)",
          "paper 3.2.1 names tau_merge without a value: unpublished", (), 0, 1_000_000),
    Param("floor_mb", 2, "MiB", "smallest range", "paper 3.2.1", (), 2, 1024),
    Param("initial", "space", "", "initial ranges: the halves of the address space (paper: 64 TiB), or 2 x guest RAM "
          "each, 1 GiB aligned (released code)", "paper 3.2.1; core.c", ("space", "ram")),
    Param("migrate_on", "epoch", "", "relocate every epoch, or only in epochs with a split once a leaf is smallest",
          "paper 3.2.3; core.c", ("epoch", "split")),
)  # fmt: skip

SWAP_PARAMS = (
    Param("swap", "batched", "", "flush once per batch (paper) or per page (released code)", "paper 3.2.3; exchange.c",
          ("batched", "pairwise")),
    Param("fill_free", False, "", "also move hot pages into free fast memory", "paper: pure swap"),
    Param("batch_pairs", 512, "pairs", "pairs of 4 KiB swapped before the worker yields", "unpublished", (),
          1, 65536),
)  # fmt: skip

_SPACE_END = 1 << 47
_MOST_SPLITS = 25
"""From half of the address space to 2 MiB."""
_BETWEEN = 0x6AAA_AAA0_0000
"""Where the heap's range, growing up, ends and the mmap region's, growing down, begins."""
_GIB = 1 << 30


class PebsAtContextSwitch(Tracker):
    """Records are drained when the sampled task is switched out; no thread of its own, and no interrupt."""

    drains_at_context_switch = True

    def on_samples(self, samples: Words) -> None:
        self.classifier.observe(sampled(self.view, samples))


class RangeRanking(Classifier):
    """A tree of gVA ranges, split where the heat is; the hottest that fit fast memory are hot."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        floor = int(params["floor_mb"]) << 20
        roots = [(0, _BETWEEN), (_BETWEEN, _SPACE_END)]
        if params["initial"] == "ram":
            span = -(-2 * (view.nodes.page.size // 2 << PAGE_SHIFT) // _GIB) * _GIB
            first, last = view.address_bounds()
            heap = first // _GIB * _GIB
            top = -(-last // _GIB) * _GIB
            roots = [(heap, heap + span)] if top - span < heap + span else [(heap, heap + span), (top - span, top)]
        self.tree = RangeTree(roots, floor, view.meter.book)
        unit = int(params["tau_split"]) * view.vcpus
        self._margin = int(params["alpha"]) * unit
        self._eligible = unit
        self._hot: list[tuple[int, int]] = []
        """(first page, count) of the hot ranges, hottest first, and `_cold` of the others, coldest first."""
        self._cold: list[tuple[int, int]] = []

    def start(self) -> None:
        self.schedule("epoch", self.view.now + int(self.params["epoch_ms"]) * PS_PER_MS)

    def _observe(self, evidence: Evidence) -> None:
        self.tree.record(evidence.addresses)
        self.view.meter.charge(self.view.costs.classify_record_ps * evidence.size)

    def on_timer(self, name: str) -> None:
        view, params = self.view, self.params
        self.schedule("epoch", view.now + int(params["epoch_ms"]) * PS_PER_MS)
        splits = self.tree.advance(
            self._margin,
            self._eligible,
            both_neighbours=params["neighbours"] == "both",
            decay=bool(params["decay"]),
            merge_after=int(params["merge_after"]),
        )
        view.meter.charge(view.costs.classify_range_ps * self.tree.used)
        sizes = self.tree.leaves[END] - self.tree.leaves[START]
        ready = params["migrate_on"] == "epoch" or (splits > 0 and int(sizes.min()) <= int(params["floor_mb"]) << 20)
        if ready and self.tree.leaves[COUNT].any():
            self._rank()
            self.migrator.on_ranking()

    def _rank(self) -> None:
        """The largest prefix of hot ranges that fits fast memory."""
        view, leaves = self.view, self.tree.leaves
        order = self.tree.ranking()
        spans = [view.page_range(int(leaves[START, leaf]), int(leaves[END, leaf])) for leaf in order]
        left = int(view.nodes.managed[FAST])
        prefix = 0
        for first, count in spans:
            left -= view.count_mapped(first, count)
            if left < 0 or leaves[COUNT, order[prefix]] == 0:
                break
            prefix += 1
        self._hot, self._cold = spans[:prefix], spans[: prefix - 1 if prefix else None : -1]

    def _promotions(self, limit: int) -> Words:
        return self._take(self._hot, SLOW, limit)

    def _demotions(self, need: int) -> Words:
        return self._take(self._cold, FAST, need)

    def _take(self, spans: list[tuple[int, int]], node: int, limit: int) -> Words:
        """Units of the ranges that lie on ``node``, until they have ``limit`` pages."""
        found = [np.zeros(0, np.int64)]
        for first, count in spans:
            if limit <= 0:
                break
            found.append(self.view.on_node(first, count, node, limit))
            limit -= int(self.view.sizes(found[-1]).sum())
        return np.concatenate(found)

    def hot_set(self) -> Words | None:
        return np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(n, dtype=np.int64) + first for first, n in self._hot)]
        )


class BalancedSwap(Migrator):
    """Hot slow pages trade places with cold fast ones, pair by pair, batch by batch."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._wanted: Words = np.zeros(0, np.int64)
        self._victims: Words = np.zeros(0, np.int64)
        self._relocating = False
        """A batch is scheduled already."""

    def on_ranking(self) -> None:
        with self.view.meter.stage(self.books):
            self._choose()
            if self._wanted.size and not self._relocating:
                self._relocate()

    def on_timer(self, name: str) -> None:
        self._relocating = False
        if self._wanted.size:
            self._relocate()

    def _choose(self) -> None:
        view = self.view
        wanted = self.classifier.promotions(int(view.nodes.managed[FAST]))
        if self.params["fill_free"] and wanted.size:
            sizes = view.sizes(wanted)
            moved = view.move(wanted, FAST, view.watermark(FAST, WMARK_HIGH))
            view.counters[C.vmstat__pgpromote_success] += int(sizes[moved].sum())
            wanted = wanted[~moved]
        victims = self.classifier.demotions(int(view.sizes(wanted).sum()))
        self._wanted, self._victims = view.match(wanted, victims)

    def _relocate(self) -> None:
        """Swap one batch; the worker shares its vCPU with the task, so the next one is due as much later."""
        view = self.view
        pages = np.cumsum(view.sizes(self._wanted))
        batch = int(np.searchsorted(pages, int(self.params["batch_pairs"]))) + 1
        before = view.now
        count = view.exchange(self._wanted[:batch], self._victims[:batch], batched=self.params["swap"] == "batched")
        view.counters[C.vmstat__pgpromote_success] += count
        self._wanted, self._victims = self._wanted[batch:], self._victims[batch:]
        if self._wanted.size:
            self._relocating = True
            self.schedule("relocate", view.now + (view.now - before))


def sampled(view: PageView, samples: Words) -> Evidence:
    """The evidence in drained records (int64[n, 5], `Tiering.on_samples`)."""
    return Evidence(view, addresses=np.ascontiguousarray(samples[:, 0]), writes=samples[:, 3] == 1 << STORES)


def _sampling(params: Params) -> Sampling:
    period = int(params["load_period"])
    latency, misses = (period, 0) if params["event"] == "load-latency" else (0, period)
    return Sampling(
        load_period=latency,
        latency_threshold_ns=int(params["load_latency_ns"]),
        store_period=int(params["store_period"]),
        fast_miss_period=misses,
        slow_miss_period=misses,
        large=bool(params["large_pebs"]),
        groups=str(params["record"]),
    )


PEBS_AT_CONTEXT_SWITCH = Stage(
    name="pebs-context-switch",
    kind="tracker",
    summary="PEBS records, drained when the sampled task is switched out",
    source="seed; Demeter, SOSP'25, 3.2.2",
    create=PebsAtContextSwitch,
    params=TRACKER_PARAMS,
    views=("guest",),
    gives=frozenset({SAMPLES}),
    sampling=_sampling,
    warm_up={"load_period": 7, "store_period": 50},
)
RANGE_TREE = Stage(
    name="range-tree",
    kind="classifier",
    summary="address ranges, split where they stand out; the hottest that fit fast memory are hot",
    source="seed; Demeter, SOSP'25, 3.2.1",
    create=RangeRanking,
    params=RANKING_PARAMS,
    warm_up={"epoch_ms": 2, "tau_split": 1, "initial": "ram"},
    min_run_ps=lambda params: int(params["epoch_ms"]) * PS_PER_MS,
)
BALANCED_SWAP = Stage(
    name="swap",
    kind="migrator",
    summary="hot slow pages trade places with cold fast ones, without a free frame",
    source="seed; Demeter, SOSP'25, 3.2.3",
    create=BalancedSwap,
    params=SWAP_PARAMS,
    warm_up={"swap": "pairwise", "fill_free": True},
)

POLICY = composed(
    Policy(
        name="hyperplace",
        summary="PEBS drained at context switch, range tree over gVA, balanced pairwise swap",
        view="guest",
        source="seed; Demeter, SOSP'25",
        left_out="the blacklist of pages that failed to move, file pages, the duty-cycle throttle (off by default)",
        # A range is halved once an epoch, from half of the address space down; then the hot ones move.
        gains_ps=lambda params, pages: _MOST_SPLITS * int(params["epoch_ms"]) * PS_PER_MS + pages * PS_PER_US,
    ),
    PEBS_AT_CONTEXT_SWITCH,
    RANGE_TREE,
    BALANCED_SWAP,
)
