"""What the host's KVM does to a VM: flush requests, kicks, exits, mmu notifiers, and the operations of host threads.

The host knows no gVA, so each change asks for a flush of every vCPU (virt/kvm/kvm_main.c, kvm_flush_remote_tlbs). A
vCPU in guest mode is kicked out and executes one global INVEPT at its next entry (arch/x86/kvm/vmx/vmx.c,
vmx_flush_tlb_all); one that is outside (halted, preempted, in an EPT violation or another exit) flushes at the entry
that ends that exit, once for all requests that piled up meanwhile. `remote_tlb_flush` counts requests that kicked at
least one vCPU, `tlb_flush` executions. Requests are made under mmu_lock, so EPT violations wait for them. While a
notifier changes a range, an EPT violation in it is taken again and again (mmu_notifier_retry), and one on a page that
is being migrated sleeps until the copy is done.
"""

from typing import Any

from guestd.instructions import ANY, invept
from guestd.jit import inline, kernel
from guestd.machine import Machine, S
from guestd.mmu_lock import hold, wait_for
from guestd.near_memory import copy_page
from guestd.pml import P_ON as PML_ON
from guestd.pml import flush_log, has_dirty, take_dirty
from guestd.vcpu import (
    CLOCK,
    EXIT_END,
    EXIT_START,
    FLUSH_AT_ENTRY,
    HOST_TASK,
    IDLE,
    KICK,
    OFF_PCPU,
    PAUSED,
    PML_FULL,
    spend,
)
from guestd.walk import COST_MASK, REFS_SHIFT
from proto.arrays import Words
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    TABLE_SEEN_BITS,
    TABLE_SEEN_MASK,
    WRITABLE,
    YOUNG,
)
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_PAUSE, OP_STALL, OP_SWAP, OP_ZAP
from proto.units import PAGE_SIZE, TABLE_PAGES, TABLE_SHIFT


@inline
def leave_guest(field: Words, start_ps: int, duration_ps: int) -> None:
    """The vCPU (``field``: its row) is outside guest mode for ``duration_ps``; its entry has nothing to flush yet."""
    field[EXIT_START] = start_ps
    field[EXIT_END] = start_ps + duration_ps
    field[FLUSH_AT_ENTRY] = 0


@kernel
def vm_exit(m: Machine, vcpu: int, start_ps: int, duration_ps: int) -> int:
    """A VM exit of ``vcpu``; returns how long it lasts with what KVM does at each: it empties the log of dirty pages.

    (arch/x86/kvm/vmx/vmx.c, vmx_handle_exit.) Only an exit for a full log has that in its duration already
    (`guestd.pml.log_dirty`). The caller books it.
    """
    if m.pml.params[PML_ON] != 0:
        duration_ps += flush_log(m.pml, vcpu)
    leave_guest(m.vcpus.field[vcpu], start_ps, duration_ps)
    return duration_ps


@kernel
def wait_for_frames(m: Machine, until: int) -> None:
    """The whole VM is out of guest mode until ``until``: the host has no frame for one of its faults."""
    for vcpu in range(m.vcpus.field.shape[0]):
        field = m.vcpus.field[vcpu]
        if field[IDLE] == 0 and field[CLOCK] < until:
            # Waiting already, it goes on; and a request at the time that all have reached finds it outside.
            flush = field[FLUSH_AT_ENTRY] if field[EXIT_END] >= field[CLOCK] else 0
            spend(m.vcpus, vcpu, PAUSED, vm_exit(m, vcpu, field[CLOCK], until - field[CLOCK]))
            field[EXIT_START] = min(field[EXIT_START], m.state[S.NOW])
            field[FLUSH_AT_ENTRY] = flush


@kernel
def ept_changed(m: Machine) -> None:
    """The host changed the EPT: what walks remember of it is out of date."""
    state, upper = m.state, m.tables.upper
    state[S.EPT_EPOCH] += 1
    if state[S.EPT_EPOCH] == 1 << TABLE_SEEN_BITS:
        state[S.EPT_EPOCH] = 1
        for number in range(upper.size):
            upper[number] &= ~TABLE_SEEN_MASK


@inline
def request_flush(m: Machine, now: int) -> None:
    """One kvm_flush_remote_tlbs at ``now``: kick the vCPUs in guest mode, let the others flush at their entry."""
    state, counters = m.state, m.counters
    counters[C.kvm__remote_tlb_flush_requests] += 1
    ept_changed(m)
    kicked = False
    for vcpu in range(m.vcpus.field.shape[0]):
        field = m.vcpus.field[vcpu]
        outside = field[IDLE] == 1 or field[OFF_PCPU] == 1 or (field[EXIT_START] <= now < field[EXIT_END])
        if outside:
            if field[FLUSH_AT_ENTRY] == 1:
                continue
            if field[IDLE] == 0:
                field[EXIT_END] += state[S.INVEPT_PS]
        else:
            kicked = True
            counters[C.exit__kick] += 1
            # From now on, not from the clock, which is ahead by what is left of the access that `now` fell into.
            outside_ps = vm_exit(m, vcpu, now, state[S.VMEXIT_PS] + state[S.INVEPT_PS])
            spend(m.vcpus, vcpu, KICK, outside_ps - state[S.INVEPT_PS])
        # The vCPU runs nothing until its entry, so the flush of that entry may empty the caches already now.
        field[FLUSH_AT_ENTRY] = 1
        invept(m.vcpus, vcpu, m.walk_geometry, ANY)
        spend(m.vcpus, vcpu, KICK, state[S.INVEPT_PS])
        counters[C.kvm__tlb_flush] += 1
        counters[C.kvm__remote_flush_executions] += 1
        counters[C.instr__invept_global] += 1
    if kicked:
        counters[C.kvm__remote_tlb_flush] += 1


@inline
def _notify(state: Words, now: int, first: int, count: int, busy_ps: int) -> None:
    """A notifier changes gPA frames [first, first + count) for ``busy_ps``.

    Ranges in progress at the same time are taken for one that covers them all, as KVM does.
    """
    end = first + count
    if now < state[S.NOTIFIER_UNTIL]:
        first = min(first, state[S.NOTIFIER_FIRST])
        end = max(end, state[S.NOTIFIER_END])
        busy_ps = max(busy_ps, state[S.NOTIFIER_UNTIL] - now)
    state[S.NOTIFIER_FIRST], state[S.NOTIFIER_END] = first, end
    state[S.NOTIFIER_UNTIL] = now + busy_ps


@kernel
def violation_wait(m: Machine, now: int, gpfn: int, walked: int) -> int:
    """How long an EPT violation of ``gpfn`` at ``now`` waits for notifiers and mmu_lock, ps.

    ``walked``: result of the walk (`guestd.walk.walk`) that meets it each time, or 0 for a write that walks nothing.
    """
    state, counters = m.state, m.counters
    wait = 0
    if now < state[S.NOTIFIER_UNTIL] and state[S.NOTIFIER_FIRST] <= gpfn < state[S.NOTIFIER_END]:
        wait = state[S.NOTIFIER_UNTIL] - now
        each = max(1, state[S.EPT_VIOLATION_PS] + (walked & COST_MASK))
        again = (wait + each - 1) // each
        counters[C.kvm__mmu_retries] += again
        counters[C.exit__ept_violation] += again
        if walked != 0:
            counters[C.access__fault_retries] += again
            counters[C.access__walks] += again
            counters[C.access__walk_refs] += again * (walked >> REFS_SHIFT)
            counters[C.access__walk_ps] += again * (walked & COST_MASK)
    pages = state[S.MIGRATING_PAGES]
    one, other = gpfn - state[S.MIGRATING], gpfn - state[S.MIGRATING_TOO]
    if now < state[S.MIGRATING_UNTIL] and (0 <= one < pages or 0 <= other < pages):
        wait = max(wait, state[S.MIGRATING_UNTIL] - now)
    if state[S.TDP_MMU] == 1:
        lock_ps = wait_for(m.mmu_lock, now + wait)
    else:
        lock_ps = hold(m.mmu_lock, now + wait, state[S.MMU_LOCK_PS])
    counters[C.kvm__mmu_lock_wait_ps] += lock_ps
    return wait + lock_ps


@kernel
def take_violations(m: Machine, vcpu: int, now: int, gpfns: Words, cost_ps: Words) -> int:
    """EPT violations of ``gpfns`` (int64[n]) that kernel or PMU meet on ``vcpu`` from ``now`` on, in a row, ps in all.

    ``cost_ps``: int64[n], what the host's answer says; 0 for one that came with another, in one page of 2 MiB, and was
    no violation. The caller books the time.
    """
    outside_ps = 0
    for i in range(gpfns.size):
        if cost_ps[i] != 0:
            m.counters[C.exit__ept_violation] += 1
            outside_ps += cost_ps[i] + violation_wait(m, now + outside_ps, gpfns[i], 0)
    return vm_exit(m, vcpu, now, outside_ps) if outside_ps != 0 else 0


@inline
def _zap(m: Machine, gpfn: int) -> bool:
    """Clear the entry that maps ``gpfn``; its A bit survives in software. Returns whether it was present."""
    table, entry = gpfn >> TABLE_SHIFT, m.ept[gpfn]
    if (entry & PRESENT) == 0:
        return False
    if (m.tables.ept_pde[table] & HUGE) != 0:
        head = table << TABLE_SHIFT
        for leaf in range(head, head + TABLE_PAGES):
            m.ept[leaf] &= ~PRESENT
        if (m.tables.ept_pde[table] & ACCESSED) != 0:
            m.ept[head] |= YOUNG
        m.tables.ept_pde[table] &= ~(ACCESSED | DIRTY)
    else:
        young = YOUNG if (entry & ACCESSED) != 0 else 0
        m.ept[gpfn] = (entry & ~(PRESENT | ACCESSED | DIRTY)) | young
    return True


@kernel
def _zap_range(m: Machine, first: int, end: int, protnone: bool) -> int:
    """Zap gPA frames [first, end), and put what lies in slow slots under PROT_NONE; how many entries were present."""
    zapped = 0
    gpfn = first
    while gpfn < end:
        huge = (m.tables.ept_pde[gpfn >> TABLE_SHIFT] & HUGE) != 0
        head = gpfn & ~(TABLE_PAGES - 1) if huge else gpfn
        after = head + TABLE_PAGES if huge else gpfn + 1
        if _zap(m, gpfn):
            zapped += 1
        entry = m.ept[gpfn]
        slow = ((entry & FRAME_MASK) >> FRAME_SHIFT) >= m.state[S.SLOW_FRAMES]
        # A huge page is protected by the range that its head is in.
        if protnone and slow and (entry & WRITABLE) != 0 and head == gpfn:
            for leaf in range(head, after):
                m.ept[leaf] |= PROTNONE
        gpfn = after
    return zapped


@inline
def _use_bandwidth(m: Machine, frame: int, write: int) -> None:
    if m.near.size > 0:
        copy_page(m.near, m.state[S.SLOW_FRAMES], frame, write, m.budget)
    else:
        m.budget[write, 1 if frame >= m.state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE


@inline
def _move(m: Machine, gpfn: int, target: int, flags: int) -> None:
    """Map ``gpfn`` (zapped) to frame slot ``target``, with its content."""
    entry = m.ept[gpfn]
    source = (entry & FRAME_MASK) >> FRAME_SHIFT
    m.stamps[target] = m.stamps[source]
    m.ept[gpfn] = (entry & ~(FRAME_MASK | PROTNONE)) | (target << FRAME_SHIFT) | (flags & PROTNONE)
    _use_bandwidth(m, source, 0)
    _use_bandwidth(m, target, 1)


@inline
def _swap(m: Machine, a: int, b: int) -> None:
    """Let two zapped gPA frames trade their frame slots, contents moving along."""
    first, second = m.ept[a], m.ept[b]
    frame_a, frame_b = (first & FRAME_MASK) >> FRAME_SHIFT, (second & FRAME_MASK) >> FRAME_SHIFT
    m.stamps[frame_a], m.stamps[frame_b] = m.stamps[frame_b], m.stamps[frame_a]
    keep = ~(FRAME_MASK | PROTNONE)
    m.ept[a] = (first & keep) | (second & FRAME_MASK)
    m.ept[b] = (second & keep) | (first & FRAME_MASK)
    for frame in (frame_a, frame_b):
        _use_bandwidth(m, frame, 0)
        _use_bandwidth(m, frame, 1)


@kernel
def _make_huge(m: Machine, gpfn: int) -> None:
    """The 512 pages from ``gpfn`` on are one huge page; whether one of them was young, its first says now."""
    young = 0
    for leaf in range(gpfn, gpfn + TABLE_PAGES):
        young |= m.ept[leaf] & YOUNG
        m.ept[leaf] &= ~YOUNG
    m.ept[gpfn] |= young
    m.tables.ept_pde[gpfn >> TABLE_SHIFT] = PRESENT | HUGE


@inline
def _harvest(m: Machine, now: int, clear_ps: int) -> None:
    """KVM_GET_DIRTY_LOG (virt/kvm/kvm_main.c): empty all logs, take the bitmap, clear its pages' D bits, flush once.

    Clearing, which takes ``clear_ps`` a page, is done under mmu_lock.
    """
    if has_dirty(m.pml):
        request_flush(m, now)
        for vcpu in range(m.vcpus.field.shape[0]):
            spend(m.vcpus, vcpu, PML_FULL, flush_log(m.pml, vcpu))
        hold(m.mmu_lock, now, clear_ps * take_dirty(m.pml, m.ept, m.tables.ept_pde))


@inline
def operation_due(m: Machine, operation: Any) -> int:
    """When ``operation`` is executed, ps: what changes the EPT first waits for mmu_lock, to the quantum's end at most.

    The host's thread does not lose that time: what it does next, it had planned for then. What it does in a pause,
    which has waited, or with the guest's own tables waits for nobody.
    """
    due = operation.time_ps
    if operation.kind != OP_STALL and operation.kind <= OP_PAUSE:
        due = max(due, min(due + wait_for(m.mmu_lock, due), m.state[S.END_PS]))
    return int(due)


@inline
def apply_operation(m: Machine, operation: Any, now: int) -> None:
    """Execute one `proto.layout.OPERATION` at ``now``; all vCPUs have run up to it."""
    kind = operation.kind
    zapped = 0
    if kind == OP_STALL:
        field, lasts = m.vcpus.field[operation.a], operation.b
        if field[EXIT_START] <= now < field[EXIT_END]:
            # Still in an exit: one longer exit, with one entry.
            field[EXIT_END] = max(field[EXIT_END], now + lasts)
        else:
            lasts = vm_exit(m, operation.a, now, lasts)
        spend(m.vcpus, operation.a, HOST_TASK, lasts)
        m.counters[C.exit__host_task] += 1
    elif kind == OP_ZAP:
        zapped = _zap_range(m, operation.a, operation.a + operation.b, operation.flags & PROTNONE != 0)
        _notify(m.state, now, operation.a, operation.b, operation.busy_ps)
    elif kind == OP_HARVEST:
        _harvest(m, now, operation.b)
    elif kind != OP_FLUSH:
        pages = TABLE_PAGES if operation.flags & HUGE != 0 else 1
        zapped = _zap_range(m, operation.a, operation.a + pages, False)
        m.state[S.MIGRATING] = m.state[S.MIGRATING_TOO] = operation.a
        m.state[S.MIGRATING_PAGES] = pages
        m.state[S.MIGRATING_UNTIL] = now + operation.busy_ps
        if kind == OP_SWAP:
            zapped += _zap_range(m, operation.b, operation.b + pages, False)
            m.state[S.MIGRATING_TOO] = operation.b
    m.counters[C.kvm__mmu_zapped] += zapped
    if kind == OP_FLUSH or zapped > 0:
        hold(m.mmu_lock, now, operation.hold_ps)
        request_flush(m, now)
    if kind in (OP_MOVE, OP_SWAP):
        for page in range(TABLE_PAGES if operation.flags & HUGE != 0 else 1):
            if kind == OP_MOVE:
                _move(m, operation.a + page, operation.b + page, operation.flags)
            else:
                _swap(m, operation.a + page, operation.b + page)
    if kind == OP_MOVE and operation.flags & HUGE != 0:
        _make_huge(m, operation.a)
