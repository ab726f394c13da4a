"""Memtis' access counts and histograms (SOSP'23, 4.1 to 4.3; linux/mm/htmm_core.c): kernels over arrays.

A sample raises the count of a 4 KiB page by 512 and that of a huge page by 1, so that both compare per byte; a unit's
bin is the logarithm of its count. Counts are halved lazily: a page that is looked at catches up with the cooling clock.
Two histograms hold pages by bin, one of the units as they are mapped, one as if all were 4 KiB pages. A unit is
noticed, with the count of a new page, when it is first looked at, not when it is allocated; huge pages that were split
or collapsed by anyone are found out the same way.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline, kernel
from guestd.meter import metered
from guestd.mm.nodes import (
    ACTIVE,
    F_ACTIVE,
    F_HUGE,
    F_LRU,
    INACTIVE,
    NO_PAGE,
    Nodes,
    lru_add,
    lru_remove,
    unit_size,
)
from proto.arrays import Bytes, Ints, Words
from proto.units import TABLE_PAGES, TABLE_SHIFT

BINS = 16
UNITS, BASE = 0, 1
"""Rows of `Heat.bins`: pages by the bin of their unit, and by the bin of the 4 KiB page alone."""
HOT, WARM, BASE_HOT, CLOCK, EPOCH, SKIP, FAST_HITS, BASE_HITS = range(8)
"""`Heat.state`: the three thresholds; the cooling clock; how often the histograms were begun anew; whether new pages
sit out one cooling; samples of fast memory, and those that would have been if the hottest 4 KiB pages were there."""
STATE = 8
SKEW_BUCKETS = 21
_TOO_HOT = 13
"""A huge page of this bin or above is not worth splitting."""
_SKEW_DIVISOR = 11
_FAR = 62


class Heat(NamedTuple):
    """Counts of all pages and units."""

    total: Words
    """int64[pages]: of each 4 KiB page, 512 a sample."""
    huge_total: Words
    """int64[tables]: of each huge page, 1 a sample."""
    clock: Ints
    """int32[pages]: cooling clock up to which a unit (its head) was halved."""
    counted: Ints
    """int32[pages]: epoch in which a unit (its head) was last counted in the histograms; 0 = never looked at."""
    huge: Bytes
    """uint8[tables]: 1 where the unit is known as a huge page."""
    bins: Words
    """int64[2, BINS]"""
    state: Words
    """int64[STATE]"""


def new_heat(pages: int, least_hot: int, skip_cooling: bool) -> Heat:
    """Nothing is known of any page yet; all thresholds are ``least_hot``."""
    tables = -(-pages // TABLE_PAGES)
    state = np.zeros(STATE, np.int64)
    state[[HOT, WARM, BASE_HOT]] = least_hot
    state[EPOCH], state[SKIP] = 1, skip_cooling
    return Heat(
        np.zeros(tables * TABLE_PAGES, np.int64),
        np.zeros(tables, np.int64),
        np.zeros(tables * TABLE_PAGES, np.int32),
        np.zeros(tables * TABLE_PAGES, np.int32),
        np.zeros(tables, np.uint8),
        np.zeros((2, BINS), np.int64),
        state,
    )


@inline
def bin_of(count: int) -> int:
    """floor(log2(count + 1)), 15 at most (htmm_core.c, get_idx)."""
    found = 0
    left = (count + 1) >> 1
    while left > 0 and found < BINS - 1:
        left >>= 1
        found += 1
    return found


@inline
def _count(heat: Heat, head: int, huge: bool, sign: int) -> None:
    """Enter a unit in the histograms, or take it out (``sign`` -1)."""
    if huge:
        heat.bins[UNITS, bin_of(heat.huge_total[head >> TABLE_SHIFT])] += sign * TABLE_PAGES
        for page in range(head, head + TABLE_PAGES):
            heat.bins[BASE, bin_of(heat.total[page])] += sign
    else:
        found = bin_of(heat.total[head])
        heat.bins[UNITS, found] += sign
        heat.bins[BASE, found] += sign


@inline
def _became_huge(heat: Heat, first: int) -> None:
    """512 pages were collapsed, or it is a new huge page: then none of them was ever looked at."""
    epoch, clock = heat.state[EPOCH], heat.state[CLOCK]
    total = 0
    known = False
    for page in range(first, first + TABLE_PAGES):
        if heat.counted[page] != 0:
            known = True
            if heat.counted[page] == epoch:
                _count(heat, page, False, -1)
            heat.total[page] >>= max(0, min(_FAR, clock - heat.clock[page]))
            total += heat.total[page]
    heat.huge_total[first >> TABLE_SHIFT] = total >> TABLE_SHIFT
    heat.clock[first] = clock
    heat.counted[first] = -1 if known else 0
    heat.huge[first >> TABLE_SHIFT] = 1


@inline
def _was_split(heat: Heat, first: int) -> None:
    """The pages of a huge page go on with their own counts."""
    counted = heat.counted[first] == heat.state[EPOCH]
    if counted:
        heat.bins[UNITS, bin_of(heat.huge_total[first >> TABLE_SHIFT])] -= TABLE_PAGES
    for page in range(first, first + TABLE_PAGES):
        heat.clock[page] = heat.clock[first]
        heat.counted[page] = heat.counted[first]
        if counted:
            heat.bins[UNITS, bin_of(heat.total[page])] += 1
    heat.huge[first >> TABLE_SHIFT] = 0


@kernel
def visit(heat: Heat, page: int, huge: bool) -> int:
    """Look at the unit of ``page``: seed it if it is new, halve what is due, count it. Returns its bin."""
    table = page >> TABLE_SHIFT
    first = table << TABLE_SHIFT
    if huge and heat.huge[table] == 0:
        _became_huge(heat, first)
    elif not huge and heat.huge[table] != 0:
        _was_split(heat, first)
    head = first if huge else page
    epoch, clock = heat.state[EPOCH], heat.state[CLOCK]
    behind = clock - heat.clock[head]
    if heat.counted[head] == 0:
        heat.clock[head] = clock + heat.state[SKIP]
        seed = 1 << (heat.state[HOT] + 1)
        if huge:
            heat.huge_total[table] = seed
        else:
            heat.total[page] = seed
    elif behind > 0:
        if heat.counted[head] == epoch:
            _count(heat, head, huge, -1)
            heat.counted[head] = -1
        behind = min(_FAR, behind)
        if huge:
            heat.huge_total[table] >>= behind
            for leaf in range(first, first + TABLE_PAGES):
                heat.total[leaf] >>= behind
        else:
            heat.total[page] >>= behind
        heat.clock[head] = clock
    if heat.counted[head] != epoch:
        _count(heat, head, huge, 1)
        heat.counted[head] = epoch
    return bin_of(heat.huge_total[table] if huge else heat.total[page])


@inline
def _place(nodes: Nodes, frame: int, hot: bool) -> int:
    """Have the unit on the active list if it is hot, else on the inactive one; pages moved."""
    flags = nodes.flags[frame]
    if (flags & F_LRU) == 0 or ((flags & F_ACTIVE) != 0) == hot:
        return 0
    lru_remove(nodes, frame)
    lru_add(nodes, frame, 1 if hot else 0)
    return unit_size(nodes, frame)


@metered
def record(heat: Heat, nodes: Nodes, pages: Words, frames: Ints) -> tuple[int, int]:
    """Enter one sample for each of ``pages`` (mapped; ``frames``: of their units); (pages activated, deactivated)."""
    half = nodes.page.size // 2
    state = heat.state
    activated = deactivated = 0
    for i in range(pages.size):
        page, frame = pages[i], frames[i]
        table = page >> TABLE_SHIFT
        huge = (nodes.flags[frame] & F_HUGE) != 0
        before = visit(heat, page, huge)
        if frame < half:
            state[FAST_HITS] += 1
        base = bin_of(heat.total[page])
        if base >= state[BASE_HOT]:
            state[BASE_HITS] += 1
        heat.total[page] += TABLE_PAGES
        heat.bins[BASE, base] -= 1
        heat.bins[BASE, bin_of(heat.total[page])] += 1
        size = 1
        if huge:
            heat.huge_total[table] += 1
            size = TABLE_PAGES
        after = bin_of(heat.huge_total[table] if huge else heat.total[page])
        heat.bins[UNITS, before] -= size
        heat.bins[UNITS, after] += size
        moved = _place(nodes, frame, after >= state[HOT])
        if after >= state[HOT]:
            activated += moved
        else:
            deactivated += moved
    return activated, deactivated


@metered
def walk(heat: Heat, nodes: Nodes, node: int) -> tuple[int, int, int]:
    """Look at all units of a node and place them: (units looked at, pages activated, pages deactivated)."""
    visited = activated = deactivated = 0
    for which in (INACTIVE, ACTIVE):
        end = nodes.page.size + 2 * node + which
        frame = nodes.previous[end]
        while frame != end:
            towards_head = nodes.previous[frame]
            hot = visit(heat, nodes.page[frame], (nodes.flags[frame] & F_HUGE) != 0) >= heat.state[HOT]
            moved = _place(nodes, frame, hot)
            if hot:
                activated += moved
            else:
                deactivated += moved
            visited += 1
            frame = towards_head
    return visited, activated, deactivated


@metered
def take(heat: Heat, nodes: Nodes, node: int, active: int, limit: int, out: Words) -> tuple[int, int]:
    """From the tail of a list: the hot units of the active one, or those of the inactive one that are not even warm.

    Up to ``limit`` pages, of which the last unit may have more. What is hot moves to the active list, what is not to
    the inactive one, what is warm to its head. Returns how many units are in ``out`` (their heads) and units looked at.
    """
    state = heat.state
    found = pages = visited = 0
    end = nodes.page.size + 2 * node + active
    frame, last = nodes.previous[end], nodes.next[end]
    done = frame == end
    while not done and pages < limit:
        towards_head = nodes.previous[frame]
        done = frame == last
        level = visit(heat, nodes.page[frame], (nodes.flags[frame] & F_HUGE) != 0)
        visited += 1
        hot = level >= state[HOT]
        if hot != (active == ACTIVE):
            _place(nodes, frame, hot)
        elif active == INACTIVE and level >= state[WARM]:
            lru_remove(nodes, frame)
            lru_add(nodes, frame, INACTIVE)
        else:
            out[found] = nodes.page[frame]
            found += 1
            pages += unit_size(nodes, frame)
        frame = towards_head
    return found, visited


@metered
def survey(heat: Heat, pages: Words, buckets: Bytes, counts: Words) -> None:
    """Skewness of huge pages (heads, int64[n]): the bucket of each (uint8[n]).

    ``counts``: int64[2], sub-pages that are hot by themselves, and accesses, of all.
    """
    state = heat.state
    least = min(state[HOT], state[BASE_HOT])
    counts[:] = 0
    for i in range(pages.size):
        head = pages[i]
        level = visit(heat, head, True)
        used = squares = 0
        for page in range(head, head + TABLE_PAGES):
            count = heat.total[page] >> TABLE_SHIFT
            squares += count * count
            if bin_of(heat.total[page]) >= least:
                used += 1
        counts[0] += used
        counts[1] += heat.huge_total[head >> TABLE_SHIFT]
        if used == 0 or level >= _TOO_HOT:
            buckets[i] = 0
        else:
            buckets[i] = skew_bucket(squares // _SKEW_DIVISOR // (used * used))


@inline
def skew_bucket(skew: int) -> int:
    """Logarithmic below 1024, then in steps of 1024 (htmm_core.c, get_skew_idx)."""
    bucket = 0
    if skew >= 1024:
        while skew > 1024 and bucket < 9:
            skew -= 1024
            bucket += 1
        return bucket + 11
    while skew > 0:
        skew >>= 1
        bucket += 1
    return bucket


def levels(heat: Heat) -> tuple[Words, Words]:
    """Bins as of now, without looking: of 4 KiB pages on their own (int64[pages]), of huge pages (int64[tables]).

    -1 for what was never looked at, and for what belongs to a huge page (is none).
    """
    whole = np.repeat(heat.huge != 0, TABLE_PAGES)
    behind = np.clip(int(heat.state[CLOCK]) - heat.clock.astype(np.int64), 0, _FAR)
    heads = heat.huge_total >> behind[::TABLE_PAGES]
    known = heat.counted != 0
    base = np.where(known & ~whole, _bins(heat.total >> behind), NO_PAGE)
    return base, np.where((heat.huge != 0) & known[::TABLE_PAGES], _bins(heads), NO_PAGE)


def _bins(counts: Words) -> Words:
    edges = (np.int64(1) << np.arange(1, BINS, dtype=np.int64)) - 1
    return np.searchsorted(edges, counts, side="right").astype(np.int64)
