"""Faults in batches: what a look-ahead finds, that each is charged where it was met, and what verify sees."""

import numpy as np
import pytest

from guestd.fault import HINT_BATCH, charge_hints, charge_violations, clear_fresh, new_batch, table_frames, verify
from guestd.guest import Guest
from guestd.instructions import mov_cr3_everywhere
from guestd.machine import S
from guestd.vcpu import EPT_REFAULT, EPT_VIOLATION, HINT_FAULT, new_vcpus
from proto.costs import Costs
from proto.counters import STOLEN_PARTS, C, split, sum_parts
from proto.entry import (
    ACCESSED,
    DIRTY,
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    PRESENT,
    STAMP_TABLE_BASE,
    WRITABLE,
    owner_stamp,
)
from tests.guestd.machines import bare_machine, guest_config, run_guest, start_fleet


def test_every_first_touch_is_charged_once_where_it_happens(costs: Costs) -> None:
    guest, _ = run_guest(guest_config(costs))
    touched = 4096 * 7 // 8
    assert guest.populated is not None
    counted = guest.populated.counters
    assert counted[C.vmstat__pgfault] == touched
    assert counted[C.time__minor_fault_ps] == touched * costs.minor_fault_ps
    frames = touched + guest.machine.tables.upper.size
    assert counted[C.exit__ept_violation] == frames
    assert counted[C.time__ept_violation_ps] == frames * costs.ept_violation_alloc_ps
    time_ps = split(counted)["time"]
    assert sum_parts(time_ps, STOLEN_PARTS) == 0, "a first touch is the program's own doing"
    vcpus = guest.machine.vcpus
    assert not any(array.any() for array in (vcpus.fault_ps, vcpus.exit_ps, vcpus.retries)), "all of it was charged"


@pytest.mark.parametrize("block", [64, 1000, 8192])
def test_the_batch_size_changes_no_first_touch(block: int, costs: Costs) -> None:
    import msgspec

    config = guest_config(costs)
    engine = msgspec.structs.replace(config.engine, block=block)
    guest, report = run_guest(msgspec.structs.replace(config, engine=engine))
    reference, expected = run_guest(config)
    assert (guest.machine.gpt & FRAME_MASK).tolist() == (reference.machine.gpt & FRAME_MASK).tolist()
    assert report["populate"] == expected["populate"]
    # The barrier at which populating ends may find a block more or less of page tables in the LLC.
    assert report["access"]["total"] == pytest.approx(expected["access"]["total"], rel=0.02)


def test_costs_that_meet_in_one_place_add_up_and_each_is_a_retry_of_the_walk(costs: Costs) -> None:
    vcpus, batch = new_vcpus(2, costs, 1), new_batch(100)
    batch.gpfn_position[:4], batch.gpfn_old[:4] = (1, 3, 1, 4), (1, 0, 1, 0)
    charge_violations(vcpus, 1, batch, np.array([10, 20, 30, 5]))
    batch.hint_position[:2] = 3, 2
    charge_hints(vcpus, 1, batch, np.array([7, 8]))
    assert vcpus.exit_ps[1, :5].tolist() == [0, 40, 0, 20, 5]
    assert vcpus.exit_part[1, [1, 3, 4]].tolist() == [EPT_REFAULT, EPT_VIOLATION, EPT_VIOLATION]
    assert vcpus.fault_ps[1, :5].tolist() == [0, 0, 8, 7, 0]
    assert vcpus.fault_part[1, [2, 3]].tolist() == [HINT_FAULT] * 2
    assert vcpus.retries[1, :5].tolist() == [0, 2, 1, 1, 0], "who clears a fresh frame is the kernel, not the access"
    assert not vcpus.exit_ps[0].any()


def test_clear_fresh_writes_each_frame_s_own_stamp_and_counts_what_is_not_mapped(costs: Costs) -> None:
    machine = bare_machine(costs, 2, pml=True)
    ept, stamps, owner = machine.ept, machine.stamps, int(machine.state[S.OWNER])
    ept[1] = 6 << FRAME_SHIFT | PRESENT | WRITABLE
    ept[3] = 7 << FRAME_SHIFT | PRESENT | WRITABLE
    assert clear_fresh(machine, 1, np.array([2, STAMP_TABLE_BASE + 4, 5]), np.array([1, 3, 4])) == 1
    assert stamps[:8].tolist() == [0] * 6 + [owner | 2 << 18, owner | (STAMP_TABLE_BASE + 4) << 18]
    assert ((ept[[1, 3]] & (ACCESSED | DIRTY)) == ACCESSED | DIRTY).all() and ept[4] == 0
    assert (machine.pml.log[1, -2:] >> 12).tolist() == [3, 1], "what was cleared is logged as dirty"
    assert (machine.counters[C.pml__entries], machine.counters[C.pml__useless]) == (2, 1)


@pytest.fixture(scope="module")
def finished(costs: Costs) -> Guest:
    return run_guest(guest_config(costs))[0]


@pytest.mark.parametrize("harm", ["lost write", "swapped contents", "other owner", "page table"])
def test_verify_sees_any_harm_to_a_page(harm: str, finished: Guest) -> None:
    machine = finished.machine
    owner = owner_stamp(finished.config.vm)
    tables = table_frames(machine.tables)
    gpt, ept, stamps = machine.gpt.copy(), machine.ept.copy(), machine.stamps.copy()
    assert verify(gpt, ept, stamps, owner, tables) == (4096 * 7 // 8, 0)
    first, second = np.flatnonzero(gpt)[[10, 2000]]
    slots = [
        (int(ept[(gpt[page] & FRAME_MASK) >> FRAME_SHIFT]) & FRAME_MASK) >> FRAME_SHIFT for page in (first, second)
    ]
    if harm == "lost write":
        stamps[slots[0]] -= 1
    elif harm == "swapped contents":
        stamps[slots] = stamps[slots[::-1]]
    elif harm == "other owner":
        stamps[slots[0]] += owner_stamp(1) - owner_stamp(0)
    else:
        table = int(tables[0])
        stamps[(int(ept[table]) & FRAME_MASK) >> FRAME_SHIFT] = 0
    assert verify(gpt, ept, stamps, owner, tables)[1] == (2 if harm == "swapped contents" else 1)


def test_a_batch_has_room_for_every_access_of_a_block() -> None:
    batch = new_batch(100)
    assert batch.hint_page.size == HINT_BATCH
    assert batch.fresh.size == batch.gpfn.size >= 100 * (1 + 5), "a page and all tables on the way to it"


def test_a_mapping_that_is_lost_and_faulted_in_again_is_seen(costs: Costs) -> None:
    """Demand-zero brings back a page without its content, which the entry's version remembers."""
    fleet = start_fleet(guest_config(costs))
    guest = fleet.guests[0]
    while guest.phase == "populate" or guest.machine.counters[C.access__total] < 50_000:
        assert fleet.step()
    lost = np.flatnonzero(guest.machine.gpt >> ENTRY_VERSION_SHIFT > 1)[:50]
    guest.machine.gpt[lost] &= ~PRESENT
    mov_cr3_everywhere(guest.machine.vcpus, guest.machine.walk_geometry)
    assert fleet.run().reports[0]["integrity"]["mismatches"] > 0
