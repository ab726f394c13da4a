"""The vCPU engine: runs the accesses of all vCPUs of a guest up to a virtual time.

One access: TLB lookup; on a miss (or a first write through a clean entry) a walk that sets A and D bits in GPT and EPT
and fills the TLB; then the frame itself, whose content stamp is checked and, on a write, bumped; then its cost: the
tier's, or that of the LLC where the workload says that it hits there. The loop is exact and in order; what makes it
fast on a large footprint is that software prefetches run ahead of it in three steps (GPT entry, EPT entry, stamp),
which change nothing but the caches of the machine (architecture 5). vCPUs take turns in slices of fixed virtual time;
host operations cut slices at their own timestamps. The engine returns whenever something outside it must act: accesses
to be generated, a fault, a PMI.
"""

import numpy as np

from guestd.host_work import apply_host_work
from guestd.instructions import ANY, invept
from guestd.jit import assume, inline, int64, kernel, prefetch
from guestd.kvm import apply_operation, leave_guest, operation_due, violation_wait, vm_exit
from guestd.machine import Machine, S
from guestd.near_memory import may_swap, misses, swap_in
from guestd.pebs import P_ON as PMU_ON
from guestd.pebs import sample
from guestd.pml import P_ON as PML_ON
from guestd.pml import log_dirty
from guestd.tlb import (
    MISS,
    TLB_DIRTY,
    TLB_FRAME_MASK,
    TLB_FRAME_SHIFT,
    Tlb,
    fill_2m,
    fill_4k,
    look_up_2m,
    look_up_4k,
    renew,
)
from guestd.transaction import copy_operation
from guestd.vcpu import (
    CLOCK,
    CONTEXT,
    EXIT_END,
    FRACTURED,
    HALTED,
    HUGE_SEEN,
    IDLE,
    LAST_BLOCK,
    LAST_WRITTEN,
    LATENCY_BIN_SHIFT,
    LATENCY_BINS,
    LENGTH,
    OFF_PCPU,
    PEBS_RECORD,
    PML_FULL,
    POSITION,
    PREEMPTED,
    STALL,
    THINK,
    THROTTLE,
    spend,
    tlb_of,
)
from guestd.walk import COST_MASK, REFS_SHIFT, UNBACKED, walk
from proto.arrays import Words
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    ENTRY_VERSION_MASK,
    ENTRY_VERSION_ONE,
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    STAMP_VERSION_MASK,
    WRITABLE,
)
from proto.layout import OP_PAUSE, OP_TRANSACTION_BEGIN
from proto.trace import LLC_HIT, LOAD, STORE
from proto.units import PAGE_SHIFT, TABLE_PAGES, TABLE_SHIFT

REACHED, NEED_ACCESSES, FAULT, PMI, COMPLETED = 0, 1, 2, 3, 4
"""Why the engine returned: time reached; vCPU has no accesses left; its next access faults; its PMU wants service (PMI
or an EPT violation of a record); transactions done."""

CHUNK = 4
"""Accesses whose lines are asked for at a time, so that what this machine needs for them overlaps."""


@inline
def _prefetch(address: Words, start: int, at: int, end: int, gpt: Words, ept: Words, stamps: Words) -> None:
    """Ask for the stamps of the chunk ``at``, the EPT entries of the next and the GPT entries of the one after that.

    Each is looked up through what was asked for a chunk ago, so that nothing waits. Only [start, end) is looked at.
    """
    for i in range(max(start, at + 2 * CHUNK), min(at + 3 * CHUNK, end)):
        prefetch(gpt, address[i] >> PAGE_SHIFT)
    for i in range(max(start, at + CHUNK), min(at + 2 * CHUNK, end)):
        prefetch(ept, (gpt[address[i] >> PAGE_SHIFT] & FRAME_MASK) >> FRAME_SHIFT)
    for i in range(max(start, at), min(at + CHUNK, end)):
        gpfn = (gpt[address[i] >> PAGE_SHIFT] & FRAME_MASK) >> FRAME_SHIFT
        prefetch(stamps, (ept[gpfn] & FRAME_MASK) >> FRAME_SHIFT)


@inline
def _fill(m: Machine, tlb: Tlb, field: Words, table: int, page: int, gpfn: int, context: int, frame: int,
          dirty: int) -> None:  # fmt: skip
    """Enter what a walk found: as 2 MiB only if both levels map so; else a 2 MiB page of the guest is fractured."""
    if (m.tables.upper[table] & HUGE) == 0:
        fill_4k(tlb, m.tlb_geometry, page, context, frame, dirty)
    elif (m.tables.ept_pde[gpfn >> TABLE_SHIFT] & HUGE) == 0:
        field[FRACTURED] = 1
        fill_4k(tlb, m.tlb_geometry, page, context, frame, dirty)
    else:
        field[HUGE_SEEN] = 1
        fill_2m(tlb, m.tlb_geometry, table, context, frame - (page & (TABLE_PAGES - 1)), dirty)


@kernel
def _serve_faults(m: Machine, vcpu: int, position: int, now: int, gpfn: int, walked: int) -> int:
    """Pay for the faults that were taken before the access at ``position``, which is to gPA ``gpfn``; the time, ps.

    ``walked``: what its walk returned, 0 if it needed none.
    """
    vcpus = m.vcpus
    lost = vcpus.fault_ps[vcpu, position]
    vcpus.ledger[vcpu, vcpus.fault_part[vcpu, position]] += lost
    vcpus.fault_ps[vcpu, position] = 0
    outside = vcpus.exit_ps[vcpu, position]
    if outside != 0:
        outside += violation_wait(m, now + lost, gpfn, walked)
        outside = vm_exit(m, vcpu, now + lost, outside)
        vcpus.ledger[vcpu, vcpus.exit_part[vcpu, position]] += outside
        vcpus.exit_ps[vcpu, position] = 0
    return lost + outside


@kernel
def _run_vcpu(m: Machine, vcpu: int, until: int) -> int:
    """Run one vCPU until its clock reaches ``until`` ps, or something else must act first."""
    vcpus = m.vcpus
    field = vcpus.field[vcpu]
    if field[IDLE] == 1:
        spend(vcpus, vcpu, HALTED, max(0, until - field[CLOCK]))
        return REACHED
    tlb, geometry = tlb_of(vcpus, vcpu), m.tlb_geometry
    walk_tag, chain = vcpus.walk_tag[vcpu], vcpus.chain[vcpu]
    address, kinds, think = vcpus.address[vcpu], vcpus.kind[vcpu], vcpus.think_ps[vcpu]
    retries = vcpus.retries[vcpu]
    ledger, histogram = vcpus.ledger[vcpu], vcpus.histogram[vcpu]
    near, flat = m.near, m.near.size > 0
    gpt, ept, stamps, tables, upper = m.gpt, m.ept, m.stamps, m.tables, m.tables.upper
    counters, state, price = m.counters, m.state, m.price
    latency_ps, read_bytes, write_bytes, budget = m.latency_ps, m.read_bytes, m.write_bytes, m.budget
    owner, slow_frames, mlp = state[S.OWNER], state[S.SLOW_FRAMES], state[S.MLP_Q8]
    stlb_hit_ps, llc_ps = state[S.STLB_HIT_PS], state[S.LLC_PS]
    context = field[CONTEXT]
    eptp = vcpus.context[vcpu, context, 0]
    pmu_on, logging = m.ds.params[PMU_ON], m.pml.params[PML_ON] != 0

    clock, start, length = field[CLOCK], field[POSITION], field[LENGTH]
    last_block, last_written, left = field[LAST_BLOCK], field[LAST_WRITTEN], state[S.LEFT]
    end = min(length, start + left) if left >= 0 else length
    began, position, prefetched = clock, start, start - 2 * CHUNK
    thought = elsewhere = 0
    slow_total = stores = plain_stores = llc_hits = stlb_hits = assists = retried = refs = walk_total = bad = 0
    tlb_misses = swapped = 0
    reason = REACHED
    while clock < until:
        if position == end:
            reason = NEED_ACCESSES if left != position - start else COMPLETED
            break
        while prefetched <= position + CHUNK:
            _prefetch(address, start, prefetched, end, gpt, ept, stamps)
            prefetched += CHUNK

        assume(position >= 0)
        a = address[position]
        assume(a >= 0)
        kind = kinds[position]
        cached = kind >= LLC_HIT
        kind &= ~LLC_HIT & 0xFF
        write = kind != LOAD
        again = retries[position]
        page = a >> PAGE_SHIFT
        g = gpt[page]
        gpfn = (g & FRAME_MASK) >> FRAME_SHIFT
        frame = walk_ps = walked = 0
        found = look_up_4k(tlb, geometry, page, context)
        if found != MISS:
            frame = (found >> 1 >> TLB_FRAME_SHIFT) & TLB_FRAME_MASK
        elif field[HUGE_SEEN] == 1:
            found = look_up_2m(tlb, geometry, page >> TABLE_SHIFT, context)
            if found != MISS:
                frame = ((found >> 1 >> TLB_FRAME_SHIFT) & TLB_FRAME_MASK) + (page & (TABLE_PAGES - 1))
        if found != MISS and not (write and ((found >> 1) & TLB_DIRTY) == 0):
            if found & 1 == 1:
                walk_ps = stlb_hit_ps
                stlb_hits += 1
        else:
            e = ept[gpfn]
            if (g & (PRESENT | PROTNONE)) != PRESENT or (e & PRESENT) == 0 or (write and (g & e & WRITABLE) == 0):
                reason = FAULT
                break
            frame = (e & FRAME_MASK) >> FRAME_SHIFT
            table = page >> TABLE_SHIFT
            walked = walk(walk_tag, m.walk_geometry, tables, chain, ept, table, gpfn, context, eptp,
                          slow_frames, state[S.EPT_EPOCH], price, m.pml, vcpu, counters)  # fmt: skip
            if walked == UNBACKED:
                reason = FAULT
                break
            if again != 0:
                # Each fault that the access took had cost a walk of its own, of which this one finds the traces. It
                # overlapped with nothing, and is no part of the latency of the access that was made at last.
                retried += again
                refs += again * (walked >> REFS_SHIFT)
                walk_total += again * (walked & COST_MASK)
                clock += again * (walked & COST_MASK)
            refs += walked >> REFS_SHIFT
            walk_ps = walked & COST_MASK
            walk_total += walk_ps
            bits = ACCESSED | DIRTY if write else ACCESSED
            if (upper[table] & HUGE) != 0:
                upper[table] |= bits
            elif (g & bits) != bits:
                g |= bits
                gpt[page] = g
            had = e
            if (tables.ept_pde[gpfn >> TABLE_SHIFT] & HUGE) != 0:
                had = int64(tables.ept_pde[gpfn >> TABLE_SHIFT])
                tables.ept_pde[gpfn >> TABLE_SHIFT] |= bits
            elif (e & bits) != bits:
                ept[gpfn] = e | bits
            if logging and write and (had & DIRTY) == 0:
                log_dirty(m.pml, vcpu, gpfn, 0, counters)
            if found == MISS:
                tlb_misses += 1
                _fill(m, tlb, field, table, page, gpfn, context, frame, TLB_DIRTY if write else 0)
            else:
                assists += 1
                renew(tlb, geometry, page, table, context, frame, TLB_DIRTY if write else 0)

        if again != 0:
            retries[position] = 0
            lost = _serve_faults(m, vcpu, position, clock, gpfn, walked)
            clock += lost
            elsewhere += lost
        assume(frame >= 0)
        slow = 1 if frame >= slow_frames else 0
        if flat:
            # What the LLC has was swapped in when it was fetched.
            slow = 0 if cached else misses(near, slow_frames, frame, a)
        home = 0 if flat else slow
        local = 1 if (a >> 8) == last_block else 0
        if not cached and (budget[0, slow] <= 0 or (write and budget[1, home] <= 0)
                           or (slow != home and not may_swap(budget))):  # fmt: skip
            # The translation is kept: what it took is paid now, and the access goes on in the next quantum.
            clock += (walk_ps * mlp) >> 8
            lost = max(0, state[S.END_PS] - clock)
            clock += lost
            elsewhere += lost
            ledger[THROTTLE] += lost
            break
        stamp = stamps[frame]
        if stamp != (owner | (page << STAMP_PAGE_SHIFT) | ((g >> ENTRY_VERSION_SHIFT) & STAMP_VERSION_MASK)):
            bad += 1
        latency = walk_ps + latency_ps[slow, local]
        if cached:
            latency = walk_ps + llc_ps
            llc_hits += 1
        else:
            last_block = a >> 8
            budget[0, slow] -= read_bytes[slow, local]
            if slow != home:
                swap_in(near, slow_frames, frame, a, budget, read_bytes, write_bytes, local)
                swapped += 1
        if write:
            stores += 1
            gpt[page] = (g & ~ENTRY_VERSION_MASK) | ((g + ENTRY_VERSION_ONE) & ENTRY_VERSION_MASK)
            stamps[frame] = (stamp & ~STAMP_VERSION_MASK) | ((stamp + 1) & STAMP_VERSION_MASK)
            if not cached:
                budget[1, home] -= write_bytes[home, 1 if last_block == last_written else 0]
                last_written = last_block
            if kind == STORE:
                plain_stores += 1
        clock += think[position] + ((latency * mlp) >> 8)
        thought += think[position]
        histogram[min(latency >> LATENCY_BIN_SHIFT, LATENCY_BINS - 1)] += 1
        slow_total += slow
        position += 1
        if pmu_on != 0:
            lost, service = sample(pmu_on, m.ds, m.pml, ept, tables.ept_pde, field, vcpu, kind, clock, a, m.table_gva,
                                   slow, latency, cached, counters)  # fmt: skip
            clock += lost
            elsewhere += lost
            ledger[PEBS_RECORD] += lost
            if service:
                reason = PMI
        if logging and m.pml.due[vcpu] != 0:
            lost = m.pml.due[vcpu]
            leave_guest(field, clock, lost)
            clock += lost
            elsewhere += lost
            ledger[PML_FULL] += lost
            m.pml.due[vcpu] = 0
        if reason == PMI:
            break

    total = position - start
    field[CLOCK] = clock
    field[POSITION] = position
    field[LAST_BLOCK] = last_block
    field[LAST_WRITTEN] = last_written
    if left >= 0:
        state[S.LEFT] = left - total
    ledger[THINK] += thought
    ledger[STALL] += clock - began - thought - elsewhere
    counters[C.access__total] += total
    counters[C.access__fast] += total - slow_total
    counters[C.access__slow] += slow_total
    counters[C.access__llc_hits] += llc_hits
    counters[C.access__loads] += total - plain_stores
    counters[C.access__stores] += stores
    counters[C.access__tlb_misses] += tlb_misses
    counters[C.access__line_swaps] += swapped
    counters[C.access__stlb_hits] += stlb_hits
    counters[C.access__dirty_assists] += assists
    counters[C.access__fault_retries] += retried
    counters[C.access__walks] += tlb_misses + assists + retried
    counters[C.access__walk_refs] += refs
    counters[C.access__walk_ps] += walk_total
    counters[C.integrity__accesses_checked] += total
    counters[C.integrity__mismatches] += bad
    return reason


@inline
def _preempted(m: Machine, vcpu: int, now: int, until: int) -> bool:
    """Whether another vCPU of the fleet has the pCPU in [now, until), which lies in one slice of the host's scheduler.

    vCPU i of the fleet runs on pCPU i mod n; the vCPUs of a pCPU take turns. When it comes back, what it had cached is
    taken to be displaced by those that ran meanwhile: a slice is long enough to fill the TLB many times over.
    """
    state, field = m.state, m.vcpus.field[vcpu]
    number = state[S.FIRST_VCPU] + vcpu
    pcpu = number % state[S.PCPUS]
    sharers = (state[S.FLEET_VCPUS] - 1 - pcpu) // state[S.PCPUS] + 1
    if (now // state[S.HOST_SLICE_PS]) % sharers == number // state[S.PCPUS]:
        if field[OFF_PCPU] == 1:
            field[OFF_PCPU] = 0
            invept(m.vcpus, vcpu, m.walk_geometry, ANY)
        return False
    away = max(0, until - field[CLOCK])
    if field[OFF_PCPU] == 0:
        field[OFF_PCPU] = 1
        m.counters[C.exit__preempted] += 1
        away = vm_exit(m, vcpu, field[CLOCK], away)
    field[EXIT_END] = max(field[EXIT_END], until)
    spend(m.vcpus, vcpu, PREEMPTED, away)
    return True


@kernel
def run(m: Machine, operations: np.ndarray, until: int) -> int:
    """Run all vCPUs to virtual time ``until`` (ps), applying ``operations`` (OPERATION[k], of both kernels) in time.

    Returns the reason; for all but REACHED, ``state[S.TURN]`` names the vCPU, and the next call resumes there.
    """
    state = m.state
    slice_ps, host_slice_ps = state[S.SLICE_PS], state[S.HOST_SLICE_PS]
    while True:
        now = state[S.NOW]
        boundary = min(until, (now // slice_ps + 1) * slice_ps)
        if state[S.PCPUS] > 0:
            boundary = min(boundary, (now // host_slice_ps + 1) * host_slice_ps)
        next_operation = state[S.OPERATION]
        if next_operation < operations.size:
            boundary = min(boundary, max(now, operation_due(m, operations[next_operation])))
        for vcpu in range(state[S.TURN], m.vcpus.field.shape[0]):
            if state[S.PCPUS] > 0 and m.vcpus.field[vcpu, IDLE] == 0 and _preempted(m, vcpu, now, boundary):
                continue
            reason = _run_vcpu(m, vcpu, boundary)
            if reason != REACHED:
                state[S.TURN] = vcpu
                return reason
        state[S.TURN] = 0
        state[S.NOW] = boundary
        while next_operation < operations.size:
            due = operation_due(m, operations[next_operation])
            if due > boundary:
                break
            if operations[next_operation].kind >= OP_TRANSACTION_BEGIN:
                copy_operation(m, operations[next_operation])
            elif operations[next_operation].kind >= OP_PAUSE:
                apply_host_work(m, operations[next_operation], boundary)
            else:
                apply_operation(m, operations[next_operation], due)
            next_operation += 1
        state[S.OPERATION] = next_operation
        if boundary >= until:
            return REACHED
