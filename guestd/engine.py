"""The vCPU engine: runs the accesses of all vCPUs of a guest up to a virtual time.

One access: TLB lookup; on a miss (or a first write through a clean entry) a walk that sets A and D bits in GPT and EPT
and fills the TLB; then the frame itself, whose content stamp is checked and, on a write, bumped; then its cost. The
loop is exact and in order; what makes it fast on a large footprint is that each chunk of accesses is first walked
through by software prefetches in phases (GPT entries, EPT entries, stamps), which change nothing but the caches of the
machine (architecture 5). vCPUs take turns in slices of fixed virtual time; host operations cut slices at their own
timestamps. The engine returns whenever something outside it must act: accesses to be generated, a fault, a PMI.
"""

import numpy as np

from guestd.invalidate import apply_operation
from guestd.jit import assume, inline, kernel, prefetch
from guestd.machine import Machine, S
from guestd.pebs import P_ON as PMU_ON
from guestd.pebs import sample
from guestd.pml import P_ON as PML_ON
from guestd.pml import flush_log, log_dirty
from guestd.tlb import TLB_DIRTY, TLB_FRAME_MASK, TLB_FRAME_SHIFT, TLB_TAG_SHIFT, find, touch, victim
from guestd.vcpu import (
    CLOCK,
    EXIT_END,
    EXIT_START,
    FLUSH_AT_ENTRY,
    IDLE,
    LAST_BLOCK,
    LATENCY_BIN_SHIFT,
    LATENCY_BINS,
    LENGTH,
    POSITION,
)
from guestd.walk import REFS_SHIFT, walk
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
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    STAMP_VERSION_MASK,
    WRITABLE,
)
from proto.trace import LOAD, STORE
from proto.units import PAGE_SHIFT, TABLE_SHIFT

REACHED, NEED_ACCESSES, FAULT, PMI, COMPLETED = 0, 1, 2, 3, 4
"""Why the engine returned: time reached; vCPU has no accesses left; its next access faults; its PMU wants service (PMI
or an EPT violation of a record); transactions done."""

CHUNK = 128
"""Accesses per prefetch phase: their lines (three tables) fit the L1 cache of any machine."""


@inline
def _prefetch_chunk(address: Words, start: int, end: int, gpt: Words, ept: Words, stamps: Words) -> None:
    for i in range(start, end):
        prefetch(gpt, address[i] >> PAGE_SHIFT)
    for i in range(start, end):
        prefetch(ept, (gpt[address[i] >> PAGE_SHIFT] & FRAME_MASK) >> FRAME_SHIFT)
    for i in range(start, end):
        gpfn = (gpt[address[i] >> PAGE_SHIFT] & FRAME_MASK) >> FRAME_SHIFT
        prefetch(stamps, (ept[gpfn] & FRAME_MASK) >> FRAME_SHIFT)


@kernel
def _run_vcpu(m: Machine, vcpu: int, until: int) -> int:
    """Run one vCPU until its clock reaches ``until`` ps, or something else must act first."""
    vcpus = m.vcpus
    field = vcpus.field[vcpu]
    if field[IDLE] == 1:
        field[CLOCK] = max(field[CLOCK], until)
        return REACHED
    tlb, recent = vcpus.tlb[vcpu], vcpus.tlb_recent[vcpu]
    sets = recent.size
    ways = tlb.size // sets
    address, kinds, think = vcpus.address[vcpu], vcpus.kind[vcpu], vcpus.think_ps[vcpu]
    fault_ps, exit_ps = vcpus.fault_ps[vcpu], vcpus.exit_ps[vcpu]
    histogram = vcpus.histogram[vcpu]
    pde, pde_recent = vcpus.pde[vcpu], vcpus.pde_recent[vcpu]
    nested, nested_recent = vcpus.nested[vcpu], vcpus.nested_recent[vcpu]
    ept_pde, ept_pde_recent = vcpus.ept_pde[vcpu], vcpus.ept_pde_recent[vcpu]
    table_gpfn, table_slow, price = m.table_gpfn, m.table_slow, m.price
    gpt, ept, stamps = m.gpt, m.ept, m.stamps
    counters, state, pml = m.counters, m.state, m.pml
    latency_ps, read_bytes, write_bytes, budget = m.latency_ps, m.read_bytes, m.write_bytes, m.budget
    owner, slow_frames, mlp, stlb_hit = state[S.OWNER], state[S.SLOW_FRAMES], state[S.MLP_Q8], state[S.STLB_HIT_PS]
    pmu_on, logging = m.ds.params[PMU_ON], pml.params[PML_ON] != 0

    clock, position, length = field[CLOCK], field[POSITION], field[LENGTH]
    last_block = field[LAST_BLOCK]
    left = state[S.LEFT]
    prefetched = position
    total = slow_total = loads = stores = misses = assists = walks = refs = walk_total = stall = thought = bad = 0
    reason = REACHED
    while clock < until:
        if position == length:
            reason = NEED_ACCESSES
            break
        if left == 0:
            reason = COMPLETED
            break
        if position == prefetched:
            prefetched = min(length, position + CHUNK)
            _prefetch_chunk(address, position, prefetched, gpt, ept, stamps)

        assume(position >= 0)
        a = address[position]
        assume(a >= 0)
        kind = kinds[position]
        page = a >> PAGE_SHIFT
        write = kind != LOAD
        g = gpt[page]
        index = page & (sets - 1)
        assume(index >= 0)
        base = index * ways
        way = find(tlb, base, ways, page + 1, TLB_TAG_SHIFT)
        walk_ps = 0
        if way >= 0 and not (write and (tlb[base + way] & TLB_DIRTY) == 0):
            walk_ps = stlb_hit
            frame = (tlb[base + way] >> TLB_FRAME_SHIFT) & TLB_FRAME_MASK
        else:
            if (g & PRESENT) == 0 or (g & PROTNONE) != 0 or (write and (g & WRITABLE) == 0):
                reason = FAULT
                break
            gpfn = (g & FRAME_MASK) >> FRAME_SHIFT
            e = ept[gpfn]
            if (e & PRESENT) == 0 or (write and (e & WRITABLE) == 0):
                reason = FAULT
                break
            table = page >> TABLE_SHIFT
            t = ept[table_gpfn[table]]
            if (t & PRESENT) == 0:
                reason = FAULT
                break
            bits = ACCESSED | DIRTY if write else ACCESSED
            exit_cost = 0
            # With EPT A/D bits, an access to a guest paging structure is a write (SDM vol. 3, 29.3.5).
            if (t & (ACCESSED | DIRTY)) != (ACCESSED | DIRTY):
                ept[table_gpfn[table]] = t | ACCESSED | DIRTY
                if logging and (t & DIRTY) == 0:
                    exit_cost += log_dirty(pml, vcpu, table_gpfn[table], 1, counters)
            if (g & bits) != bits:
                g |= bits
                gpt[page] = g
            if (e & bits) != bits:
                ept[gpfn] = e | bits
                if logging and write and (e & DIRTY) == 0:
                    exit_cost += log_dirty(pml, vcpu, gpfn, 0, counters)
            if exit_cost > 0:
                field[EXIT_START] = clock
                clock += exit_cost
                field[EXIT_END] = clock
                field[FLUSH_AT_ENTRY] = 0
            frame = (e & FRAME_MASK) >> FRAME_SHIFT
            walked = walk(pde, pde_recent, nested, nested_recent, ept_pde, ept_pde_recent, field, table,
                          table_gpfn[table], table_slow[table], gpfn, price)  # fmt: skip
            walk_ps = walked & ((1 << REFS_SHIFT) - 1)
            refs += walked >> REFS_SHIFT
            walks += 1
            walk_total += walk_ps
            if way >= 0:
                assists += 1
            else:
                misses += 1
                way = victim(recent, index)
            tlb[base + way] = ((page + 1) << TLB_TAG_SHIFT) | (frame << TLB_FRAME_SHIFT) | (TLB_DIRTY if write else 0)
        assume(way >= 0)
        touch(recent, index, way, ways)

        slow = 1 if frame >= slow_frames else 0
        local = 1 if (a >> 8) == last_block else 0
        if budget[0, slow] <= 0 or (write and budget[1, slow] <= 0):
            counters[C.time__throttle_ps] += state[S.END_PS] - clock
            clock = state[S.END_PS]
            break
        last_block = a >> 8
        if fault_ps[position] != 0:
            clock += fault_ps[position]
            fault_ps[position] = 0
        if exit_ps[position] != 0:
            field[EXIT_START] = clock
            clock += exit_ps[position]
            if logging:
                clock += flush_log(pml, vcpu, counters)
            field[EXIT_END] = clock
            field[FLUSH_AT_ENTRY] = 0
            exit_ps[position] = 0

        stamp = stamps[frame]
        if stamp != (owner | (page << STAMP_PAGE_SHIFT) | ((g >> ENTRY_VERSION_SHIFT) & STAMP_VERSION_MASK)):
            bad += 1
        latency = walk_ps + latency_ps[slow, local]
        cost = (latency * mlp) >> 8
        budget[0, slow] -= read_bytes[slow, local]
        if write:
            stores += 1
            gpt[page] = (g & ~ENTRY_VERSION_MASK) | ((g + ENTRY_VERSION_ONE) & ENTRY_VERSION_MASK)
            stamps[frame] = (stamp & ~STAMP_VERSION_MASK) | ((stamp + 1) & STAMP_VERSION_MASK)
            budget[1, slow] -= write_bytes[slow, local]
        clock += think[position] + cost
        thought += think[position]
        stall += cost
        histogram[min(latency >> LATENCY_BIN_SHIFT, LATENCY_BINS - 1)] += 1
        slow_total += slow
        total += 1
        left -= 1
        position += 1

        if kind != STORE:
            loads += 1
        if pmu_on != 0:
            cost, service = sample(pmu_on, m.ds, pml, ept, field, vcpu, kind, clock, a, m.table_gva, slow, latency,
                                   False, counters)  # fmt: skip
            clock += cost
            if service:
                reason = PMI
                break

    field[CLOCK] = clock
    field[POSITION] = position
    field[LAST_BLOCK] = last_block
    state[S.LEFT] = left
    counters[C.access__total] += total
    counters[C.access__fast] += total - slow_total
    counters[C.access__slow] += slow_total
    counters[C.access__loads] += loads
    counters[C.access__stores] += stores
    counters[C.access__tlb_misses] += misses
    counters[C.access__dirty_assists] += assists
    counters[C.access__walks] += walks
    counters[C.access__walk_refs] += refs
    counters[C.access__walk_ps] += walk_total
    counters[C.access__stall_ps] += stall
    counters[C.access__think_ps] += thought
    counters[C.integrity__accesses_checked] += total
    counters[C.integrity__mismatches] += bad
    return reason


@kernel
def run(m: Machine, operations: np.ndarray, until: int) -> int:
    """Run all vCPUs to virtual time ``until`` (ps), applying ``operations`` (OPERATION[k]) at their times.

    Returns the reason; for all but REACHED, ``state[S.TURN]`` names the vCPU, and the next call resumes there.
    """
    state = m.state
    slice_ps = state[S.SLICE_PS]
    while True:
        now = state[S.NOW]
        boundary = min(until, (now // slice_ps + 1) * slice_ps)
        next_operation = state[S.OPERATION]
        if next_operation < operations.size:
            boundary = min(boundary, max(now, operations[next_operation].time_ps))
        for vcpu in range(state[S.TURN], m.vcpus.field.shape[0]):
            reason = _run_vcpu(m, vcpu, boundary)
            if reason != REACHED:
                state[S.TURN] = vcpu
                return reason
        state[S.TURN] = 0
        state[S.NOW] = boundary
        while next_operation < operations.size and operations[next_operation].time_ps <= boundary:
            apply_operation(m.vcpus, m.pml, m.ept, m.stamps, state, m.budget, operations[next_operation], m.counters)
            next_operation += 1
        state[S.OPERATION] = next_operation
        if boundary >= until:
            return REACHED
