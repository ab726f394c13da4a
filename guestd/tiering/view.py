"""`PageView`: what a tiering algorithm sees of memory, whoever runs it (architecture 1).

The guest's view translates gVA pages to gPA frames (GPT), the host's gPA pages to hPA frames (EPT). An algorithm is
written once against the operations below; what an operation costs, which flushes it needs and what it counts is the
view's business. All operations take and return arrays, work in compiled kernels that book themselves to the current
stage, and charge the modelled cost of the same work to the same stage.

A *page* is an index into the view's table, a *frame* what it maps to; node 0 is fast, node 1 slow. A huge page is one
*unit*: its first page, the head, stands for it, as does that page's frame; whatever page of it is named, the unit is
meant. Counts and limits are in 4 KiB pages, of which it has 512.
"""

from abc import abstractmethod

import numpy as np

from guestd.meter import metered
from guestd.mm.nodes import (
    F_ACTIVE,
    F_BUSY,
    F_DEMOTED,
    FAST,
    NO_PAGE,
    SLOW,
    isolate_tail,
    mark_accessed,
    mark_inactive_accessed,
    put_back,
)
from guestd.tiering import pages as ptes
from guestd.tiering import units
from guestd.tiering.observe import Observations
from guestd.tiering.pages import expand
from guestd.tiering.units import NO_ROOM
from proto.arrays import Ints, Mask, Words
from proto.costs import copy_ps
from proto.counters import C
from proto.units import PAGE_SHIFT, TABLE_PAGES

_isolate = metered(isolate_tail)
_put_back = metered(put_back)
_mark_accessed = metered(mark_accessed)
_mark_inactive_accessed = metered(mark_inactive_accessed)


class PageView(Observations):
    """See the module; `Observations` has the half that only reads."""

    # -- LRU ----------------------------------------------------------------------------------------------------

    def isolate(self, node: int, active: int, limit: int) -> Ints:
        """Frames of units off the tail of a list (int32[n]), up to ``limit`` pages; the last may have more."""
        out = np.empty(limit, np.int32)
        count = _isolate(self.meter.book, self.nodes, node, active, out)
        self.meter.charge(self.costs.lru_page_ps * count)
        return out[:count]

    def put_back(self, frames: Ints, active: Mask, referenced: Mask) -> None:
        """Put isolated frames back on the head of their lists."""
        _put_back(self.meter.book, self.nodes, frames, active.view(np.uint8), referenced.view(np.uint8))
        self.meter.charge(self.costs.lru_page_ps * frames.size)

    def pages_of(self, frames: Ints) -> Words:
        """The page in each frame (int64[n])."""
        return self.nodes.page[frames].astype(np.int64)

    def mark_accessed(self, frames: Ints) -> None:
        """mark_page_accessed on each frame."""
        activated = _mark_accessed(self.meter.book, self.nodes, frames)
        self.counters[C.vmstat__pgactivate] += activated
        self.meter.charge(self.costs.lru_page_ps * frames.size)

    def mark_inactive_accessed(self, frames: Ints) -> Mask:
        """`mark_accessed` on the frames that are on no active list; which were active already (bool[n])."""
        active = np.empty(frames.size, np.bool_)
        self.counters[C.vmstat__pgactivate] += _mark_inactive_accessed(self.meter.book, self.nodes, frames, active)
        self.meter.charge(self.costs.lru_page_ps * (frames.size - int(active.sum())))
        return active

    def is_active(self, frames: Ints) -> Mask:
        """Whether each frame is on an active list."""
        return (self.nodes.flags[frames] & F_ACTIVE) != 0

    def was_demoted(self, frames: Ints) -> Mask:
        """Whether the page in each frame was demoted before."""
        return (self.nodes.flags[frames] & F_DEMOTED) != 0

    def nodes_of(self, pages: Words) -> Ints:
        """Node of each page (int32[n]), NO_PAGE where unmapped."""
        frames = self.frames(pages)
        return np.where(frames == NO_PAGE, NO_PAGE, frames >= self._half).astype(np.int32)

    def active_pages(self) -> Words:
        """The units on active lists (int64[n]); for the emulator to look at, not booked."""
        return self.nodes.page[np.flatnonzero(self.nodes.flags & F_ACTIVE)].astype(np.int64)

    # -- changes ------------------------------------------------------------------------------------------------

    @abstractmethod
    def protect(self, first: int, count: int) -> int:
        """Put slow pages of [first, first + count) under PROT_NONE; returns how many; one flush for the range."""

    def write_protect(self, pages: Words) -> None:
        """Have writes to units fault until `end_write_protection`. A guest's view only."""
        raise NotImplementedError

    def end_write_protection(self, pages: Words) -> None:
        """Have units writable again. A guest's view only."""
        raise NotImplementedError

    def work_together(self, threads: int, work_ps: int) -> None:
        """Work that as many threads share, each on a vCPU of its own. A guest's view only."""
        raise NotImplementedError

    def note_scan(self, first: int, count: int, scanned_ps: Words) -> None:
        """Note the time in ``scanned_ps`` (int64[pages]) for each unit that `protect` of the same range will change.

        Linux keeps it in the page's cpupid field (mm/mprotect.c, xchg_page_access_time), as part of changing its PTE.
        """
        count = self._clip(first, count)
        ptes.note_time(self.meter.book, self._table, self._pde, self._half, first, count, self.now, scanned_ps)

    def unprotect(self, pages: Words) -> None:
        """Take PROT_NONE off pages (a fault resolves it; no flush is needed)."""
        ptes.unprotect(self.meter.book, self._table, self._pde, pages)

    def move(self, pages: Words, node: int, keep: int, *, sync: bool = False, protect: bool = False,
             copied: bool = False) -> Mask:  # fmt: skip
        """Migrate pages to ``node``, leaving ``keep`` frames free there; ``sync``: in the fault path.

        ``protect``: their new entries are PROT_NONE, so that the next access is a hint fault. ``copied``: content has
        been copied under `write_protect`, whose end will flush, so that neither costs anything here.

        Returns bool[n], false where there was no frame or the page was already there. Content moves along. A huge page
        needs a free block; without one it stays (`thp_migration_fail`), and may be `split`.
        """
        heads = self.heads(pages)
        if (heads == pages).all():
            return self._move(pages, node, keep, sync, protect, copied)
        # Pages of one unit may have been named several times; it moves once, where it was named first.
        once, first, which = np.unique(heads, return_index=True, return_inverse=True)
        order = np.argsort(first)
        moved = np.empty(once.size, np.bool_)
        moved[order] = self._move(once[order], node, keep, sync, protect, copied)
        return moved[which]

    def _move(self, pages: Words, node: int, keep: int, sync: bool, protect: bool, copied: bool) -> Mask:
        if pages.size == 0:
            return np.zeros(0, np.bool_)
        frames = self.frames(pages)
        targets = np.empty(pages.size, np.int32)
        units.pick_targets(self.meter.book, self.nodes, frames, node, keep, targets)
        moved = targets >= 0
        huge = units.is_huge(self.nodes, frames)
        self.counters[C.vmstat__thp_migration_success] += int((huge & moved).sum())
        self.counters[C.vmstat__thp_migration_fail] += int((huge & (targets == NO_ROOM)).sum())
        if moved.any():
            pages, frames, targets = pages[moved], frames[moved], targets[moved]
            sizes = self.frame_sizes(frames)
            units.relink(self.meter.book, self.nodes, frames, targets, node)
            each = self.costs.migrate_page_ps + (self.costs.migrate_sync_ps if sync else 0)
            copies = 0 * sizes if copied else copy_ps(self.costs, node == FAST, node == SLOW) * sizes
            self._migrate(pages, frames, targets, sizes, node, each + copies, protect, copied)
            self.counters[C.vmstat__pgmigrate_success] += int(sizes.sum())
            self.counters[C.bytes__migrated] += int(sizes.sum()) << PAGE_SHIFT
        return moved

    def exchange(self, slow_pages: Words, fast_pages: Words, *, batched: bool) -> int:
        """Swap the places of units pairwise, without a free frame; returns the pages swapped on each side.

        ``batched``: one flush for the batch instead of one per page. A pair of two sizes, or one that names another
        page of a unit than its head, is not swapped (`pgmigrate_fail`): `match` makes pairs.
        """
        pairs = self._pairs(slow_pages, fast_pages)
        count = int(pairs[-1].sum())
        if count:
            self._swap(*pairs, batched)
        return count

    def _pairs(self, slow_pages: Words, fast_pages: Words) -> tuple[Words, Ints, Words, Ints, Words]:
        """Pairs that may be swapped, which the nodes know as swapped from now on: pages and frames of both, sizes."""
        count = min(slow_pages.size, fast_pages.size)
        slow_pages, fast_pages = slow_pages[:count], fast_pages[:count]
        slow_frames, fast_frames = self.frames(slow_pages), self.frames(fast_pages)
        good = (slow_frames >= self._half) & (fast_frames != NO_PAGE) & (fast_frames < self._half)
        good &= ((self.nodes.flags[slow_frames] | self.nodes.flags[fast_frames]) & F_BUSY) == 0
        good &= (self.heads(slow_pages) == slow_pages) & (self.heads(fast_pages) == fast_pages)
        sizes = self.frame_sizes(fast_frames)
        good &= self.frame_sizes(slow_frames) == sizes
        self.counters[C.vmstat__pgmigrate_fail] += 2 * int(sizes[~good].sum())
        slow_pages, fast_pages = slow_pages[good], fast_pages[good]
        slow_frames, fast_frames, sizes = slow_frames[good], fast_frames[good], sizes[good]
        count = int(sizes.sum())
        if count:
            units.relink_pairs(self.meter.book, self.nodes, slow_frames, fast_frames)
            self.counters[C.vmstat__pgexchange_success] += count
            self.counters[C.bytes__migrated] += 2 * count << PAGE_SHIFT
        return slow_pages, slow_frames, fast_pages, fast_frames, sizes

    def match(self, slow_pages: Words, fast_pages: Words) -> tuple[Words, Words]:
        """Pairs for `exchange` from units that are to be promoted and demoted: of one size each, huge pages first.

        Where the sizes do not come out even, as many huge pages are `split` as it takes.
        """
        if not (slow_pages.size and fast_pages.size):
            return slow_pages[:0], fast_pages[:0]
        sides: list[tuple[Words, Words]] = []
        for pages in (slow_pages, fast_pages):
            heads = self.heads(pages)
            heads = heads[np.sort(np.unique(heads, return_index=True)[1])]
            sizes = self.sizes(heads)
            sides.append((heads[sizes > 1], heads[sizes == 1]))
        (slow_huge, slow), (fast_huge, fast) = sides
        both = min(slow_huge.size, fast_huge.size)
        if slow.size > fast.size:
            needed = -(-(slow.size - fast.size) // TABLE_PAGES)
            fast = np.concatenate([fast, self._pieces(fast_huge[both : both + needed])])
        else:
            needed = (fast.size - slow.size) // TABLE_PAGES
            slow = np.concatenate([slow, self._pieces(slow_huge[both : both + needed])])
        count = min(slow.size, fast.size)
        return np.concatenate([slow_huge[:both], slow[:count]]), np.concatenate([fast_huge[:both], fast[:count]])

    def _pieces(self, heads: Words) -> Words:
        heads = heads[self.split(heads)]
        return expand(heads, np.full(heads.size, TABLE_PAGES))

    def split(self, pages: Words) -> Mask:
        """Split huge pages into 4 KiB pages with their accessed and dirty bits; which page's unit was split (bool[n]).

        mm/huge_memory.c, split_huge_page. Its pieces are on the list, or off it, as it was. Costs `split_huge_ps` and a
        flush of the 2 MiB each. A page that is none, is being moved or named twice is not split.
        """
        heads = self.heads(pages)
        able = np.zeros(pages.size, np.bool_)
        able[np.unique(heads, return_index=True)[1]] = True
        frames = self.frames(pages)
        able &= units.is_huge(self.nodes, frames) & ((self.nodes.flags[frames] & F_BUSY) == 0)
        able &= self.sizes(pages) > 1
        if able.any():
            done = self._split(heads[able])
            able[able] = done
            units.split(self.meter.book, self.nodes, frames[able])
            self.counters[C.vmstat__thp_split_page] += int(able.sum())
        return able

    def collapse(self, first_pages: Words) -> Mask:
        """Make one huge page of each 512 pages from ``first_pages`` on; which were (bool[n]).

        mm/khugepaged.c, collapse_huge_page. All 512 must be mapped, to frames of one node that has a free block. Costs
        `collapse_huge_ps`, a copy of each page, and a flush of the 2 MiB.
        """
        done = np.zeros(first_pages.size, np.bool_)
        for i, first in enumerate(first_pages):
            pages = np.arange(first, first + TABLE_PAGES, dtype=np.int64)
            if first % TABLE_PAGES or first + TABLE_PAGES > self.pages or (self.sizes(pages[:1]) > 1).any():
                continue
            frames = self.frames(pages)
            target = int(units.take_block_for(self.meter.book, self.nodes, frames))
            if target != NO_PAGE:
                units.collapse(self.meter.book, self.nodes, frames, target)
                slow = target >= self._half
                copies = TABLE_PAGES * copy_ps(self.costs, slow, slow)
                self._collapse(pages, frames, target, self.costs.collapse_huge_ps + copies)
                self.counters[C.vmstat__thp_collapse_alloc] += 1
                done[i] = True
        return done

    # -- what the views differ in -------------------------------------------------------------------------------

    @abstractmethod
    def _migrate(self, pages: Words, frames: Ints, targets: Ints, sizes: Words, node: int, cost_ps: Words,
                 protect: bool, copied: bool) -> None:  # fmt: skip
        """Unmap, flush (but if ``copied``), copy, remap; free the old frames.

        ``cost_ps``: int64[n], work per unit without flushes.
        """

    @abstractmethod
    def _swap(self, slow_pages: Words, slow_frames: Ints, fast_pages: Words, fast_frames: Ints, sizes: Words,
              batched: bool) -> None:  # fmt: skip
        """Unmap both, flush, swap contents, remap."""

    @abstractmethod
    def _split(self, heads: Words) -> Mask:
        """Map the pages of each huge page on their own, and flush; which were (bool[n]). The nodes follow."""

    @abstractmethod
    def _collapse(self, pages: Words, frames: Ints, target: int, cost_ps: int) -> None:
        """Unmap 512 pages, flush, copy them to the block from ``target`` on, map it huge; free the old frames."""
