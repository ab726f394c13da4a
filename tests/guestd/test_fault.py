"""Faults in batches: what a look-ahead finds, that each is charged where it was met, and what verify sees."""

import numpy as np
import pytest

from guestd.fault import HINT_BATCH, Batch, charge, clear_fresh, verify
from guestd.guest import Guest
from guestd.vcpu import drop_guest_everywhere
from proto.costs import Costs
from proto.counters import C
from proto.entry import (
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
    assert counted[C.time__fault_ps] == touched * costs.minor_fault_ps
    frames = touched + guest.workload.space.tables
    assert counted[C.exit__ept_violation] == frames
    assert counted[C.time__exit_ps] == frames * costs.ept_violation_alloc_ps
    assert counted[C.time__stolen_ps] == 0, "a first touch is the program's own doing"
    assert not guest.machine.vcpus.fault_ps.any() and not guest.machine.vcpus.exit_ps.any(), "all of it was charged"


@pytest.mark.parametrize("block", [64, 1000, 8192])
def test_the_batch_size_changes_no_first_touch(block: int, costs: Costs) -> None:
    import msgspec

    config = guest_config(costs)
    engine = msgspec.structs.replace(config.engine, block=block)
    guest, report = run_guest(msgspec.structs.replace(config, engine=engine))
    reference, expected = run_guest(config)
    assert (guest.machine.gpt & FRAME_MASK).tolist() == (reference.machine.gpt & FRAME_MASK).tolist()
    assert report["access"] == expected["access"]
    assert report["populate"] == expected["populate"]


def test_charge_adds_up_costs_that_meet_in_one_place() -> None:
    amount = np.zeros(5, np.int64)
    assert charge(amount, np.array([1, 3, 1]), np.array([10, 20, 30])) == 60
    assert amount.tolist() == [0, 40, 0, 20, 0]


def test_clear_fresh_writes_each_frame_s_own_stamp_and_counts_what_is_not_mapped(costs: Costs) -> None:
    ept, stamps = np.zeros(8, np.int64), np.zeros(8, np.int64)
    ept[1] = 6 << FRAME_SHIFT | PRESENT | WRITABLE
    ept[3] = 7 << FRAME_SHIFT | PRESENT | WRITABLE
    owner = owner_stamp(1)
    fresh, gpfns = np.array([2, STAMP_TABLE_BASE + 4, 5]), np.array([1, 3, 4])
    machine = bare_machine(costs, 2, pml=True)
    assert clear_fresh(machine.vcpus, 1, machine.pml, ept, stamps, owner, fresh, gpfns, machine.counters) == 1
    assert stamps.tolist() == [0] * 6 + [owner | 2 << 18, owner | (STAMP_TABLE_BASE + 4) << 18]
    assert ept[[1, 3, 4]].tolist() == [6 << 12 | PRESENT | WRITABLE | DIRTY, 7 << 12 | PRESENT | WRITABLE | DIRTY, 0]
    assert (machine.pml.log[1, -2:] >> 12).tolist() == [3, 1], "what was cleared is logged as dirty"
    assert (machine.counters[C.pml__entries], machine.counters[C.pml__useless]) == (2, 1)


@pytest.fixture(scope="module")
def finished(costs: Costs) -> Guest:
    return run_guest(guest_config(costs))[0]


@pytest.mark.parametrize("harm", ["lost write", "swapped contents", "other owner", "page table"])
def test_verify_sees_any_harm_to_a_page(harm: str, finished: Guest) -> None:
    machine = finished.machine
    owner = owner_stamp(finished.config.vm)
    gpt, ept, stamps = machine.gpt.copy(), machine.ept.copy(), machine.stamps.copy()
    assert verify(gpt, ept, stamps, owner, machine.table_gpfn) == (4096 * 7 // 8, 0)
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
        table = int(machine.table_gpfn[0])
        stamps[(int(ept[table]) & FRAME_MASK) >> FRAME_SHIFT] = 0
    assert verify(gpt, ept, stamps, owner, machine.table_gpfn)[1] == (2 if harm == "swapped contents" else 1)


def test_a_batch_has_room_for_every_access_of_a_block() -> None:
    batch = Batch(100)
    assert batch.hint_page.size == HINT_BATCH and batch.fresh.size == 200 and batch.gpfn.size == 300


def test_a_mapping_that_is_lost_and_faulted_in_again_is_seen(costs: Costs) -> None:
    """Demand-zero brings back a page without its content, which the entry's version remembers."""
    fleet = start_fleet(guest_config(costs))
    guest = fleet.guests[0]
    while guest.phase == "populate" or guest.machine.counters[C.access__total] < 50_000:
        assert fleet.step()
    lost = np.flatnonzero(guest.machine.gpt >> ENTRY_VERSION_SHIFT > 1)[:50]
    guest.machine.gpt[lost] &= ~PRESENT
    drop_guest_everywhere(guest.machine.vcpus)
    assert fleet.run().reports[0]["integrity"]["mismatches"] > 0
