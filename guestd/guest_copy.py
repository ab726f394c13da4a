"""The half of the guest's view that copies pages while they stay mapped, and keeps their old frames as shadows.

Nomad's transactional page migration and its page shadowing (OSDI'24, 3). A batch of copies is begun at once and done at
times of its own, one page after the other, as one kernel thread would: `start_copies` takes the frames and emits the
steps (`guestd.transaction`), which the engine executes when their times come; `finish_copies` then puts the books in
order. A page that was written while it was copied has its old frame still. Meanwhile both frames are F_BUSY. Left out:
pages with several mappings or references, which Nomad migrates with the page unmapped; there are none here.
"""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from guestd.events import EventLog
from guestd.flush import TlbFlush
from guestd.machine import Machine
from guestd.meter import MIGRATE, metered
from guestd.mm.nodes import (
    ACTIVE,
    F_ACTIVE,
    F_BUSY,
    F_LRU,
    FAST,
    INACTIVE,
    SLOW,
    Nodes,
    give_free,
    lru_add,
    lru_remove,
)
from guestd.mm.shadows import NO_SHADOW, Shadows, drop_shadows, link_shadow, new_shadows, reclaim_shadows, take_shadows
from guestd.tiering import units
from guestd.tiering.copies import CopyView
from guestd.tiering.pages import frame_of
from guestd.transaction import READ_ONLY, VCPU_SHIFT, unshadowed
from proto.arrays import Ints, Mask, Words
from proto.costs import copy_ps
from proto.counters import C
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, SHADOWED
from proto.layout import OP_TRANSACTION_BEGIN, OP_TRANSACTION_END, OPERATION
from proto.units import PAGE_SHIFT

RECLAIM_PER_TRY = 10
"""Shadow pages that a failed allocation gives up."""


@metered
def _depart(nodes: Nodes, pages: Words, frames: Ints, targets: Ints) -> None:
    """Off the lists; either frame may be the page's, and nobody else may move it."""
    for i in range(pages.size):
        frame, target = frames[i], targets[i]
        if nodes.flags[frame] & F_LRU:
            lru_remove(nodes, frame)
        nodes.flags[frame] |= F_BUSY
        nodes.flags[target] = F_BUSY
        nodes.page[target] = pages[i]


@metered
def _land(nodes: Nodes, gpt: Words, shadows: Shadows, pages: Words, frames: Ints, targets: Ints, done: Mask) -> int:
    """Which pages changed frames (bool[n]); returns how many left a shadow, which are those not written since."""
    linked = 0
    for i in range(pages.size):
        frame, target, entry = frames[i], targets[i], gpt[pages[i]]
        done[i] = frame_of(entry) == target
        listed = ACTIVE if nodes.flags[frame] & F_ACTIVE else INACTIVE
        if done[i]:
            nodes.flags[target] = 0
            lru_add(nodes, target, listed)
            if (entry & SHADOWED) != 0:
                link_shadow(shadows, nodes, target, frame)
                linked += 1
            else:
                give_free(nodes, frame)
        else:
            nodes.flags[frame] &= ~F_BUSY
            lru_add(nodes, frame, listed)
            give_free(nodes, target)
    return linked


@metered
def _map_shadows(gpt: Words, nodes: Nodes, pages: Words, frames: Ints, shadows: Ints, protnone: int) -> None:
    """Point the entries at the shadows (old, clean, writable) and free the frames."""
    for i in range(pages.size):
        entry = unshadowed(gpt[pages[i]] & ~(FRAME_MASK | ACCESSED | DIRTY)) | (shadows[i] << FRAME_SHIFT)
        gpt[pages[i]] = (entry & ~PRESENT) | PROTNONE if protnone != 0 else entry
        give_free(nodes, frames[i])


class Copies(CopyView):
    """See the module. ``shadows``: None until `keep_shadows`."""

    _machine: Machine
    _events: EventLog
    flush: TlbFlush
    shadows: Shadows | None = None
    _flight: tuple[Words, Ints, Ints] | None = None
    """Pages that are being copied, their frames, and those that they are copied to."""
    _emitted: npt.NDArray[np.void] | None = None

    def keep_shadows(self) -> None:
        self.shadows = new_shadows(self.nodes)
        # Compiled before the VM runs: whether memory runs short or a clean page goes back, no short run can tell.
        book, none = np.zeros_like(self.meter.book), np.zeros(0, np.int32)
        take_shadows(book, self.shadows, none, none)
        drop_shadows(book, self.shadows, self.nodes, none)
        reclaim_shadows(book, self.shadows, self.nodes, 0)
        _map_shadows(book, self._table, self.nodes, none.astype(np.int64), none, none, 0)

    def take_operations(self) -> npt.NDArray[np.void] | None:
        """Steps that the engine has to execute from now on instead of those before (OPERATION[n]); None: no change."""
        emitted, self._emitted = self._emitted, None
        return emitted

    def start_copies(self, pages: Words, keep: int, *, shadow: bool) -> tuple[Mask, int]:
        assert self._flight is None, "one batch at a time"
        frames, targets = self.frames(pages), np.empty(pages.size, np.int32)
        units.pick_targets(self.meter.book, self.nodes, frames, FAST, keep, targets)
        started = targets >= 0
        pages, frames, targets = pages[started], frames[started], targets[started]
        if pages.size == 0:
            return started, self.now
        _depart(self.meter.book, self.nodes, pages, frames, targets)
        self._back(np.concatenate([frames, targets]).astype(np.int64))
        began = self.now
        self._flush_copied(pages)
        copy = copy_ps(self.costs, True, False)
        before_copy = self.costs.migrate_page_ps + (self.now - began) // pages.size
        ends = began + (before_copy + copy) * np.arange(1, pages.size + 1, dtype=np.int64)
        self.meter.charge((self.costs.migrate_page_ps + copy) * pages.size)
        self._emit_copies(ends - copy, OP_TRANSACTION_BEGIN, pages, targets, 0)
        vcpu = self.flush.vcpu << VCPU_SHIFT
        self._emit_copies(ends, OP_TRANSACTION_END, pages, targets, vcpu | (READ_ONLY if shadow else 0))
        self._traffic(SLOW, FAST, pages.size)
        self._flight = pages, frames, targets
        return started, max(self.now, int(ends[-1]))

    def finish_copies(self) -> tuple[Words, Mask]:
        if self._flight is None:
            return np.zeros(0, np.int64), np.zeros(0, np.bool_)
        pages, frames, targets = self._flight
        self._flight = None
        self._emitted = np.zeros(0, OPERATION)
        done, counters = np.empty(pages.size, np.bool_), self.counters
        shadows = self.shadows if self.shadows is not None else new_shadows(self.nodes)
        linked = _land(self.meter.book, self.nodes, self._table, shadows, pages, frames, targets, done)
        self._flush_copied(pages[done])
        count = int(done.sum())
        counters[C.vmstat__nomad_shadow_link] += linked
        counters[C.vmstat__nomad_transaction_success] += count
        counters[C.vmstat__nomad_transaction_abort] += pages.size - count
        counters[C.vmstat__pgmigrate_success] += count
        counters[C.bytes__migrated] += count << PAGE_SHIFT
        self._events.add(self.now, "promote", self._gva(pages[done]), SLOW, FAST)
        return pages, done

    def on_writes(self, pages: Words) -> None:
        """Write-protect faults on ``pages`` (int64[n]), which are writable again: their shadows are of no use."""
        with self.meter.stage(MIGRATE):
            self.meter.charge(self.costs.wp_fault_ps * pages.size)
            self.counters[C.vmstat__nomad_wp_fault] += pages.size
            self._drop_shadows(self.frames(pages))

    def reclaim_shadows(self, limit: int) -> int:
        if self.shadows is None:
            return 0
        found = int(reclaim_shadows(self.meter.book, self.shadows, self.nodes, limit))
        self.counters[C.vmstat__nomad_shadow_reclaim] += found
        self.meter.charge(self.costs.lru_page_ps * found)
        return found

    def on_allocation_failure(self) -> int:
        """No frame is free: give some shadows up (Nomad's patch, mm/page_alloc.c); returns how many."""
        with self.meter.stage(MIGRATE):
            return self.reclaim_shadows(RECLAIM_PER_TRY)

    def _emit_copies(self, times: Words, kind: int, pages: Words, targets: Ints, flags: int) -> None:
        operations = np.zeros(pages.size, OPERATION)
        operations["time_ps"], operations["kind"], operations["flags"] = times, kind, flags
        operations["a"], operations["b"] = pages, targets
        self._emitted = operations if self._emitted is None else np.concatenate([self._emitted, operations])

    def _flush_copied(self, pages: Words) -> None:
        """What the flushes of a batch cost; the steps execute them. A TLB holds no page under PROT_NONE."""
        pages = pages[(self._table[pages] & PRESENT) != 0]
        if pages.size:
            self.flush.pages(pages, requests=pages.size, execute=False)

    def _drop_shadows(self, frames: Ints | Words) -> None:
        if self.shadows is not None:
            dropped = drop_shadows(self.meter.book, self.shadows, self.nodes, frames.astype(np.int32))
            self.counters[C.vmstat__nomad_shadow_drop] += dropped

    def _move(self, pages: Words, node: int, keep: int, sync: bool, protect: bool, copied: bool) -> Mask:
        if self.shadows is None or node == FAST:
            return super()._move(pages, node, keep, sync, protect, copied)
        moved = self._move_to_shadows(self.shadows, pages, protect)
        rest = ~moved
        moved[rest] = super()._move(pages[rest], node, keep, sync, protect, copied)
        return moved

    def _move_to_shadows(self, shadows: Shadows, pages: Words, protect: bool) -> Mask:
        """Demote what has a shadow: no copy, but a flush each as for any migration."""
        frames, targets = self.frames(pages), np.empty(pages.size, np.int32)
        count = int(take_shadows(self.meter.book, shadows, frames, targets))
        moved = targets != NO_SHADOW
        if count:
            pages, frames, targets = pages[moved], frames[moved], targets[moved]
            self._flush_unmapped(pages, np.ones(count, np.int64), self._batched_flush())
            units.relink(self.meter.book, self.nodes, frames, targets, SLOW)
            _map_shadows(self.meter.book, self._table, self.nodes, pages, frames, targets, PROTNONE if protect else 0)
            self.meter.charge(self.costs.migrate_page_ps * count)
            self.counters[C.vmstat__nomad_shadow_demote] += count
            self.counters[C.vmstat__pgmigrate_success] += count
            self._events.add(self.now, "demote", self._gva(pages), FAST, SLOW)
        return moved

    @abstractmethod
    def _back(self, frames: Words) -> None:
        """Have the host map frames before a copy, as its first access would."""

    @abstractmethod
    def _batched_flush(self) -> bool:
        """Whether unmapping flushes once for a batch."""

    @abstractmethod
    def _flush_unmapped(self, pages: Words, sizes: Words, batched: bool) -> None:
        """Flush units whose entries are taken out."""

    @abstractmethod
    def _gva(self, pages: Words) -> Words:
        """Address of each page."""

    @abstractmethod
    def _traffic(self, source: int, target: int, pages: int) -> None:
        """Migration traffic uses the tiers' bandwidth like any other."""
