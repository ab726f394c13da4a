"""Page faults of a guest, taken in batches.

When an access cannot be translated, the rest of the block is looked through in order: pages never mapped are allocated
and mapped at once (demand-zero), pages under PROT_NONE are listed for the policy (NUMA hint faults), read-only pages
that are written are made writable and listed, and gPA frames without an EPT mapping are listed for one `EptFault`
message. Every fault is charged on its own, before the access that would have met it; only its side effects come up to
one block early (the invariance law bounds what that moves).

With transparent huge pages (mm/huge_memory.c, do_huge_pmd_anonymous_page) the first fault in an aligned 2 MiB that lie
wholly in one VMA maps them at once, if its node has a block; if it has none, 4 KiB pages do for good, or until
khugepaged comes round. Left out: the leaf table that Linux keeps in reserve for a split, and compaction.
"""

from typing import NamedTuple

import numpy as np

from guestd.address_space import AddressSpace
from guestd.jit import inline, kernel, prefetch
from guestd.machine import Machine, S
from guestd.mm.nodes import F_HUGE, FAST, NO_PAGE, WMARK_LOW, WMARK_MIN, Nodes, allocate, lru_add, take_free_block
from guestd.pml import set_dirty
from guestd.transaction import unshadowed
from guestd.vcpu import CLOCK, EPT_REFAULT, EPT_VIOLATION, HINT_FAULT, LENGTH, MINOR_FAULT, POSITION, WP_FAULT, Vcpus
from guestd.walk import PageTables
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.counters import C
from proto.entry import (
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    SHADOWED,
    STAMP_PAGE_SHIFT,
    STAMP_TABLE_BASE,
    WRITABLE,
)
from proto.trace import LLC_HIT, LOAD
from proto.units import PAGE_SHIFT, TABLE_PAGES, TABLE_SHIFT

QUEUED = 1 << 10
"""Software bit: the page is in the batch that is being collected."""
NO_FRAME = -1

OUT_OF_MEMORY, WRITE_PROTECTED = 1, 2
LOOK_AHEAD_PS = 100_000_000
"""Compute that a look-ahead may cover (100 us): of a slow program it takes fewer accesses at once."""
_LEAD = 12
"""Accesses by which prefetches run ahead: of the GPT entry twice as many, of the EPT entry as many."""
HINT_BATCH = 32
"""Hint faults taken at a time, so that kswapd can free frames between promotions as it would (SWAP_CLUSTER_MAX)."""


HUGE_BATCH = 8
"""Huge pages faulted in at a time, so that a batch has room for all their frames."""


class Thp(NamedTuple):
    """A guest kernel's transparent huge pages."""

    whole: Bytes
    """uint8[tables]: 1 where a leaf table's 2 MiB lie wholly in one VMA; empty where huge pages are off."""
    fault_ps: int
    """What a fault costs that maps one."""
    remote: bool
    """defrag=always: a node without a block does not end the search. Otherwise only the preferred node is asked
    (mm/mempolicy.c, __GFP_THISNODE without direct reclaim)."""


class Batch(NamedTuple):
    """What one look-ahead found; the counts say how much is filled."""

    hint_page: Words
    """int64[HINT_BATCH]: pages under PROT_NONE, each with the position of the access."""
    hint_position: Words
    gpfn: Words
    """int64[n]: gPA frames that the EPT does not map, each with the position of the access that meets it."""
    gpfn_position: Words
    gpfn_old: Bytes
    """uint8[n]: 1 if it had been mapped before, so that the violation is management's doing."""
    fresh: Words
    """int64[n]: pages (or STAMP_TABLE_BASE + table) that got a frame and are to be cleared once the EPT maps it."""
    fresh_gpfn: Words
    written: Words
    """int64[n]: pages that were read-only and are writable again, as they are written to."""
    counts: Words
    """int64[5]: hints, gPA frames, fresh, state (OUT_OF_MEMORY, or WRITE_PROTECTED: the first access is a write to a
    page that the policy write-protected), written."""


class Faults(NamedTuple):
    """What a guest's kernel needs to take faults, and the batch that it takes."""

    nodes: Nodes
    prefer: Bytes
    """uint8[pages]: preferred node of each page; empty: the fast one."""
    block: int
    """Accesses to look through at a time."""
    minor_fault_ps: int
    wp_fault_ps: int
    swap_in_ps: int
    thp: Thp
    batch: Batch


def new_faults(config: GuestConfig, space: AddressSpace, nodes: Nodes, prefer: Bytes) -> Faults:
    """``prefer``: see `Faults`."""
    kernel, costs = config.kernel, config.costs
    thp = Thp(
        space.whole_tables() if kernel.thp == "always" else np.zeros(0, np.uint8),
        costs.minor_fault_ps + costs.clear_page_huge_ps,
        kernel.thp_defrag == "always",
    )
    block = config.engine.block
    return Faults(
        nodes, prefer, block, costs.minor_fault_ps, costs.wp_fault_ps, costs.swap_in_ps, thp, new_batch(block)
    )


def new_batch(block: int) -> Batch:
    """Room for what ``block`` accesses can meet: a page each, the tables on the way to it, and a few huge pages."""
    room = 6 * block + HUGE_BATCH * TABLE_PAGES + 16
    return Batch(
        np.zeros(HINT_BATCH, np.int64),
        np.zeros(HINT_BATCH, np.int64),
        np.zeros(room, np.int64),
        np.zeros(room, np.int64),
        np.zeros(room, np.uint8),
        np.zeros(room, np.int64),
        np.zeros(room, np.int64),
        np.zeros(block, np.int64),
        np.zeros(5, np.int64),
    )


@inline
def backed(ept: Words, gpfn: int) -> bool:
    """Whether the EPT maps a gPA frame."""
    return bool((ept[gpfn] & PRESENT) != 0)


@inline
def _list_gpfn(batch: Batch, gpfn: int, position: int, old: int) -> None:
    found = batch.counts[1]
    batch.gpfn[found], batch.gpfn_position[found], batch.gpfn_old[found] = gpfn, position, old
    batch.counts[1] = found + 1


@inline
def _list_fresh(batch: Batch, name: int, gpfn: int) -> None:
    new = batch.counts[2]
    batch.fresh[new], batch.fresh_gpfn[new] = name, gpfn
    batch.counts[2] = new + 1


@inline
def _reach_table(m: Machine, nodes: Nodes, batch: Batch, number: int, position: int, node: int) -> bool:
    """Allocate what tables are missing on the way to that of entry ``number``; false if there is no frame left."""
    upper, parent = m.tables.upper, m.tables.parent
    enough = True
    while enough:
        entry = upper[number]
        if (entry & PRESENT) == 0:
            frame = allocate(nodes, node)
            if frame == NO_PAGE:
                enough = False
            else:
                upper[number] = (frame << FRAME_SHIFT) | PRESENT | WRITABLE | QUEUED
                _list_fresh(batch, STAMP_TABLE_BASE + number, frame)
                if not backed(m.ept, frame):
                    _list_gpfn(batch, frame, position, 0)
        elif (entry & (QUEUED | HUGE)) == 0 and not backed(m.ept, (entry & FRAME_MASK) >> FRAME_SHIFT):
            upper[number] = entry | QUEUED
            _list_gpfn(batch, (entry & FRAME_MASK) >> FRAME_SHIFT, position, 1)
        if parent[number] == number:
            break
        number = parent[number]
    return enough


@inline
def _map_huge(m: Machine, nodes: Nodes, batch: Batch, table: int, position: int, node: int, remote: bool) -> bool:
    """Map the 2 MiB of leaf table ``table``, of which nothing is mapped, to a block; false if there is none."""
    # The slow path of the page allocator tries at once with the lower mark (mm/page_alloc.c, gfp_to_alloc_flags).
    frame = take_free_block(nodes, node, nodes.watermark[node, WMARK_MIN])
    if frame == NO_PAGE and remote:
        frame = take_free_block(nodes, 1 - node, nodes.watermark[1 - node, WMARK_LOW])
    if frame == NO_PAGE:
        m.counters[C.vmstat__thp_fault_fallback] += 1
        return False
    m.counters[C.vmstat__thp_fault_alloc] += 1
    first = table << TABLE_SHIFT
    for i in range(TABLE_PAGES):
        nodes.page[frame + i] = first + i
        m.gpt[first + i] = (m.gpt[first + i] & ~FRAME_MASK) | ((frame + i) << FRAME_SHIFT) | PRESENT | WRITABLE
        _list_fresh(batch, first + i, frame + i)
        if not backed(m.ept, frame + i):
            _list_gpfn(batch, frame + i, position, 0)
    nodes.flags[frame] = F_HUGE
    lru_add(nodes, frame, 0)
    m.tables.upper[table] = (frame << FRAME_SHIFT) | PRESENT | WRITABLE | HUGE | QUEUED
    return True


@inline
def _charge_fault(m: Machine, vcpu: int, position: int, fault_ps: int, part: int) -> None:
    vcpus = m.vcpus
    vcpus.fault_ps[vcpu, position] += fault_ps
    vcpus.fault_part[vcpu, position] = part
    vcpus.retries[vcpu, position] += 1
    m.counters[C.vmstat__pgfault] += 1


@kernel
def collect(m: Machine, vcpu: int, faults: Faults) -> None:
    """Look through up to ``faults.block`` accesses of ``vcpu`` from its position on and gather their faults.

    Of swap-ins no more than half of what is left of the slice or quantum has time for: what they bring back is to be
    met before it is swapped out again.
    """
    nodes, prefer, thp, batch = faults.nodes, faults.prefer, faults.thp, faults.batch
    vcpus, gpt, ept, upper = m.vcpus, m.gpt, m.ept, m.tables.upper
    start = vcpus.field[vcpu, POSITION]
    end = min(vcpus.field[vcpu, LENGTH], start + faults.block)
    batch.counts[:] = 0
    most_brought = min(m.state[S.SLICE_PS], m.state[S.END_PS] - vcpus.field[vcpu, CLOCK]) // 2
    ahead = brought = hints = huge = 0
    last = end - 1
    for position in range(start, end):
        prefetch(gpt, vcpus.address[vcpu, min(position + 2 * _LEAD, last)] >> PAGE_SHIFT)
        soon = gpt[vcpus.address[vcpu, min(position + _LEAD, last)] >> PAGE_SHIFT]
        prefetch(ept, (soon & FRAME_MASK) >> FRAME_SHIFT)
        page = vcpus.address[vcpu, position] >> PAGE_SHIFT
        table = page >> TABLE_SHIFT
        entry = gpt[page]
        ahead += vcpus.think_ps[vcpu, position]
        too_much = brought > 0 and brought + vcpus.exit_ps[vcpu, position] > most_brought
        if (ahead > LOOK_AHEAD_PS or too_much) and position > start:
            end = position
            break
        # The books of a huge page are in its leaves, but what becomes of it is its own entry's business.
        whole = (upper[table] & HUGE) != 0
        if (entry & PROTNONE) != 0:
            if ((upper[table] if whole else entry) & QUEUED) == 0:
                if hints == HINT_BATCH:
                    end = position
                    break
                if whole:
                    upper[table] |= QUEUED
                    page = table << TABLE_SHIFT
                else:
                    gpt[page] = entry | QUEUED
                batch.hint_page[hints], batch.hint_position[hints] = page, position
                hints += 1
            continue
        node = prefer[page] if prefer.size > 0 else FAST
        if thp.whole.size > 0 and thp.whole[table] != 0 and upper[table] == 0:
            if huge == HUGE_BATCH:
                end = position
                break
            if not _reach_table(m, nodes, batch, m.tables.parent[table], position, FAST):
                batch.counts[3] = OUT_OF_MEMORY
                break
            if _map_huge(m, nodes, batch, table, position, node, thp.remote):
                huge += 1
                _charge_fault(m, vcpu, position, thp.fault_ps, MINOR_FAULT)
                continue
        if not _reach_table(m, nodes, batch, table, position, FAST):
            batch.counts[3] = OUT_OF_MEMORY
            break
        if (entry & PRESENT) == 0:
            frame = allocate(nodes, node)
            if frame == NO_PAGE:
                batch.counts[3] = OUT_OF_MEMORY
                break
            nodes.page[frame] = page
            lru_add(nodes, frame, 0)
            gpt[page] = (entry & ~FRAME_MASK) | (frame << FRAME_SHIFT) | PRESENT | WRITABLE | QUEUED
            _list_fresh(batch, page, frame)
            _charge_fault(m, vcpu, position, faults.minor_fault_ps, MINOR_FAULT)
            if not backed(ept, frame):
                _list_gpfn(batch, frame, position, 0)
        else:
            frame = (entry & FRAME_MASK) >> FRAME_SHIFT
            writes = (vcpus.kind[vcpu, position] & ~LLC_HIT & 0xFF) != LOAD
            if writes and (entry & SHADOWED) != 0:
                entry = unshadowed(entry)
                gpt[page] = entry
                batch.written[batch.counts[4]] = page
                batch.counts[4] += 1
                _charge_fault(m, vcpu, position, faults.wp_fault_ps, WP_FAULT)
            listed = (entry & QUEUED) != 0 or (whole and (upper[table] & QUEUED) != 0)
            if not listed and not backed(ept, frame):
                gpt[page] = entry | QUEUED
                _list_gpfn(batch, frame, position, 1)
                # It had a frame, or nobody could have mapped it.
                brought += faults.swap_in_ps if (ept[frame] & WRITABLE) == 0 else 0
            elif position == start and (entry & WRITABLE) == 0 and writes:
                # Only time takes the protection off, so that what comes after it is looked at then.
                vcpus.retries[vcpu, position] += 1
                m.counters[C.vmstat__pgfault] += 1
                batch.counts[3] = WRITE_PROTECTED
                break
    batch.counts[0] = hints
    for i in range(hints):
        page = batch.hint_page[i]
        gpt[page] &= ~QUEUED
        upper[page >> TABLE_SHIFT] &= ~QUEUED
    if batch.counts[1] == 0 and batch.counts[2] == 0:
        return
    for position in range(start, end):
        page = vcpus.address[vcpu, position] >> PAGE_SHIFT
        gpt[page] = gpt[page] & ~QUEUED
        number = page >> TABLE_SHIFT
        while upper[number] != 0:
            upper[number] &= ~QUEUED
            if m.tables.parent[number] == number:
                break
            number = m.tables.parent[number]


@kernel
def clear_fresh(m: Machine, vcpu: int, fresh: Words, fresh_gpfn: Words) -> int:
    """Clear newly allocated frames on ``vcpu``: write each page's own stamp at version 0, whatever its entry expects.

    So a mapping that was lost and faulted in again shows, as its content is gone. Clearing writes the frame, so its
    EPT D bit is set. Returns the number of frames that the EPT does not map.
    """
    unmapped = 0
    for i in range(fresh.size):
        entry = m.ept[fresh_gpfn[i]]
        if (entry & PRESENT) == 0:
            unmapped += 1
            continue
        useless = 1 if fresh[i] >= STAMP_TABLE_BASE else 0
        set_dirty(m.pml, vcpu, m.ept, m.tables.ept_pde, fresh_gpfn[i], useless, m.counters)
        m.stamps[(entry & FRAME_MASK) >> FRAME_SHIFT] = m.state[S.OWNER] | (fresh[i] << STAMP_PAGE_SHIFT)
    return unmapped


@kernel
def charge_violations(vcpus: Vcpus, vcpu: int, batch: Batch, cost_ps: Words) -> None:
    """Charge each EPT violation of the batch (cost_ps: int64[n], ps) to the access that meets it.

    Frames that were never mapped are met by the kernel, which clears them; the others by the access's own walk. What
    came with another one, in one page of 2 MiB, was no violation and cost nothing.
    """
    for i in range(cost_ps.size):
        position = batch.gpfn_position[i]
        if cost_ps[i] == 0:
            continue
        if batch.gpfn_old[i] == 1:
            vcpus.exit_part[vcpu, position] = EPT_REFAULT
            vcpus.retries[vcpu, position] += 1
        elif vcpus.exit_ps[vcpu, position] == 0:
            vcpus.exit_part[vcpu, position] = EPT_VIOLATION
        vcpus.exit_ps[vcpu, position] += cost_ps[i]


@kernel
def charge_hints(vcpus: Vcpus, vcpu: int, batch: Batch, cost_ps: Words) -> None:
    """Charge each NUMA hint fault of the batch (cost_ps: int64[n], ps) to the access that takes it."""
    for i in range(cost_ps.size):
        position = batch.hint_position[i]
        vcpus.fault_ps[vcpu, position] += cost_ps[i]
        vcpus.fault_part[vcpu, position] = HINT_FAULT
        vcpus.retries[vcpu, position] += 1


def table_frames(tables: PageTables) -> Words:
    """gPA frame of the table that each entry above the leaves maps (int64[u]); NO_FRAME where there is none."""
    mapped = (tables.upper & (PRESENT | HUGE)) == PRESENT
    return np.where(mapped, (tables.upper & FRAME_MASK) >> FRAME_SHIFT, NO_FRAME)


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
