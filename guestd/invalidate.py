"""What host threads do to a VM's vCPUs: flush requests, zaps and moves, as KVM executes them.

The host knows no gVA, so each change asks for a flush of every vCPU (virt/kvm/kvm_main.c, kvm_flush_remote_tlbs). A
vCPU in guest mode is kicked out and executes one global INVEPT at its next entry (arch/x86/kvm/vmx/vmx.c,
vmx_flush_tlb_all); one that is outside already flushes at that entry, once for all requests that piled up meanwhile.
`remote_tlb_flush` counts requests that kicked at least one vCPU, `tlb_flush` executions.
"""

from typing import Any

from guestd.jit import inline
from guestd.machine import S
from guestd.pml import P_ON, Pml, flush_log, has_dirty, take_dirty
from guestd.vcpu import CLOCK, EXIT_END, EXIT_START, FLUSH_AT_ENTRY, IDLE, Vcpus, drop_all
from proto.arrays import Words
from proto.counters import C, Counters
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, WRITABLE, YOUNG
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_STALL, OP_SWAP, OP_ZAP
from proto.units import PAGE_SIZE


@inline
def request_flush(vcpus: Vcpus, pml: Pml, state: Words, now: int, counters: Counters) -> None:
    """One kvm_flush_remote_tlbs at ``now``: kick the vCPUs in guest mode, let the others flush at their entry."""
    counters[C.kvm__remote_tlb_flush_requests] += 1
    kicked = False
    for vcpu in range(vcpus.field.shape[0]):
        field = vcpus.field[vcpu]
        outside = field[IDLE] == 1 or (field[EXIT_START] <= now < field[EXIT_END])
        if outside:
            if field[FLUSH_AT_ENTRY] == 1:
                continue
            if field[IDLE] == 0:
                field[EXIT_END] += state[S.FLUSH_PS]
        else:
            kicked = True
            counters[C.exit__kick] += 1
            counters[C.time__exit_ps] += state[S.VMEXIT_PS]
            counters[C.time__stolen_ps] += state[S.VMEXIT_PS]
            # From now on, not from the clock, which is ahead by what is left of the access that `now` fell into.
            field[EXIT_START] = now
            log_ps = flush_log(pml, vcpu, counters) if pml.params[P_ON] != 0 else 0
            field[EXIT_END] = now + state[S.VMEXIT_PS] + state[S.FLUSH_PS] + log_ps
            field[CLOCK] += state[S.VMEXIT_PS] + log_ps
        # The vCPU runs nothing until its entry, so the flush of that entry may empty the caches already now.
        field[FLUSH_AT_ENTRY] = 1
        drop_all(vcpus, vcpu)
        field[CLOCK] += state[S.FLUSH_PS]
        counters[C.kvm__tlb_flush] += 1
        counters[C.instr__invept_global] += 1
        counters[C.time__exit_ps] += state[S.FLUSH_PS]
        counters[C.time__stolen_ps] += state[S.FLUSH_PS]
    if kicked:
        counters[C.kvm__remote_tlb_flush] += 1


@inline
def _zap(ept: Words, gpfn: int) -> bool:
    """Clear a leaf's present bit; its A bit survives in software. Returns whether it was present."""
    entry = ept[gpfn]
    if (entry & PRESENT) == 0:
        return False
    young = YOUNG if (entry & ACCESSED) != 0 else 0
    ept[gpfn] = (entry & ~(PRESENT | ACCESSED | DIRTY)) | young
    return True


@inline
def _swap(vcpus: Vcpus, pml: Pml, ept: Words, stamps: Words, state: Words, budget: Words, operation: Any,
          counters: Counters) -> None:  # fmt: skip
    zapped = 0
    for gpfn in (operation.a, operation.b):
        if _zap(ept, gpfn):
            zapped += 1
    counters[C.kvm__mmu_zapped] += zapped
    if zapped > 0:
        request_flush(vcpus, pml, state, operation.time_ps, counters)
    first, second = ept[operation.a], ept[operation.b]
    frame_a, frame_b = (first & FRAME_MASK) >> FRAME_SHIFT, (second & FRAME_MASK) >> FRAME_SHIFT
    stamps[frame_a], stamps[frame_b] = stamps[frame_b], stamps[frame_a]
    keep = ~(FRAME_MASK | PROTNONE)
    ept[operation.a] = (first & keep) | (second & FRAME_MASK)
    ept[operation.b] = (second & keep) | (first & FRAME_MASK)
    for frame in (frame_a, frame_b):
        tier = 1 if frame >= state[S.SLOW_FRAMES] else 0
        budget[0, tier] -= PAGE_SIZE
        budget[1, tier] -= PAGE_SIZE


@inline
def _harvest(vcpus: Vcpus, pml: Pml, ept: Words, state: Words, now: int, counters: Counters) -> None:
    """KVM_GET_DIRTY_LOG (virt/kvm/kvm_main.c): empty all logs, take the bitmap, clear its pages' D bits, flush once."""
    if not has_dirty(pml):
        return
    request_flush(vcpus, pml, state, now, counters)
    for vcpu in range(vcpus.field.shape[0]):
        vcpus.field[vcpu, CLOCK] += flush_log(pml, vcpu, counters)
    take_dirty(pml, ept)


@inline
def apply_operation(vcpus: Vcpus, pml: Pml, ept: Words, stamps: Words, state: Words, budget: Words, operation: Any,
                    counters: Counters) -> None:  # fmt: skip
    """Execute one `proto.layout.OPERATION` at its time; all vCPUs have run up to it."""
    now = operation.time_ps
    if operation.kind == OP_FLUSH:
        request_flush(vcpus, pml, state, now, counters)
    elif operation.kind == OP_ZAP:
        zapped = 0
        for gpfn in range(operation.a, operation.a + operation.b):
            if _zap(ept, gpfn):
                zapped += 1
            entry = ept[gpfn]
            slow = ((entry & FRAME_MASK) >> FRAME_SHIFT) >= state[S.SLOW_FRAMES]
            if (entry & WRITABLE) != 0 and slow and operation.flags == PROTNONE:
                ept[gpfn] = entry | PROTNONE
        counters[C.kvm__mmu_zapped] += zapped
        if zapped > 0:
            request_flush(vcpus, pml, state, now, counters)
    elif operation.kind == OP_STALL:
        field = vcpus.field[operation.a]
        field[EXIT_START] = now
        field[EXIT_END] = max(field[EXIT_END], now + operation.b)
        field[CLOCK] += operation.b
        field[FLUSH_AT_ENTRY] = 0
        counters[C.time__exit_ps] += operation.b
        counters[C.time__stolen_ps] += operation.b
    elif operation.kind == OP_HARVEST:
        _harvest(vcpus, pml, ept, state, now, counters)
    elif operation.kind == OP_SWAP:
        _swap(vcpus, pml, ept, stamps, state, budget, operation, counters)
    elif operation.kind == OP_MOVE:
        if _zap(ept, operation.a):
            counters[C.kvm__mmu_zapped] += 1
            request_flush(vcpus, pml, state, now, counters)
        entry = ept[operation.a]
        source = (entry & FRAME_MASK) >> FRAME_SHIFT
        stamps[operation.b] = stamps[source]
        ept[operation.a] = (entry & ~(FRAME_MASK | PROTNONE)) | (operation.b << FRAME_SHIFT) | operation.flags
        budget[0, 1 if source >= state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE
        budget[1, 1 if operation.b >= state[S.SLOW_FRAMES] else 0] -= PAGE_SIZE
