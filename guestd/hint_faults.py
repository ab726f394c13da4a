"""The NUMA hint faults of TPP in compiled code, where they happen: on the vCPU's thread, as in Linux in the task.

A guest with fast scans takes a hint fault every few accesses. `run` therefore goes on by itself after a batch that has
nothing else, if the policy's hint faults do what a `HintRule` says. `take_hints` does to such a batch what the stages
`hint-faults`, `active-lru` and `in-fault` (guestd/tiering/tpp.py) do to it otherwise, which are its reference: same
charges, same counters. Its CPU is read once per stage of a batch, and counts as the agent's.
"""

from typing import NamedTuple

import numpy as np

from guestd import engine
from guestd.engine import FAULT
from guestd.fault import HINT_BATCH, Faults, backed, collect
from guestd.guest_view import copy_and_map
from guestd.jit import inline, kernel
from guestd.machine import Machine, S
from guestd.meter import CALLS, CLASSIFY, MIGRATE, READ_NS, TASK, TRACK, Meter, thread_cpu_ns
from guestd.mm.nodes import F_ACTIVE, F_DEMOTED, FAST, SLOW, WMARK_HIGH, give_free, mark
from guestd.tiering.pages import frame_of, is_huge
from guestd.tiering.policy import FAILED, TAKEN, HintRule
from guestd.tiering.units import relink_unit, target_for
from guestd.vcpu import CLOCK, HINT_FAULT
from proto.arrays import Ints, Words
from proto.costs import Costs, copy_ps
from proto.counters import C
from proto.entry import PRESENT, PROTNONE
from proto.units import PAGE_SHIFT, PAGE_SIZE

HINTS_TAKEN = 5
"""Reason of `run`, beside the engine's: a batch of hint faults was taken, and something else is to be done now."""

NOT_WANTED = -3
"""In place of a target: the policy leaves the page where it is."""
_ROOM = 4096


class Hints(NamedTuple):
    """What `take_hints` works by; `tally` is empty where a policy has its hint faults handed over."""

    active_only: int
    fault_ps: int
    mark_ps: int
    promote_ps: int
    """A promotion: sync, with the copy."""
    tally: Words
    """`HintRule.tally`"""
    book: Words
    """`Meter.book`"""
    modelled_ps: Words
    """`Meter.modelled_ps`"""
    cpu_ns: Words
    """int64[1]: CPU that all of it has used."""
    target: Ints
    """int32[HINT_BATCH]: scratch."""
    moved: Words
    """int64[1]: promotions that were not logged yet, with their pages and times."""
    moved_page: Words
    moved_ps: Words


def new_hints(rule: HintRule | None, costs: Costs, fault_ps: int, meter: Meter) -> Hints:
    """``fault_ps``: what a hint fault costs without a promotion."""
    return Hints(
        active_only=int(rule is not None and rule.active_only),
        fault_ps=fault_ps,
        mark_ps=costs.lru_page_ps,
        promote_ps=costs.migrate_page_ps + costs.migrate_sync_ps + copy_ps(costs, True, False),
        tally=np.zeros(0, np.int64) if rule is None else rule.tally,
        book=meter.book,
        modelled_ps=meter.modelled_ps,
        cpu_ns=np.zeros(1, np.int64),
        target=np.zeros(HINT_BATCH, np.int32),
        moved=np.zeros(1, np.int64),
        moved_page=np.zeros(_ROOM, np.int64),
        moved_ps=np.zeros(_ROOM, np.int64),
    )


@inline
def _pick_targets(m: Machine, faults: Faults, hints: Hints) -> bool:
    """Take frames for what is to be promoted. False, with nothing taken, if there are huge pages or EPT violations."""
    nodes, batch, target = faults.nodes, faults.batch, hints.target
    keep = nodes.watermark[FAST, WMARK_HIGH]
    good, count = True, 0
    while good and count < batch.counts[0]:
        page = batch.hint_page[count]
        frame = frame_of(m.gpt[page])
        target[count] = NOT_WANTED
        if is_huge(m.tables.upper, page):
            good = False
        elif hints.active_only == 0 or (nodes.flags[frame] & F_ACTIVE) != 0:
            target[count] = target_for(nodes, frame, FAST, keep)
            good = target[count] < 0 or (backed(m.ept, frame) and backed(m.ept, target[count]))
        count += 1
    while not good and count > 0:
        count -= 1
        if target[count] >= 0:
            give_free(nodes, target[count])
    return good


@inline
def _mark(m: Machine, faults: Faults, hints: Hints) -> int:
    """mark_page_accessed on what is on no active list; the time that costs, ps."""
    marked = 0
    if hints.active_only != 0:
        for i in range(faults.batch.counts[0]):
            frame = frame_of(m.gpt[faults.batch.hint_page[i]])
            if (faults.nodes.flags[frame] & F_ACTIVE) == 0:
                m.counters[C.vmstat__pgactivate] += mark(faults.nodes, frame)
                marked += 1
    return marked * hints.mark_ps


@inline
def _promote(m: Machine, vcpu: int, faults: Faults, hints: Hints) -> int:
    """Move what has a target; how many pages that is."""
    nodes, counters = faults.nodes, m.counters
    candidates = moved = 0
    for i in range(faults.batch.counts[0]):
        target = hints.target[i]
        if target == NOT_WANTED:
            continue
        page = faults.batch.hint_page[i]
        frame = frame_of(m.gpt[page])
        candidates += 1
        if (nodes.flags[frame] & F_DEMOTED) != 0:
            counters[C.vmstat__pgpromote_candidate_demoted] += 1
        if target >= 0:
            relink_unit(nodes, frame, target, FAST)
            copy_and_map(m, nodes, page, frame, target, 0, vcpu)
            hints.moved_page[hints.moved[0] + moved] = page
            moved += 1
    counters[C.vmstat__pgpromote_candidate] += candidates
    counters[C.vmstat__pgpromote_success] += moved
    counters[C.vmstat__numa_pages_migrated] += moved
    counters[C.vmstat__pgmigrate_success] += moved
    counters[C.vmstat__pgmigrate_fail_dst_node_full] += candidates - moved
    counters[C.bytes__migrated] += moved << PAGE_SHIFT
    m.budget[0, SLOW] -= moved * PAGE_SIZE
    m.budget[1, FAST] -= moved * PAGE_SIZE
    hints.tally[FAILED] += candidates - moved
    return moved


@kernel
def take_hints(m: Machine, vcpu: int, faults: Faults, hints: Hints) -> bool:
    """Take the hint faults of the batch; false, and nothing is done, where that takes more than is here."""
    started = thread_cpu_ns()
    good = _pick_targets(m, faults, hints)
    classified = migrated = started
    if good:
        batch, vcpus, count = faults.batch, m.vcpus, faults.batch.counts[0]
        mark_ps = _mark(m, faults, hints)
        classified = thread_cpu_ns()
        moved = _promote(m, vcpu, faults, hints)
        migrated = thread_cpu_ns()
        for i in range(count):
            page, position = batch.hint_page[i], batch.hint_position[i]
            m.gpt[page] = (m.gpt[page] & ~PROTNONE) | PRESENT
            vcpus.fault_ps[vcpu, position] += hints.fault_ps + (hints.promote_ps if hints.target[i] >= 0 else 0)
            vcpus.fault_part[vcpu, position] = HINT_FAULT
            vcpus.retries[vcpu, position] += 1
        fault_ps, promote_ps = count * hints.fault_ps, moved * hints.promote_ps
        hints.modelled_ps[TASK, TRACK] += fault_ps
        hints.modelled_ps[TASK, CLASSIFY] += mark_ps
        hints.modelled_ps[TASK, MIGRATE] += promote_ps
        done_ps = vcpus.field[vcpu, CLOCK] + fault_ps + mark_ps + promote_ps
        for i in range(hints.moved[0], hints.moved[0] + moved):
            hints.moved_ps[i] = done_ps
        hints.moved[0] += moved
        hints.tally[TAKEN] += count
        m.counters[C.vmstat__numa_hint_faults] += count
    ended = thread_cpu_ns()
    if good:
        book = hints.book
        book[CLASSIFY] += classified - started - book[READ_NS]
        book[MIGRATE] += migrated - classified - book[READ_NS]
        book[TRACK] += ended - migrated - book[READ_NS]
    # Four readings are what two metered calls take.
    hints.book[CALLS] += 2
    hints.cpu_ns[0] += ended - started
    return good


@kernel
def run(m: Machine, operations: np.ndarray, until: int, faults: Faults, hints: Hints, wake_below: int) -> int:
    """`engine.run`, which goes on after hint faults; at FAULT, the batch of ``faults`` says what to take.

    Returns HINTS_TAKEN with less than ``wake_below`` frames free on the fast node, or promotions enough to be logged.
    """
    while True:
        reason = engine.run(m, operations, until)
        if reason != FAULT:
            return reason
        vcpu = m.state[S.TURN]
        collect(m, vcpu, faults)
        counts = faults.batch.counts
        others = counts[1] + counts[2] + counts[3] + counts[4]
        if hints.tally.size == 0 or counts[0] == 0 or others != 0 or not take_hints(m, vcpu, faults, hints):
            return FAULT
        if faults.nodes.free_count[FAST] < wake_below or hints.moved[0] > _ROOM - HINT_BATCH:
            return HINTS_TAKEN
