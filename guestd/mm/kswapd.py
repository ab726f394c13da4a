"""kswapd of a fast node: balances it above a watermark by demoting cold pages to the slow node.

Linux 5.15 with the TPP patches (mm/vmscan.c): inactive pages are taken from the tail; one that was referenced stays
once (PG_referenced) and is activated the second time; the others are demoted in LRU order. The active list is aged,
without mercy for referenced anonymous pages, whenever the inactive one is low (inactive_is_low). After 16 rounds that
reclaimed nothing, a top-tier kswapd retries every 10 s. Left out: file pages, direct reclaim, writeback.
"""

from math import isqrt

import numpy as np

from guestd.meter import MIGRATE, TRACK
from guestd.mm.nodes import ACTIVE, F_REFERENCED, FAST, INACTIVE, SLOW, WMARK_MIN
from guestd.tiering.pages import expand
from guestd.tiering.view import PageView
from proto.arrays import Ints
from proto.counters import C
from proto.units import PS_PER_S

DEF_PRIORITY = 12
SWAP_CLUSTER_MAX = 32
MAX_RECLAIM_RETRIES = 16
RETRY_PS = 10 * PS_PER_S
BATCH = 1024
"""Pages isolated at a time; the kernel takes 32, the order of the list is the same."""


class Kswapd:
    """The daemon's state; ``mark`` is the watermark index to balance the fast node to.

    ``protect``: a demoted page is put under PROT_NONE at once, so that it can come back (TPP patches, mm/migrate.c).
    """

    def __init__(self, view: PageView, mark: int, *, protect: bool) -> None:
        self._view = view
        self._mark = mark
        self._protect = protect
        self._priority = DEF_PRIORITY
        self._failures = 0
        self._retry_at = 0
        self._reclaimed = 0

    @property
    def wanted(self) -> bool:
        """Whether the node is below the watermark and the daemon is not backing off."""
        view = self._view
        return view.free(FAST) < view.watermark(FAST, self._mark) and view.now >= self._retry_at

    def run(self, budget_ps: int) -> None:
        """Work for up to about ``budget_ps`` of modelled time, or until the node is balanced."""
        view = self._view
        end = view.now + budget_ps
        target = max(view.watermark(FAST, self._mark), SWAP_CLUSTER_MAX)
        while view.now < end and self.wanted:
            self._reclaimed += self._shrink(max(SWAP_CLUSTER_MAX, int(view.nodes.size[INACTIVE]) >> self._priority))
            if self._reclaimed >= target or self._priority == 1:
                self._round_over()
            else:
                self._priority -= 1
        if view.free(FAST) >= view.watermark(FAST, self._mark):
            self._priority, self._reclaimed, self._failures = DEF_PRIORITY, 0, 0

    def _round_over(self) -> None:
        self._failures = 0 if self._reclaimed else self._failures + 1
        if self._failures >= MAX_RECLAIM_RETRIES:
            self._retry_at = self._view.now + RETRY_PS
            self._failures = 0
        self._priority, self._reclaimed = DEF_PRIORITY, 0

    def _shrink(self, scan: int) -> int:
        """Age the active list if the inactive one is low, then scan ``scan`` inactive pages; returns pages demoted."""
        view = self._view
        sizes = view.nodes.size
        gib = int(sizes[INACTIVE] + sizes[ACTIVE]) >> 18
        if int(sizes[INACTIVE]) * (isqrt(10 * gib) if gib else 1) < int(sizes[ACTIVE]):
            self._age_active(max(SWAP_CLUSTER_MAX, int(sizes[ACTIVE]) >> self._priority))
        demoted = 0
        # Stop at the watermark: the kernel checks it every 32 pages.
        while scan > 0 and self.wanted:
            need = view.watermark(FAST, self._mark) - view.free(FAST)
            taken, moved = self._shrink_inactive(min(scan, BATCH, max(SWAP_CLUSTER_MAX, 2 * need)))
            demoted += moved
            scan -= taken
            if taken == 0:
                break
        return demoted

    def _age_active(self, scan: int) -> None:
        view = self._view
        while scan > 0:
            with view.meter.stage(TRACK):
                frames = view.isolate(FAST, ACTIVE, min(scan, BATCH))
                if frames.size == 0:
                    return
                view.test_and_clear_young(view.pages_of(frames))
                nothing = np.zeros(frames.size, np.bool_)
                view.put_back(frames, nothing, nothing)
            pages = int(view.frame_sizes(frames).sum())
            view.counters[C.vmstat__pgdeactivate] += pages
            scan -= pages

    def _shrink_inactive(self, limit: int) -> tuple[int, int]:
        """(pages scanned, pages demoted) of one batch."""
        view = self._view
        with view.meter.stage(TRACK):
            frames = view.isolate(FAST, INACTIVE, limit)
            if frames.size == 0:
                return 0, 0
            sizes = view.frame_sizes(frames)
            view.counters[C.vmstat__pgscan_kswapd] += int(sizes.sum())
            young = view.test_and_clear_young(view.pages_of(frames))
            second = young & ((view.nodes.flags[frames] & F_REFERENCED) != 0)
            view.put_back(frames[young], second[young], ~second[young])
            view.counters[C.vmstat__pgactivate] += int(sizes[second].sum())
        with view.meter.stage(MIGRATE):
            demoted, stay = self._demote(frames[~young])
            nothing = np.zeros(stay.size, np.bool_)
            view.put_back(stay, nothing, nothing)
        view.counters[C.vmstat__pgmigrate_fail] += int(sizes[~young].sum()) - demoted
        view.counters[C.vmstat__pgdemote_kswapd] += demoted
        view.counters[C.vmstat__pgsteal_kswapd] += demoted
        return int(sizes.sum()), demoted

    def _demote(self, cold: Ints) -> tuple[int, Ints]:
        """Demote isolated frames: (pages demoted, frames that stay).

        A huge page for which the slow node has no block is split, and its pieces are demoted (mm/migrate.c,
        try_split_thp).
        """
        view, keep = self._view, self._view.watermark(SLOW, WMARK_MIN)
        sizes = view.frame_sizes(cold)
        moved = view.move(view.pages_of(cold), SLOW, keep, protect=self._protect)
        demoted, stay = int(sizes[moved].sum()), cold[~moved]
        if view.free(SLOW) > keep:
            split = view.split(view.pages_of(stay))
            pieces = expand(stay[split], sizes[~moved][split]).astype(np.int32)
            moved = view.move(view.pages_of(pieces), SLOW, keep, protect=self._protect)
            demoted, stay = demoted + int(moved.sum()), np.concatenate([stay[~split], pieces[~moved]])
        return demoted, stay
