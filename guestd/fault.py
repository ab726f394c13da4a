"""Page faults of a guest, taken in batches.

When an access cannot be translated, the rest of the block is looked through in order: pages never mapped are allocated
and mapped at once (demand-zero), pages under PROT_NONE are listed for the policy (NUMA hint faults), and gPA frames
without an EPT mapping are listed for one `EptFault` message. Every fault is charged on its own, before the access that
would have met it; only its side effects come up to one block early (the invariance law bounds what that moves).
"""

import numpy as np

from guestd.jit import inline, kernel
from guestd.mm.nodes import NO_PAGE, Nodes, allocate, lru_add
from guestd.pml import P_ON, Pml, log_dirty
from guestd.vcpu import CLOCK, LENGTH, POSITION, Vcpus
from proto.arrays import Bytes, Words
from proto.counters import C, Counters
from proto.entry import (
    DIRTY,
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    STAMP_TABLE_BASE,
    WRITABLE,
)
from proto.units import PAGE_SHIFT, TABLE_SHIFT

QUEUED = 1 << 10
"""Software bit: the page is in the batch that is being collected."""
NO_FRAME = -1
_QUEUED_TABLE = NO_FRAME - 1
"""Less its frame: stands for the frame of a page-table page that is in the batch."""

OUT_OF_MEMORY = 1
LOOK_AHEAD_PS = 100_000_000
"""Compute that a look-ahead may cover (100 us): of a slow program it takes fewer accesses at once."""
HINT_BATCH = 32
"""Hint faults taken at a time, so that kswapd can free frames between promotions as it would (SWAP_CLUSTER_MAX)."""


class Batch:
    """What one look-ahead found. Arrays are int64[block] unless said otherwise; the counts say how much is filled."""

    def __init__(self, block: int) -> None:
        self.hint_page = np.zeros(HINT_BATCH, np.int64)
        self.hint_position = np.zeros(HINT_BATCH, np.int64)
        self.gpfn = np.zeros(3 * block, np.int64)
        self.gpfn_position = np.zeros(3 * block, np.int64)
        self.gpfn_old = np.zeros(3 * block, np.uint8)
        """uint8: 1 if the page had been mapped before, so that the violation is management's doing."""
        self.fresh = np.zeros(2 * block, np.int64)
        """Pages (or STAMP_TABLE_BASE + table) that got a frame and are to be cleared once the EPT maps it."""
        self.fresh_gpfn = np.zeros(2 * block, np.int64)
        self.counts = np.zeros(4, np.int64)
        """hint, gpfn, fresh, state (OUT_OF_MEMORY)."""


@inline
def _backed(ept: Words, gpfn: int) -> bool:
    return bool((ept[gpfn] & PRESENT) != 0)


@kernel
def collect(
    vcpus: Vcpus, vcpu: int, block: int, gpt: Words, ept: Words, nodes: Nodes, table_gpfn: Words, prefer: Bytes,
    default_node: int, fault_ps: int, hint_page: Words, hint_position: Words, gpfns: Words, gpfn_position: Words,
    gpfn_old: Bytes, fresh: Words, fresh_gpfn: Words, counts: Words, counters: Counters,
) -> None:  # fmt: skip
    """Look through up to ``block`` accesses of ``vcpu`` from its position on and gather their faults.

    ``prefer``: uint8[pages] preferred node per page, or empty for ``default_node``.
    """
    start = vcpus.field[vcpu, POSITION]
    limit = end = min(vcpus.field[vcpu, LENGTH], start + block)
    hints = found = new = 0
    counts[3] = 0
    ahead = 0
    for position in range(start, end):
        page = vcpus.address[vcpu, position] >> PAGE_SHIFT
        entry = gpt[page]
        ahead += vcpus.think_ps[vcpu, position]
        if ahead > LOOK_AHEAD_PS and position > start:
            end = position
            break
        table = page >> TABLE_SHIFT
        walked = table_gpfn[table]
        if walked > NO_FRAME and not _backed(ept, walked):
            table_gpfn[table] = _QUEUED_TABLE - walked
            gpfns[found], gpfn_position[found], gpfn_old[found] = walked, position, 1
            found += 1
        if (entry & PROTNONE) != 0:
            if (entry & QUEUED) == 0:
                if hints == HINT_BATCH:
                    end = position
                    break
                gpt[page] = entry | QUEUED
                hint_page[hints], hint_position[hints] = page, position
                hints += 1
        elif (entry & PRESENT) == 0:
            node = prefer[page] if prefer.size > 0 else default_node
            if table_gpfn[table] == NO_FRAME:
                frame = allocate(nodes, default_node)
                if frame == NO_PAGE:
                    counts[3] = OUT_OF_MEMORY
                    break
                table_gpfn[table] = frame
                fresh[new], fresh_gpfn[new] = STAMP_TABLE_BASE + table, frame
                new += 1
                if not _backed(ept, frame):
                    table_gpfn[table] = _QUEUED_TABLE - frame
                    gpfns[found], gpfn_position[found], gpfn_old[found] = frame, position, 0
                    found += 1
            frame = allocate(nodes, node)
            if frame == NO_PAGE:
                counts[3] = OUT_OF_MEMORY
                break
            nodes.page[frame] = page
            lru_add(nodes, frame, 0)
            gpt[page] = (entry & ~FRAME_MASK) | (frame << FRAME_SHIFT) | PRESENT | WRITABLE | QUEUED
            fresh[new], fresh_gpfn[new] = page, frame
            new += 1
            vcpus.fault_ps[vcpu, position] += fault_ps
            counters[C.vmstat__pgfault] += 1
            counters[C.time__fault_ps] += fault_ps
            if not _backed(ept, frame):
                gpfns[found], gpfn_position[found], gpfn_old[found] = frame, position, 0
                found += 1
        else:
            frame = (entry & FRAME_MASK) >> FRAME_SHIFT
            if (entry & QUEUED) == 0 and not _backed(ept, frame):
                gpt[page] = entry | QUEUED
                gpfns[found], gpfn_position[found], gpfn_old[found] = frame, position, 1
                found += 1
    counts[0], counts[1], counts[2] = hints, found, new
    for position in range(start, min(end + 1, limit)):
        page = vcpus.address[vcpu, position] >> PAGE_SHIFT
        gpt[page] = gpt[page] & ~QUEUED
        if table_gpfn[page >> TABLE_SHIFT] < NO_FRAME:
            table_gpfn[page >> TABLE_SHIFT] = _QUEUED_TABLE - table_gpfn[page >> TABLE_SHIFT]


@kernel
def clear_fresh(
    vcpus: Vcpus, vcpu: int, pml: Pml, ept: Words, stamps: Words, owner: int, fresh: Words, fresh_gpfn: Words,
    counters: Counters,
) -> int:  # fmt: skip
    """Clear newly allocated frames: write each page's own stamp at version 0, whatever its entry expects.

    So a mapping that was lost and faulted in again shows, as its content is gone. Clearing writes the frame, so its
    EPT D bit is set, on ``vcpu``. Returns the number of frames that the EPT does not map.
    """
    unmapped = 0
    for i in range(fresh.size):
        entry = ept[fresh_gpfn[i]]
        if (entry & PRESENT) == 0:
            unmapped += 1
            continue
        ept[fresh_gpfn[i]] = entry | DIRTY
        if (entry & DIRTY) == 0 and pml.params[P_ON] != 0:
            useless = 1 if fresh[i] >= STAMP_TABLE_BASE else 0
            vcpus.field[vcpu, CLOCK] += log_dirty(pml, vcpu, fresh_gpfn[i], useless, counters)
        stamps[(entry & FRAME_MASK) >> FRAME_SHIFT] = owner | (fresh[i] << STAMP_PAGE_SHIFT)
    return unmapped


@kernel
def charge(amount: Words, positions: Words, cost_ps: Words) -> int:
    """Add ``cost_ps[i]`` to ``amount[positions[i]]``; returns the sum."""
    total = 0
    for i in range(positions.size):
        amount[positions[i]] += cost_ps[i]
        total += cost_ps[i]
    return total


@kernel
def verify(gpt: Words, ept: Words, stamps: Words, owner: int, kernel_gpfn: Words) -> tuple[int, int]:
    """Check the stamp of every mapped page and every kernel page; returns (mapped pages checked, mismatches).

    ``kernel_gpfn``: int64[k], frames of page-table pages, then of DS pages; NO_FRAME where there is none, or where
    nobody has written to it yet. The EPT maps them all.
    """
    checked = bad = 0
    for page in range(gpt.size):
        entry = gpt[page]
        if (entry & (PRESENT | PROTNONE)) != 0:
            checked += 1
            frame = (ept[(entry & FRAME_MASK) >> FRAME_SHIFT] & FRAME_MASK) >> FRAME_SHIFT
            if stamps[frame] != (owner | (page << STAMP_PAGE_SHIFT) | (entry >> ENTRY_VERSION_SHIFT)):
                bad += 1
    for i in range(kernel_gpfn.size):
        if kernel_gpfn[i] != NO_FRAME:
            frame = (ept[kernel_gpfn[i]] & FRAME_MASK) >> FRAME_SHIFT
            if stamps[frame] != (owner | ((STAMP_TABLE_BASE + i) << STAMP_PAGE_SHIFT)):
                bad += 1
    return checked, bad


@kernel
def locate_tables(ept: Words, table_gpfn: Words, slow_frames: int, out: Words) -> None:
    """Which page-table pages lie in the slow tier now (``out``: int64[tables], 1 = slow), as the EPT has them."""
    for table in range(table_gpfn.size):
        if table_gpfn[table] != NO_FRAME:
            frame = (ept[table_gpfn[table]] & FRAME_MASK) >> FRAME_SHIFT
            out[table] = 1 if frame >= slow_frames else 0
