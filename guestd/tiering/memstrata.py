"""Memstrata (OSDI'24): VMs in flat memory mode, and an orchestrator that lends dedicated pages to those that suffer.

The hardware does the tiering (`guestd.near_memory`): at 1:1 two pages contend for each page of DRAM, line by line, and
page colouring keeps that inside a VM. A VM with more fast memory than slow has *dedicated* pages, whose partner is
unused, so that they always hit: of a VM with ``fast_ratio`` r the share 2r - 1. Each window of 10 s the orchestrator
reads counters of each VM's cores, smooths them, estimates who is slowed down, sorts VMs by (slowed, near-memory misses
per page), and lets those at the end (borrowers) trade contended pages for dedicated ones of those at the front
(donors), at most 5 % of the pages a window. Two dedicated pages go for both pages of a contended pair, so that pages of
two VMs never contend. Pages are taken at random.

What stands for the 15 events of the cores: L3 misses are accesses that the LLC did not serve; near-memory misses are
the lines swapped in, which the published design derives from the L3 miss latency by a line whose coefficients must be
calibrated per machine; stall cycles are the ledger's; L3 miss latency follows from misses and idle latencies; DTLB walk
time is that of the walks. Base time is what vCPUs were not halted for, without the stalls that near-memory misses
caused. The published estimator is a random forest with a binary output, trained on the machine; here its output is
a threshold on the slowdown that these figures predict. Left out: see `POLICY.left_out`.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from guestd.meter import metered
from guestd.params import Param
from guestd.tiering.host_help import flat_memory
from guestd.tiering.policy import MIB, Params, Policy, Tiering
from guestd.tiering.stage import Classifier, Evidence, Migrator, Stage, Staged, Tracker, composed
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.counters import C
from proto.units import PAGE_SIZE, PS_PER_MS

_REPO = "OSDI'24 (Memstrata), orchestrator"
EVENTS = 15
"""Counters that the orchestrator reads of each core."""
MISSES = "near-memory misses"
STANDING = "a standing among VMs"
ACCESSES, NEAR_MISSES, LATENCY, STALL, WALK, BUSY = range(6)
"""What a window hands on: L3 misses, near-memory misses, what L3 misses took in all (ps), stalled, walking, not halted
(ps of all vCPUs)."""
FIGURES = 6

TRACK_PARAMS = (
    Param("window_ms", 10_000, "ms", "operation window: counters are read and pages exchanged once in each", _REPO, (),
          1, 3_600_000),
)  # fmt: skip
ESTIMATE_PARAMS = (
    Param("new_weight", 0.2, "", "weight of a window in the moving averages", _REPO, (), 0.001, 1),
    Param("slowdown_percent", 5, "%", "predicted slowdown from which a VM counts as slowed",
          "unpublished: the forest must be trained on the machine; the paper counts workloads within 5 %", (), 0, 1000),
    Param("more_pages_mib", 128, "MiB", "added to a VM's contended pages, where misses are divided by them", _REPO, (),
          0, 1 << 20),
)  # fmt: skip
EXCHANGE_PARAMS = (
    Param("step_ratio", 0.05, "", "share of the pages, of each VM and of all, that a window may exchange", _REPO, (),
          0, 1),
)  # fmt: skip


class Standing(NamedTuple):
    """A VM before an exchange."""

    slowed: bool
    rate: int
    """Near-memory misses per page, in 1 / `RATE_UNIT`."""
    dedicated: int
    """Pages that it could give."""
    contended: int
    """Pages that it could give in return."""
    pages: int
    """Of the VM."""


RATE_UNIT = 1 << 20


def plan(vms: Sequence[Standing], permille: int) -> list[tuple[int, int, int]]:
    """min_miss: what to exchange, (donor, borrower, pages) by index into ``vms``, pages a multiple of 2.

    ``permille``: of the pages of each VM, and of all together, at most so many.
    """
    order = sorted(range(len(vms)), key=lambda vm: (vms[vm].slowed, vms[vm].rate, vm))
    dedicated, contended = [vm.dedicated for vm in vms], [vm.contended for vm in vms]
    left = [vm.pages * permille // 1000 for vm in vms]
    everyone = sum(vm.pages for vm in vms) * permille // 1000
    transfers = []
    first, last = 0, len(order) - 1
    while first < last and vms[order[last]].slowed:
        donor, borrower = order[first], order[last]
        pages = min(dedicated[donor], contended[borrower], left[donor], left[borrower], everyone) // 2 * 2
        if pages > 0:
            transfers.append((donor, borrower, pages))
            dedicated[donor] -= pages
            contended[borrower] -= pages
            left[donor] -= pages
            left[borrower] -= pages
            everyone -= pages
        if min(dedicated[donor], left[donor]) < 2:
            first += 1
        elif min(contended[borrower], left[borrower]) < 2:
            last -= 1
        else:
            break
    return transfers


@metered
def window(now: Words, before: Words, fast_ps: int, slow_ps: int, out: Words) -> None:
    """The figures of a window (`FIGURES`) from two readings of the counters (int64[COUNTERS]); ``before`` follows."""
    out[ACCESSES] = (now[C.access__total] - before[C.access__total]) - (
        now[C.access__llc_hits] - before[C.access__llc_hits]
    )
    out[NEAR_MISSES] = now[C.access__line_swaps] - before[C.access__line_swaps]
    out[LATENCY] = out[NEAR_MISSES] * slow_ps + (out[ACCESSES] - out[NEAR_MISSES]) * fast_ps
    out[STALL] = now[C.time__stall_ps] - before[C.time__stall_ps]
    out[WALK] = now[C.access__walk_ps] - before[C.access__walk_ps]
    out[BUSY] = 0
    for part in range(C.time__think_ps, C.time__halted_ps):
        out[BUSY] += now[part] - before[part]
    for i in range(now.size):
        before[i] = now[i]


@metered
def smooth(figures: Words, weight: int, first: bool, average: Words) -> None:
    """Moving averages: ``weight`` in 1/1000 for the new value."""
    for i in range(figures.size):
        average[i] = figures[i] if first else (average[i] * (1000 - weight) + figures[i] * weight) // 1000


def predicted_slowdown(average: Words, fast_ps: int, slow_ps: int) -> int:
    """By how much near-memory misses slow a VM down, in 1/1000 of its base time, from its averages (`FIGURES`).

    Of the stalls, the share that is their additional latency: stalls know how much of it overlaps.
    """
    misses, latency, walk, stall, busy = (int(average[i]) for i in (NEAR_MISSES, LATENCY, WALK, STALL, BUSY))
    lost = stall * (misses * (slow_ps - fast_ps)) // max(1, latency + walk)
    return 1000 * lost // max(1, busy - lost)


def miss_rate(average: Words, contended: int, more_mib: int) -> int:
    """Near-memory misses of a window per page that contends, in 1 / `RATE_UNIT`."""
    return int(average[NEAR_MISSES]) * RATE_UNIT // max(1, contended + more_mib * MIB // PAGE_SIZE)


class CoreCounters(Tracker):
    """The orchestrator reads the counters of the VM's cores, once in a window."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._window_ps = int(params["window_ms"]) * PS_PER_MS
        self._before = flat_memory(view).guest_counters.copy()
        self._figures = np.zeros(FIGURES, np.int64)

    def start(self) -> None:
        self._next()

    def _next(self) -> None:
        # One orchestrator for all VMs: its windows are the host's.
        self.schedule("window", (self.view.now // self._window_ps + 1) * self._window_ps)

    def on_timer(self, name: str) -> None:
        view = self.view
        self._next()
        costs = view.costs
        window(view.meter.book, flat_memory(view).guest_counters, self._before, costs.fast.latency_random_ps,
               costs.slow.latency_random_ps, self._figures)  # fmt: skip
        view.meter.charge(costs.drain_record_ps * EVENTS * view.vcpus)
        cast(SlowdownEstimator, self.classifier).on_window(self._figures)


class SlowdownEstimator(Classifier):
    """Averages of a VM's figures, whether it is slowed down, and its near-memory misses per page. It ranks no pages."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.average = np.zeros(FIGURES, np.int64)
        self._first = True

    def on_window(self, figures: Words) -> None:
        """Learn from a window (`FIGURES`)."""
        view = self.view
        with view.meter.stage(self.books):
            weight = round(1000 * float(self.params["new_weight"]))
            smooth(view.meter.book, figures, weight, self._first, self.average)
            view.meter.charge(view.costs.classify_range_ps * FIGURES)
            self._first = False
        self.migrator.on_ranking()

    def standing(self) -> Standing:
        """The VM as it is now."""
        view = self.view
        costs, flat = view.costs, flat_memory(view)
        contended = 2 * flat.contended().size
        slowdown = predicted_slowdown(self.average, costs.fast.latency_random_ps, costs.slow.latency_random_ps)
        return Standing(
            slowed=slowdown >= 10 * int(self.params["slowdown_percent"]),
            rate=miss_rate(self.average, contended, int(self.params["more_pages_mib"])),
            dedicated=flat.dedicated().size,
            contended=contended,
            pages=view.pages,
        )

    def _observe(self, evidence: Evidence) -> None:
        pass

    def _promotions(self, limit: int) -> Words:
        return np.zeros(0, np.int64)

    def _demotions(self, need: int) -> Words:
        return np.zeros(0, np.int64)


class PageExchange(Migrator):
    """Gives dedicated pages of the VM away, or takes such of another, as the orchestrator says."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self.ready = False
        """There is a new window to decide about."""
        self.permille = round(1000 * float(params["step_ratio"]))
        self._balance = 0

    def on_ranking(self) -> None:
        self.ready = True

    def standing(self) -> Standing:
        """The VM as it is now."""
        return cast(SlowdownEstimator, self.classifier).standing()

    def owe(self, pages: int) -> None:
        """Have the VM get ``pages`` dedicated pages in the quantum to come, or give as many if negative."""
        self._balance += pages
        self.schedule("exchange", self.view.now)

    def on_timer(self, name: str) -> None:
        flat, balance = flat_memory(self.view), self._balance
        self._balance = 0
        if balance > 0:
            flat.take_dedicated(flat.random.permutation(flat.contended())[: balance // 2])
        elif balance < 0:
            flat.give_dedicated(flat.random.permutation(flat.dedicated())[:-balance])


def orchestrate(members: Sequence[Tiering]) -> None:
    """With all VMs of one host parked: who gives dedicated pages to whom, once in a window."""
    exchanges = [member.migrator for member in members if isinstance(member, Staged)]
    ready = [one for one in exchanges if isinstance(one, PageExchange) and one.ready]
    for one in ready:
        one.ready = False
    if len(ready) < 2:
        return
    permille = min(one.permille for one in ready)
    for donor, borrower, pages in plan([one.standing() for one in ready], permille):
        ready[donor].owe(-pages)
        ready[borrower].owe(pages)


CORE_COUNTERS = Stage(
    name="core-counters",
    kind="tracker",
    summary="counters of the VM's cores, read once in a window",
    source=_REPO,
    create=CoreCounters,
    params=TRACK_PARAMS,
    views=("host",),
    flat_memory=True,
    gives=frozenset({MISSES}),
    needs=frozenset({STANDING}),
    warm_up={"window_ms": 4},
    min_run_ps=lambda params: int(params["window_ms"]) * PS_PER_MS,
)
SLOWDOWN_ESTIMATOR = Stage(
    name="slowdown-estimator",
    kind="classifier",
    summary="moving averages of a VM's counters, whether it is slowed down, its near-memory misses per page",
    source=_REPO,
    create=SlowdownEstimator,
    params=ESTIMATE_PARAMS,
    views=("host",),
    gives=frozenset({STANDING}),
    needs=frozenset({MISSES}),
    warm_up={"slowdown_percent": 0},
)
PAGE_EXCHANGE = Stage(
    name="page-exchange",
    kind="migrator",
    summary="two dedicated pages of a donor go for a contended pair of a borrower, at most 5 % a window",
    source=_REPO,
    create=PageExchange,
    params=EXCHANGE_PARAMS,
    views=("host",),
    flat_memory=True,
    orchestrate=orchestrate,
    needs=frozenset({STANDING}),
)

POLICY = composed(
    Policy(
        name="memstrata",
        summary="hardware swaps lines between DRAM and CXL; an orchestrator lends dedicated pages between VMs",
        view="host",
        source="Memstrata, OSDI'24",
        left_out="the random forest and its inputs beyond those named (a threshold on the predicted slowdown stands "
        "for it); the `karma` policy; hot-cold separation inside a VM by DAMON; the 2 MiB unit (a huge page is split "
        "before its pages are exchanged); lending what a VM has but never touched; the clamps of the metrics",
    ),
    CORE_COUNTERS,
    SLOWDOWN_ESTIMATOR,
    PAGE_EXCHANGE,
)
