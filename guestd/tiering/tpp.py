"""TPP, as its paper's patch set does it (ASPLOS'23, on Linux 5.15).

Tracking and promotion are coupled: a scanner in task context puts slow pages under PROT_NONE (256 MB a pass), and the
hint fault of an *active* page promotes it on the spot, while an inactive page is only marked accessed. kswapd demotes
from the fast node's LRU lists whenever free memory falls below WMARK_DEMOTE (2 %). The same code over the host's view
is H-TPP: every young page it ages costs a VM-wide flush, every scanned range is zapped and faults back in.
"""

from abc import abstractmethod

import numpy as np

from guestd.meter import TASK
from guestd.mm.kswapd import Kswapd
from guestd.mm.nodes import ACTIVE, FAST, INACTIVE, NO_PAGE, SLOW, WMARK_DEMOTE, WMARK_HIGH
from guestd.params import Param
from guestd.tiering.policy import FAILED, TAKEN, HintRule, Params, Policy
from guestd.tiering.stage import FAULT_AGES, FAULTS, Classifier, Evidence, Migrator, Stage, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Ints, Mask, Words
from proto.counters import C
from proto.units import PAGE_SHIFT, PS_PER_MS, PS_PER_S

_MB = 1 << 20

SCAN_PARAMS = (
    Param("scan_size_mb", 256, "MB", "virtual memory put under PROT_NONE per pass", "kernel/sched/fair.c, scan_size",
          (), 1, 65536),
    Param("scan_period_min_ms", 1000, "ms", "shortest time to scan all memory", "kernel/sched/fair.c", (), 1, 600_000),
    Param("scan_period_max_ms", 60000, "ms", "longest time to scan all memory", "kernel/sched/fair.c", (), 1, 600_000),
    Param("scan_delay_ms", 1000, "ms", "time before the first pass", "kernel/sched/fair.c, scan_delay", (), 0, 600_000),
    Param("adapt_scan_period", True, "", "adapt the period to the faults of a round", "kernel/sched/fair.c"),
    Param("double_on_failure", False, "", "one failed migration in a round doubles the period, as Linux does; off, as "
          "one page more or less then decides for seconds", "kernel/sched/fair.c, update_task_scan_period"),
    Param("private_share", -1.0, "share of faults", "faults on pages that the same task touched last; -1 = 1 / vCPUs",
          "unpublished: threads share all pages alike", (), -1.0, 1.0),
)  # fmt: skip

MAX_SCAN_WINDOW_MB = 2560
"""Bound of the scan rate, MB per second (kernel/sched/fair.c, MAX_SCAN_WINDOW)."""
PERIOD_SLOTS, PERIOD_THRESHOLD = 10, 7
"""NUMA_PERIOD_SLOTS and NUMA_PERIOD_THRESHOLD: slow down from 7 tenths of private or local faults on."""
THROTTLE = 32
"""A pass is followed by at least 32 times its own run time (task_tick_numa: node_stamp += 32 * diff)."""
GAIN_PASSES = 5
"""Passes over all memory by which it has to have gained: two until a page counts as active; and a page faults once in a
pass, in which it finds room or not."""
_UNSORTED = 65536
"""Entries that may wait before equal ones are dropped."""
SKIP = 8
"""Virtual space passed over in one pass, in scan sizes, where nothing was to be changed."""


def gains_ps(params: Params, pages: int) -> int:
    """See `Policy.gains_ps`, of a design that finds its pages by hint faults."""
    least = int(params["scan_period_min_ms"]) * PS_PER_MS
    scan = pages * PS_PER_S // (MAX_SCAN_WINDOW_MB * _MB >> PAGE_SHIFT)
    return int(params["scan_delay_ms"]) * PS_PER_MS + GAIN_PASSES * max(least, scan)


class HintFaults(Tracker):
    """The scanner of NUMA balancing, and the faults on what it protected (kernel/sched/fair.c, mm/memory.c)."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._cursor = 0
        self._scan_pages = int(params["scan_size_mb"]) * _MB >> PAGE_SHIFT
        self._period_min = int(params["scan_period_min_ms"]) * PS_PER_MS
        self._period_max = int(params["scan_period_max_ms"]) * PS_PER_MS
        self._period = 0
        self._tally = np.zeros(2, np.int64)
        """Since the last round: see `HintRule.tally`."""
        self._scanned_ps = np.zeros(0, np.int64)
        """int64[pages], if the classifier asks for ages: when each was put under PROT_NONE; 0: not since it faulted."""

    def start(self) -> None:
        if self.classifier.wants_ages:
            self._scanned_ps = np.zeros(self.view.pages, np.int64)
        self.schedule("scan", self.view.now + int(self.params["scan_delay_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        """One pass of the scanner, in the task's own context."""
        view = self.view
        began = view.now
        context, view.meter.context = view.meter.context, TASK
        self._pass()
        view.meter.context = context
        shortest, longest = self._bounds()
        self._period = min(longest, max(shortest, self._period))
        self.schedule("scan", began + max(self._period, THROTTLE * (view.now - began)))

    def _pass(self) -> None:
        left, skip = self._scan_pages, SKIP * self._scan_pages
        while left > 0 and skip > 0:
            count = min(left, self.view.pages - self._cursor)
            if self._scanned_ps.size:
                self.view.note_scan(self._cursor, count, self._scanned_ps)
            changed = self.view.protect(self._cursor, count)
            self._cursor += count
            skip -= count
            if changed:
                left -= count
            if self._cursor >= self.view.pages:
                self._cursor = 0
                self._round_over()
                self.classifier.end_of_round()
                return

    def _bounds(self) -> tuple[int, int]:
        """Shortest and longest time between passes for the resident memory (task_scan_min, task_scan_max)."""
        resident = int((self.view.nodes.managed - self.view.nodes.free_count).sum())
        windows = max(1, -(-resident // self._scan_pages))
        fastest = PS_PER_S // max(1, MAX_SCAN_WINDOW_MB // int(self.params["scan_size_mb"]))
        shortest = max(fastest, self._period_min // windows)
        return shortest, max(shortest, self._period_max // windows)

    def _round_over(self) -> None:
        """The whole space was scanned: adapt the period (update_task_scan_period).

        Faults are on slow pages, none of them local to a CPU. A round without a fault doubles the period.
        """
        if self.params["adapt_scan_period"]:
            failed = self._tally[FAILED] and self.params["double_on_failure"]
            if self._tally[TAKEN] == 0 or failed:
                self._period *= 2
            else:
                share = float(self.params["private_share"])
                private = PERIOD_SLOTS // self.view.vcpus if share < 0 else int(PERIOD_SLOTS * share)
                over = private - PERIOD_THRESHOLD
                self._period += (max(1, over) if over >= 0 else over) * -(-self._period // PERIOD_SLOTS)
        self._tally[:] = 0

    def hint_rule(self) -> HintRule | None:
        own = type(self.classifier) is ActiveLru and type(self.migrator) is InFault
        return HintRule(bool(self.params["active_filter"]), self._tally) if own else None

    def on_hint_faults(self, pages: Words) -> Words:
        view = self.view
        cost = np.full(pages.size, view.hint_fault_ps, np.int64)
        self._tally[TAKEN] += pages.size
        view.counters[C.vmstat__numa_hint_faults] += pages.size
        view.meter.charge(view.hint_fault_ps * pages.size)
        wanted = self.classifier.on_faults(Evidence(view, pages=pages, age_ps=self._ages(pages)))
        if wanted.any():
            self.migrator.on_faults(pages, wanted, cost)
        view.unprotect(pages)
        return cost

    def _ages(self, pages: Words) -> Words | None:
        """Time since each page was put under PROT_NONE (since 0 if that was not the scanner's doing)."""
        if self._scanned_ps.size == 0:
            return None
        ages = self.view.now - self._scanned_ps[pages]
        self._scanned_ps[pages] = 0
        return ages

    def on_failed(self, pages: int) -> None:
        self._tally[FAILED] += pages


class FaultRanked(Classifier):
    """Wants pages of which a fault (or another access) says so, and gives up those that the kernel's LRU has last."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._hot: list[Words] = []
        """Pages that were found hot since they were last asked for, in order of time."""
        self.kept = 0
        """How many entries that is."""
        self._distinct = 0
        """How many were left when equal ones were last dropped."""

    @abstractmethod
    def _wants(self, evidence: Evidence) -> Mask:
        """Which of the accessed pages should be fast (bool[n]); none of them is -1."""

    def _observe(self, evidence: Evidence) -> None:
        pages, first = np.unique(evidence.pages, return_index=True)
        ages = evidence.age_ps
        known = pages >= 0
        self._on_faults(Evidence(self.view, pages=pages[known], age_ps=None if ages is None else ages[first[known]]))

    def _on_faults(self, evidence: Evidence) -> Mask:
        wanted = self._wants(evidence)
        self._keep(evidence.pages[wanted])
        return wanted

    def _keep(self, pages: Words) -> None:
        """These are hot now."""
        self._hot.append(pages)
        self.kept += pages.size
        # A migrator that promotes in the fault never asks.
        if self.kept > 2 * self._distinct + _UNSORTED:
            self._hot = [self._distinct_hot()]
            self.kept = self._distinct = self._hot[0].size

    def _distinct_hot(self) -> Words:
        hot = np.concatenate([*self._hot, np.zeros(0, np.int64)])
        return hot[np.sort(np.unique(hot, return_index=True)[1])]

    def _end_of_round(self) -> None:
        self.migrator.on_ranking()

    def _promotions(self, limit: int) -> Words:
        hot = self._distinct_hot()
        self._hot, self.kept, self._distinct = [], 0, 0
        slow = hot[self.view.nodes_of(hot) == SLOW]
        return slow[np.cumsum(self.view.sizes(slow)) <= limit]

    def _demotions(self, need: int) -> Words:
        """From the tail of the inactive list, what was not accessed since it was last looked at."""
        view = self.view
        cold: list[Words] = []
        back: list[tuple[Ints, Mask, Mask]] = []
        for node_list in (INACTIVE, ACTIVE):
            frames = view.isolate(FAST, node_list, need)
            pages = view.pages_of(frames)
            young = view.test_and_clear_young(pages)
            back.append((frames, young if node_list == INACTIVE else np.zeros(frames.size, np.bool_), young))
            cold.append(pages[~young])
            need -= int(view.sizes(cold[-1]).sum())
            if need <= 0:
                break
        # Only now: what was just found accessed has lost its A bit, and would look cold on the other list.
        for frames, active, young in back:
            view.put_back(frames, active, young)
        return np.concatenate(cold)

    def hot_set(self) -> Words | None:
        return self.view.active_pages()


class ActiveLru(FaultRanked):
    """The kernel's two lists: a page is hot when it is on the active one at its hint fault."""

    def _wants(self, evidence: Evidence) -> Mask:
        frames = self.view.frames(evidence.pages)
        wanted = self.view.mark_inactive_accessed(frames) if self.params["active_filter"] else frames != NO_PAGE
        return wanted & (frames != NO_PAGE)


class InFault(Migrator):
    """Promotes in the hint fault, demotes by kswapd (mm/migrate.c, numamigrate_isolate_page; mm/vmscan.c)."""

    reclaim_mark: int | None = WMARK_DEMOTE

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._kswapd = self._new_kswapd()

    def _new_kswapd(self) -> Kswapd:
        return Kswapd(self.view, WMARK_DEMOTE, protect=True)

    def _keep(self) -> int:
        """Frames that a promotion leaves free on the fast node."""
        return self.view.watermark(FAST, WMARK_HIGH)

    def on_faults(self, pages: Words, wanted: Mask, cost_ps: Words) -> None:
        view = self.view
        with view.meter.stage(self.books):
            candidates = np.flatnonzero(wanted)
            sizes = view.sizes(pages[candidates])
            view.counters[C.vmstat__pgpromote_candidate] += int(sizes.sum())
            before_demoted = view.was_demoted(view.frames(pages[candidates]))
            view.counters[C.vmstat__pgpromote_candidate_demoted] += int(sizes[before_demoted].sum())
            before = view.now
            moved = view.move(pages[candidates], FAST, self._keep(), sync=True)
            promoted = int(sizes[moved].sum())
            view.counters[C.vmstat__pgpromote_success] += promoted
            view.counters[C.vmstat__numa_pages_migrated] += promoted
            view.counters[C.vmstat__pgmigrate_fail_dst_node_full] += int(sizes[~moved].sum())
            if promoted:
                cost_ps[candidates[moved]] += (view.now - before) * sizes[moved] // promoted
            self.tracker.on_failed(candidates.size - int(moved.sum()))

    def on_pressure(self, budget_ps: int) -> None:
        self._kswapd.run(budget_ps)


HINT_FAULTS = Stage(
    name="hint-faults",
    kind="tracker",
    summary="slow pages are put under PROT_NONE in passes; their faults say who is accessed",
    source="kernel/sched/fair.c, mm/memory.c",
    create=HintFaults,
    params=SCAN_PARAMS,
    gives=frozenset({FAULTS, FAULT_AGES}),
    warm_up={"scan_delay_ms": 0, "scan_period_min_ms": 1, "scan_size_mb": 4, "adapt_scan_period": False},
    min_run_ps=lambda params: int(params["scan_delay_ms"]) * PS_PER_MS,
)
ACTIVE_LRU = Stage(
    name="active-lru",
    kind="classifier",
    summary="a page is hot when the kernel has it on an active list",
    source="TPP 5.3; mm/memory.c of the patches; mm/swap.c",
    create=ActiveLru,
    params=(
        Param("active_filter", True, "", "promote only pages on an active list", "TPP 5.3; mm/memory.c of the patches"),
    ),
)
IN_FAULT = Stage(
    name="in-fault",
    kind="migrator",
    summary="promotion in the fault; kswapd demotes from the LRU's tail below WMARK_DEMOTE",
    source="TPP 5.1 to 5.3; mm/migrate.c, mm/vmscan.c of the patches",
    create=InFault,
    needs=frozenset({FAULTS}),
)

G_TPP = composed(
    Policy(
        name="g-tpp",
        summary="TPP in the guest's kernel",
        view="guest",
        source="TPP, ASPLOS'23; patches on Linux 5.15",
        left_out="file pages, direct reclaim, the second node of a CPU; per-task scan state (one for all threads)",
        gains_ps=gains_ps,
    ),
    HINT_FAULTS,
    ACTIVE_LRU,
    IN_FAULT,
)
H_TPP = composed(
    Policy(
        name="h-tpp",
        summary="the same TPP in the host's kernel, over the EPT",
        view="host",
        source="seed; TPP over KVM's MMU notifier",
        left_out="what g-tpp leaves out; competition of VMs for one node (each has its share)",
        gains_ps=gains_ps,
    ),
    HINT_FAULTS,
    ACTIVE_LRU,
    IN_FAULT,
)
