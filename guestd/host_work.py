"""What threads of the host do to a VM beyond notifiers: stop it, rewrite its EPT meanwhile, copy ahead, walk its GPT.

RAMinate (SoCC'16) pauses a VM and trades pages of its EPT in place; vTMM (EuroSys'23) copies pages while they are
mapped, by the log of dirty pages copies again what was written meanwhile, and stops the VM for the switch only; it and
HeteroVisor (VEE'15) read and clear A bits of the guest's own page table, to which they have no gVA to invalidate by, so
that each such walk ends with a flush of the whole VM. The GPT lives in the guest's process: the walk is executed here,
at its time, and hands over a bit for each gPA page; the host is charged for the entries that it looked at, but this
machine's CPU for it is the engine's.
"""

from typing import Any

from guestd.jit import inline, int64, kernel
from guestd.kvm import request_flush, vm_exit
from guestd.machine import Machine, S
from guestd.mmu_lock import hold
from guestd.pml import P_ON, flush_log
from guestd.tiering.pages import frame_of
from guestd.vcpu import EXIT_END, EXIT_START, FLUSH_AT_ENTRY, IDLE, OFF_PCPU, PAUSED, spend
from proto.arrays import Words
from proto.counters import C
from proto.entry import ACCESSED, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT
from proto.layout import NARROW, OP_COPY, OP_PAUSE, OP_SWITCH, OP_TRADE, W_LEAVE, W_LEFT, W_VISITED, W_YOUNG
from proto.units import PAGE_SIZE, TABLE_PAGES, TABLE_SHIFT


@inline
def _has(bitmap: Words, row: int, page: int) -> bool:
    return ((bitmap[row, page >> 6] >> (page & 63)) & 1) != 0


@inline
def _set(bitmap: Words, row: int, page: int) -> None:
    bitmap[row, page >> 6] |= int64(1) << (page & 63)


@inline
def _outside(field: Words, now: int) -> bool:
    return field[IDLE] == 1 or field[OFF_PCPU] == 1 or (field[EXIT_START] <= now < field[EXIT_END])


@inline
def _pause(m: Machine, now: int, lasts_ps: int) -> None:
    """Stop all vCPUs; what they are outside guest mode for anyhow runs on meanwhile."""
    for vcpu in range(m.vcpus.field.shape[0]):
        field = m.vcpus.field[vcpu]
        if field[IDLE] == 1:
            # Halted before, it flushes when it enters again, and has no time to lose.
            if m.pml.params[P_ON] != 0:
                flush_log(m.pml, vcpu)
            continue
        m.counters[C.exit__paused] += 1
        if _outside(field, now):
            lost_ps = max(0, now + lasts_ps - max(now, field[EXIT_END]))
            field[EXIT_END] = max(field[EXIT_END], now + lasts_ps)
            if m.pml.params[P_ON] != 0:
                lost_ps += flush_log(m.pml, vcpu)
        else:
            lost_ps = vm_exit(m, vcpu, now, lasts_ps)
        spend(m.vcpus, vcpu, PAUSED, lost_ps)
    request_flush(m, now)


@inline
def _prolong(m: Machine, ps: int) -> None:
    """A pause that is under way lasts ``ps`` longer."""
    for vcpu in range(m.vcpus.field.shape[0]):
        field = m.vcpus.field[vcpu]
        if field[IDLE] == 0:
            field[EXIT_END] += ps
            spend(m.vcpus, vcpu, PAUSED, ps)


@inline
def _copy(m: Machine, source: int, target: int) -> None:
    """Copy a frame's content."""
    m.stamps[target] = m.stamps[source]
    m.budget[0, 1 if source >= m.state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE
    m.budget[1, 1 if target >= m.state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE


@inline
def _trade(m: Machine, a: int, b: int) -> None:
    """Two gPA frames trade their frame slots, contents with them, through a buffer in fast memory."""
    first, second = m.ept[a], m.ept[b]
    slot_a, slot_b = frame_of(first), frame_of(second)
    kept = m.stamps[slot_a]
    _copy(m, slot_b, slot_a)
    m.stamps[slot_b] = kept
    m.ept[a] = (first & ~FRAME_MASK) | (second & FRAME_MASK)
    m.ept[b] = (second & ~FRAME_MASK) | (first & FRAME_MASK)
    m.budget[0, 0] -= PAGE_SIZE
    m.budget[1, 0] -= PAGE_SIZE
    m.budget[0, 1 if slot_a >= m.state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE
    m.budget[1, 1 if slot_b >= m.state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE


@inline
def _switch(m: Machine, gpfn: int, target: int, copy_ps: int) -> None:
    """Map ``gpfn`` to the slot that has a copy of it, which is made anew if it was written since."""
    entry = m.ept[gpfn]
    if m.pml.params[P_ON] == 0 or _has(m.pml.dirty, 0, gpfn) or _has(m.pml.dirty, 1, gpfn):
        _copy(m, frame_of(entry), target)
        _prolong(m, copy_ps)
        m.counters[C.pml__copied_again] += 1
    m.ept[gpfn] = (entry & ~FRAME_MASK) | (target << FRAME_SHIFT)


@inline
def _walk_table(m: Machine, number: int, table: int) -> int:
    """Look through one leaf table, whose page is ``table``; how many A bits were cleared."""
    found, left = 0, False
    for leaf in range(number << TABLE_SHIFT, (number + 1) << TABLE_SHIFT):
        if (m.gpt[leaf] & ACCESSED) != 0:
            page = frame_of(m.gpt[leaf])
            if _has(m.walk, W_LEAVE, page):
                left = True
            else:
                m.gpt[leaf] &= ~ACCESSED
                _set(m.walk, W_YOUNG, page)
                found += 1
    m.walk[W_LEFT, table >> 6] &= ~(int64(1) << (table & 63))
    if left:
        _set(m.walk, W_LEFT, table)
    return found


@kernel
def walk_guest(m: Machine, narrow: bool) -> int:
    """Look through the guest's page table, or only its tables that were written to; how many A bits were cleared.

    The row of dirty pages is what the last harvest took; tables are known by the gPA page in which they lie. Entries
    that map 2 MiB are few, and always looked at; of such a page the host is told all 512.
    """
    found = visited = 0
    upper = m.tables.upper
    for number in range(m.table_gva.size):
        entry = upper[number]
        if (entry & PRESENT) == 0:
            continue
        huge, table = (entry & HUGE) != 0, frame_of(entry)
        if narrow and not huge and not _has(m.pml.dirty, 1, table) and not _has(m.walk, W_LEFT, table):
            continue
        visited += 1
        if not huge:
            visited += TABLE_PAGES
            found += _walk_table(m, number, table)
        elif (entry & ACCESSED) != 0 and not _has(m.walk, W_LEAVE, table):
            upper[number] &= ~ACCESSED
            for page in range(table, table + TABLE_PAGES):
                _set(m.walk, W_YOUNG, page)
            found += 1
    m.walk[W_VISITED, 0] += visited
    return found


@inline
def _flush_due(m: Machine, now: int) -> bool:
    """Every vCPU is outside guest mode and flushes when it enters again."""
    due = True
    for vcpu in range(m.vcpus.field.shape[0]):
        field = m.vcpus.field[vcpu]
        due = due and _outside(field, now) and field[FLUSH_AT_ENTRY] == 1
    return due


@kernel
def apply_host_work(m: Machine, operation: Any, now: int) -> None:
    """Execute an operation from OP_PAUSE on at ``now``; all vCPUs have run up to it."""
    kind, a, b = operation.kind, operation.a, operation.b
    if kind == OP_PAUSE:
        hold(m.mmu_lock, now, operation.hold_ps)
        _pause(m, now, b)
    elif kind == OP_TRADE:
        for page in range(TABLE_PAGES if operation.flags & HUGE != 0 else 1):
            _trade(m, a + page, b + page)
    elif kind == OP_COPY:
        _copy(m, frame_of(m.ept[a]), b)
    elif kind == OP_SWITCH:
        _switch(m, a, b, operation.busy_ps)
    elif walk_guest(m, operation.flags & NARROW != 0) > 0 and not _flush_due(m, now):
        hold(m.mmu_lock, now, operation.hold_ps)
        request_flush(m, now)
