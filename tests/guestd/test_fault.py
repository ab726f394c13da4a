"""Faults in batches: what a look-ahead finds, that each is charged where it was met, and what verify sees."""

import numpy as np
import pytest

from guestd.address_space import AddressSpace, Vma
from guestd.fault import (
    HINT_BATCH,
    HUGE_BATCH,
    QUEUED,
    Faults,
    Thp,
    charge_hints,
    charge_violations,
    clear_fresh,
    collect,
    new_batch,
    table_frames,
    verify,
)
from guestd.guest import Guest
from guestd.instructions import mov_cr3_everywhere
from guestd.machine import Machine, S
from guestd.mm.nodes import SLOW
from guestd.vcpu import EPT_REFAULT, EPT_VIOLATION, HINT_FAULT, new_vcpus
from proto.costs import Costs
from proto.counters import STOLEN_PARTS, C, split, sum_parts
from proto.entry import (
    ACCESSED,
    DIRTY,
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    STAMP_TABLE_BASE,
    WRITABLE,
    owner_stamp,
)
from tests.guestd.machines import bare_machine, guest_config, run_guest, start_fleet, touch_pages
from tests.small_fleet import with_thp, without_measured


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
    assert without_measured(report)["populate"] == without_measured(expected)["populate"]
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


@pytest.mark.parametrize("host", ["never", "always"])
def test_a_first_touch_of_2_mib_is_one_fault_and_what_the_ept_makes_of_it(host: str, costs: Costs) -> None:
    """Clearing touches all of it: a violation for each 4 KiB, or one where the EPT maps 2 MiB."""
    pages = 8192
    config = guest_config(costs, workload_params={"footprint": 0.7}, total_pages=pages, fast_pages=pages // 2)
    fleet = start_fleet(with_thp(config, "always", host, thp_defrag="always", khugepaged_pages_to_scan=0))
    guest = fleet.guests[0]
    while guest.phase == "populate":
        assert fleet.step()
    assert guest.populated is not None
    counted = guest.populated.counters
    machine, whole = guest.machine, guest.workload.space.whole_tables()
    huge = int(counted[C.vmstat__thp_fault_alloc])
    assert huge == whole.sum() >= 5
    assert ((machine.tables.upper[: whole.size] & HUGE) != 0).tolist() == (whole == 1).tolist()
    small = int(np.count_nonzero(machine.gpt)) - 512 * huge
    assert counted[C.vmstat__pgfault] == small + huge
    assert counted[C.time__minor_fault_ps] == (
        small * costs.minor_fault_ps + huge * (costs.minor_fault_ps + costs.clear_page_huge_ps)
    )
    tables = int((machine.tables.upper & (PRESENT | HUGE) == PRESENT).sum())
    assert tables == machine.tables.upper.size - huge, "a huge page needs no leaf table"
    backed = fleet.host.vms[0].counters
    blocks = int(backed[C.vmstat__thp_fault_alloc])
    if host == "never":
        violations = small + 512 * huge + tables
        assert counted[C.time__ept_violation_ps] == violations * costs.ept_violation_alloc_ps
    else:
        in_blocks = int(np.isin(np.flatnonzero(machine.ept & WRITABLE) // 512, _huge_regions(machine)).sum())
        violations = blocks + int(np.count_nonzero(machine.ept & WRITABLE)) - in_blocks
        assert blocks >= huge, "what the guest maps huge lies in one block of the host"
        assert counted[C.time__ept_violation_ps] == (
            violations * costs.ept_violation_alloc_ps + blocks * costs.clear_page_huge_ps
        )
    assert counted[C.exit__ept_violation] == violations
    fleet.run()
    assert fleet.host.reports[0]["integrity"]["mismatches"] == 0


def _huge_regions(machine: Machine) -> np.ndarray:
    return np.flatnonzero(machine.tables.ept_pde & HUGE)


def test_without_a_block_it_is_4_kib_pages_for_good(costs: Costs) -> None:
    """By default a node without a block ends the search; each region is tried once."""
    config = guest_config(costs, total_pages=8192, fast_pages=2048)
    guest, report = run_guest(with_thp(config, "always", khugepaged_pages_to_scan=0))
    assert guest.populated is not None
    counted = guest.populated.counters
    whole, huge = int(guest.workload.space.whole_tables().sum()), int(counted[C.vmstat__thp_fault_alloc])
    assert 0 < huge < 2048 // 512
    assert counted[C.vmstat__thp_fault_fallback] == whole - huge
    assert report["vmstat"]["thp_fault_fallback"] == 0
    assert report["memory"]["huge_bytes"] == huge << 21


def test_a_region_in_two_vmas_gets_no_huge_page() -> None:
    space = AddressSpace([Vma("a", 0x5555_5550_0000, 1000), Vma("b", 0x5555_5550_0000 + (1000 << 12), 3000)])
    whole = space.whole_tables()
    for number, start in enumerate(space.table_gva):
        inside = [
            vma for vma in space.vmas if vma.start <= start and start + (1 << 21) <= vma.start + (vma.pages << 12)
        ]
        assert bool(whole[number]) == (len(inside) == 1)
    assert 0 < whole.sum() < space.tables


def test_a_batch_takes_as_many_huge_pages_as_it_has_room_for(costs: Costs) -> None:
    """Regions beyond that wait for the next look-ahead, and each page of a region is listed once."""
    config = with_thp(guest_config(costs, total_pages=16384, fast_pages=8192), "always")
    guest = start_fleet(config).guests[0]
    machine, space = guest.machine, guest.workload.space
    tables = np.flatnonzero(space.whole_tables())[: HUGE_BATCH + 3]
    touch_pages(machine, 0, [int(table) * 512 + 5 for table in tables for _ in range(3)])
    batch = new_batch(8)
    faults = Faults(guest.nodes, np.zeros(0, np.uint8), 64, 1, 2, 3, Thp(space.whole_tables(), 7, False), batch)
    for already, expected in ((0, HUGE_BATCH), (HUGE_BATCH, 3)):
        collect(machine, 0, faults)
        mapped = np.flatnonzero(machine.tables.upper[: space.tables] & HUGE)
        assert mapped.size == already + expected
        fresh = batch.fresh[: batch.counts[2]]
        pages = fresh[fresh < STAMP_TABLE_BASE]
        assert np.array_equal(
            np.sort(pages), np.sort((tables[already : already + expected, None] * 512 + np.arange(512)).ravel())
        )
        assert np.unique(batch.gpfn[: batch.counts[1]]).size == batch.counts[1], "one violation each"
        for page, gpfn in zip(fresh, batch.fresh_gpfn, strict=False):
            machine.ept[gpfn] = gpfn << FRAME_SHIFT | PRESENT | WRITABLE
            assert page >= STAMP_TABLE_BASE or (machine.gpt[page] & FRAME_MASK) >> FRAME_SHIFT == gpfn
        assert not (machine.tables.upper & QUEUED).any() and not (machine.gpt & QUEUED).any()
    charged = np.flatnonzero(machine.vcpus.fault_ps[0])
    assert charged.tolist() == [3 * i for i in range(tables.size)], "at its first access"
    assert (machine.vcpus.fault_ps[0, charged] == 7).all()


def test_a_protected_huge_page_is_one_hint_at_its_first_access(costs: Costs) -> None:
    config = with_thp(guest_config(costs), "always", thp_defrag="always", khugepaged_pages_to_scan=0)
    fleet = start_fleet(config)
    guest = fleet.guests[0]
    while guest.phase == "populate":
        assert fleet.step()
    machine, view = guest.machine, guest.view
    slow = view.on_node(0, view.pages, SLOW, view.pages)
    heads = slow[view.sizes(slow) > 1][:2]
    for head in heads:
        assert view.protect(int(head), 512) == 512
    touch_pages(machine, 0, [int(heads[0]) + 9, int(heads[1]) + 1, int(heads[0]) + 8, int(heads[0])])
    batch = new_batch(8)
    thp = Thp(np.zeros(0, np.uint8), 7, False)
    collect(machine, 0, Faults(guest.nodes, np.zeros(0, np.uint8), 8, 1, 2, 3, thp, batch))
    assert batch.hint_page[: batch.counts[0]].tolist() == heads.tolist()
    assert batch.hint_position[: batch.counts[0]].tolist() == [0, 1]
    assert not (machine.tables.upper & QUEUED).any() and not (machine.gpt & QUEUED).any()
    view.unprotect(heads)
    fleet.run()
    assert fleet.host.reports[0]["integrity"]["mismatches"] == 0


@pytest.mark.parametrize(("away", "slices"), [(True, 1), (True, 3), (False, 1)], ids=["1", "3", "zapped"])
def test_a_look_ahead_brings_back_from_swap_what_a_slice_has_time_for(away: bool, slices: int, costs: Costs) -> None:
    fleet = start_fleet(guest_config(costs))
    guest = fleet.guests[0]
    while guest.phase == "populate":
        assert fleet.step()
    machine = guest.machine
    pages = np.flatnonzero(machine.gpt & PRESENT)[:40]
    gpfns = (machine.gpt[pages] & FRAME_MASK) >> FRAME_SHIFT
    machine.ept[gpfns] &= 0 if away else ~PRESENT
    machine.state[S.SLICE_PS] = 20 * slices
    machine.state[S.END_PS] = 1 << 60
    touch_pages(machine, 0, [int(page) for page in pages])
    batch = new_batch(64)
    thp = Thp(np.zeros(0, np.uint8), 7, False)
    collect(machine, 0, Faults(guest.nodes, np.zeros(0, np.uint8), 64, 1, 2, 3, thp, batch))
    assert batch.gpfn[: batch.counts[1]].tolist() == gpfns[: 10 * slices // 3 + 1 if away else None].tolist()
