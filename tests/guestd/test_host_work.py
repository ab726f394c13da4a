"""What the host does to a VM beyond KVM's own: pauses and what happens in them, copies, walks of the GPT."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.engine import REACHED
from guestd.host_work import walk_guest
from guestd.machine import Machine, S
from guestd.vcpu import CLOCK, FLUSH_AT_ENTRY, IDLE, PAUSED
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT
from proto.layout import (
    NARROW,
    OP_COPY,
    OP_HARVEST,
    OP_PAUSE,
    OP_SWITCH,
    OP_TRADE,
    OP_WALK_GPT,
    W_LEAVE,
    W_LEFT,
    W_VISITED,
    W_YOUNG,
)
from proto.trace import STORE
from proto.units import TABLE_PAGES
from tests.guestd.machines import SLOTS, TABLES, bare_machine, small_costs, touch_pages
from tests.guestd.test_kvm import US, busy, flush, mapped, run

SLOW = SLOTS // 2


def slot(machine: Machine, gpfn: int) -> int:
    return (int(machine.ept[gpfn]) & FRAME_MASK) >> FRAME_SHIFT


def bits(row: np.ndarray) -> set[int]:
    return {64 * word + bit for word in range(row.size) for bit in range(64) if int(row[word]) >> bit & 1}


def gpa_of_table(machine: Machine, number: int) -> int:
    return (int(machine.tables.upper[number]) & FRAME_MASK) >> FRAME_SHIFT


def test_a_pause_stops_every_vcpu_for_as_long_and_flushes_each_once(costs: Costs) -> None:
    machine = mapped(costs, 3)
    busy(machine)
    assert run(machine, 40 * US, (5 * US, OP_PAUSE, 0, 0, 10 * US), flush(9 * US)) == REACHED
    count = machine.counters
    assert machine.vcpus.ledger[:, PAUSED].tolist() == [10 * US] * 3
    assert count[C.exit__paused] == count[C.kvm__tlb_flush] == count[C.instr__invept_global] == 3
    assert count[C.kvm__remote_tlb_flush_requests] == 2
    assert count[C.exit__kick] == count[C.kvm__remote_tlb_flush] == 0, "nobody was in guest mode any more"
    assert (machine.vcpus.ledger.sum(axis=1) == machine.vcpus.field[:, CLOCK]).all()


def test_what_a_vcpu_is_outside_for_anyhow_is_no_time_lost_to_the_pause(costs: Costs) -> None:
    machine = mapped(costs, 2)
    busy(machine)
    machine.vcpus.exit_ps[0, 0], machine.vcpus.retries[0, 0] = 20 * US, 1
    run(machine, 60 * US, (5 * US, OP_PAUSE, 0, 0, 10 * US), (7 * US, OP_PAUSE, 0, 0, 30 * US))
    assert machine.vcpus.ledger[1, PAUSED] == 32 * US - costs.invept_ps, "the second one goes on"
    lost = machine.vcpus.ledger[:, PAUSED]
    assert lost[0] < lost[1]


def test_a_halted_vcpu_loses_nothing_and_flushes_at_its_entry(costs: Costs) -> None:
    machine = mapped(costs, 2)
    machine.vcpus.field[:, IDLE] = 1
    run(machine, 20 * US, (5 * US, OP_PAUSE, 0, 0, 10 * US))
    assert machine.vcpus.ledger[:, PAUSED].tolist() == [0, 0]
    assert (machine.vcpus.field[:, FLUSH_AT_ENTRY] == 1).all()


def test_pages_trade_places_in_place_with_their_content(costs: Costs) -> None:
    machine = mapped(costs, 1)
    machine.ept[101] = (SLOW + 7) << FRAME_SHIFT | PRESENT | ACCESSED
    machine.stamps[SLOW + 7] = machine.stamps[1]
    machine.stamps[1] = 0
    kept = machine.stamps[[0, SLOW + 7]].copy()
    before, budget = machine.ept[[100, 101]] & ~FRAME_MASK, machine.budget.copy()
    run(machine, 20 * US, (5 * US, OP_PAUSE, 0, 0, US), (5 * US, OP_TRADE, 0, 100, 101))
    assert (slot(machine, 100), slot(machine, 101)) == (SLOW + 7, 0)
    assert machine.stamps[[SLOW + 7, 0]].tolist() == kept.tolist()
    assert (machine.ept[[100, 101]] & ~FRAME_MASK).tolist() == before.tolist(), "nothing is zapped"
    # Three copies through a buffer in fast memory: each tier's page is read and written once, the buffer too.
    assert ((budget - machine.budget) // 4096).tolist() == [[2, 1], [2, 1]]


def test_traded_pages_are_read_where_they_are_after_the_flush(costs: Costs) -> None:
    machine = mapped(costs, 2)
    busy(machine)
    run(
        machine, 50 * US, (5 * US, OP_PAUSE, 0, 0, US), (5 * US, OP_TRADE, 0, 100, 105), (5 * US, OP_TRADE, 0, 101, 107)
    )
    assert machine.counters[C.integrity__mismatches] == 0
    assert machine.counters[C.integrity__accesses_checked] > 100
    assert machine.counters[C.kvm__mmu_zapped] == machine.counters[C.exit__ept_violation] == 0


def logging(costs: Costs) -> Machine:
    machine = bare_machine(small_costs(costs), 1, pml=True)
    for page in range(16):
        machine.gpt[page] = (100 + page) << FRAME_SHIFT | PRESENT | 2
        machine.ept[100 + page] = page << FRAME_SHIFT | PRESENT | 2
        machine.stamps[page] = machine.state[S.OWNER] | page << 18
    return machine


def test_a_clean_copy_is_switched_to_and_a_page_written_since_is_copied_again(costs: Costs) -> None:
    machine = logging(costs)
    machine.vcpus.field[:, IDLE] = 0
    touch_pages(machine, 0, [3] * 500, STORE)
    copies = [(2 * US, OP_COPY, 0, 100 + page, SLOW + page) for page in (3, 4)]
    switches = [(10 * US, OP_SWITCH, 0, 100 + page, SLOW + page, 0, 2 * US) for page in (3, 4)]
    run(machine, 11 * US, (US, OP_HARVEST, 0, 0, 0), *copies, (10 * US, OP_PAUSE, 0, 0, 3 * US), *switches)
    assert [slot(machine, 103), slot(machine, 104)] == [SLOW + 3, SLOW + 4]
    assert machine.counters[C.pml__copied_again] == 1
    lost = int(machine.vcpus.ledger[0, PAUSED])
    assert 0 < lost - 5 * US <= 16 * costs.pml_entry_ps, "the copy made it longer; the exit empties the log"
    assert machine.stamps[SLOW + 3] == machine.stamps[3] and machine.stamps[SLOW + 4] == machine.stamps[4]
    machine.stamps[[3, 4]] = 0
    machine.vcpus.field[:, IDLE] = 0
    run(machine, 60 * US)
    assert machine.counters[C.integrity__mismatches] == 0


@given(
    present=st.lists(st.booleans(), min_size=TABLES, max_size=TABLES),
    huge=st.sets(st.integers(0, TABLES - 1)),
    young=st.sets(st.integers(0, TABLES * TABLE_PAGES - 1), max_size=40),
    leave=st.sets(st.integers(0, TABLES * TABLE_PAGES - 1), max_size=20),
    logged=st.sets(st.integers(0, TABLES - 1)),
    left=st.sets(st.integers(0, TABLES - 1)),
    narrow=st.booleans(),
)
def test_a_walk_finds_what_a_look_at_every_entry_finds(
    present: list[bool], huge: set[int], young: set[int], leave: set[int], logged: set[int], left: set[int],
    narrow: bool, costs: Costs,
) -> None:  # fmt: skip
    machine = bare_machine(small_costs(costs), 1)
    upper, gpt = machine.tables.upper, machine.gpt
    gpt[:] = np.arange(gpt.size) << FRAME_SHIFT | PRESENT
    gpt[list(young)] |= ACCESSED
    pages = {number: gpa_of_table(machine, number) for number in range(TABLES)}
    for number in range(TABLES):
        upper[number] &= ~(ACCESSED | (0 if present[number] else PRESENT))
        if number in huge:
            upper[number] |= HUGE | (ACCESSED if any(page // TABLE_PAGES == number for page in young) else 0)
    for row, members in ((machine.walk[W_LEAVE], leave), (machine.walk[W_LEFT], {pages[n] for n in left}),
                         (machine.pml.dirty[1], {pages[n] for n in logged})):  # fmt: skip
        for member in members:
            row[member >> 6] |= np.int64(np.uint64(1 << (member & 63)).view(np.int64))
    cleared, found, visited, still_left = 0, set(), 0, {pages[n] for n in left}
    for number in range(TABLES):
        if not present[number]:
            continue
        if number in huge:
            visited += 1
            if upper[number] & ACCESSED and pages[number] not in leave:
                found |= set(range(pages[number], pages[number] + TABLE_PAGES))
                cleared += 1
        elif not narrow or number in logged | left:
            visited += 1 + TABLE_PAGES
            mine = {page for page in young if page // TABLE_PAGES == number}
            found |= mine - leave
            cleared += len(mine - leave)
            still_left = still_left - {pages[number]} | ({pages[number]} if mine & leave else set())
    assert walk_guest(machine, narrow) == cleared
    assert bits(machine.walk[W_YOUNG]) == found
    assert bits(machine.walk[W_LEFT]) == still_left
    assert machine.walk[W_VISITED, 0] == visited
    tables = {n for n in range(TABLES) if present[n] and n not in huge and (not narrow or n in logged | left)}
    seen = {page for page in young - leave if page // TABLE_PAGES in tables}
    assert set(np.flatnonzero(gpt & ACCESSED).tolist()) == young - seen


def test_a_walk_flushes_once_if_it_cleared_anything(costs: Costs) -> None:
    machine = mapped(costs, 2)
    busy(machine)
    run(machine, 40 * US, *((at * US, OP_WALK_GPT, 0, 0, 0) for at in (5, 25)))
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 2
    assert machine.counters[C.kvm__tlb_flush] == 4
    # The flush makes the next walk of the hardware set the bit again.
    assert {page for page in range(16) if machine.gpt[page] & ACCESSED} == set(range(16))
    machine.vcpus.field[:, IDLE] = 1
    machine.gpt[:] &= ~ACCESSED
    run(machine, 50 * US, (45 * US, OP_WALK_GPT, 0, 0, 0))
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 2, "nothing was accessed"


def test_a_harvest_and_a_narrow_walk_at_one_time_flush_once(costs: Costs) -> None:
    machine = logging(costs)
    touch_pages(machine, 0, list(range(16)) * 100, STORE)
    ops = [(at * US, kind, flags, 0, 0) for at in (5, 25) for kind, flags in ((OP_HARVEST, 0), (OP_WALK_GPT, NARROW))]
    run(machine, 30 * US, *ops)
    assert bits(machine.walk[W_YOUNG]) == set(range(100, 116))
    assert gpa_of_table(machine, 0) in bits(machine.pml.dirty[1])
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == machine.counters[C.kvm__tlb_flush] == 2
    assert machine.walk[W_VISITED, 0] == 2 * (1 + TABLE_PAGES), "the other tables were not looked at"
