"""What host operations do to a VM's vCPUs: kicks, coalescing, zaps, moves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd import engine
from guestd.engine import NEED_ACCESSES, REACHED
from guestd.machine import Machine, S
from guestd.mmu_lock import BIN_PS
from guestd.vcpu import CLOCK, EPT_REFAULT, EXIT_START, FLUSH_AT_ENTRY, HOST_TASK, IDLE, KICK
from proto.costs import Costs
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    WRITABLE,
    YOUNG,
)
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_STALL, OP_SWAP, OP_ZAP, OPERATION
from proto.trace import STORE
from proto.units import PS_PER_NS, TABLE_PAGES
from tests.guestd.machines import SLOTS, bare_machine, small_costs, touch_pages

US = 1000 * PS_PER_NS


def mapped(costs: Costs, vcpus: int, pages: int = 16, pml: bool = False) -> Machine:
    """Pages 0.. mapped to gPA frames 100.. and those to slots 0..; no vCPU has anything to run."""
    machine = bare_machine(small_costs(costs), vcpus, pml=pml)
    for page in range(pages):
        machine.gpt[page] = (100 + page) << FRAME_SHIFT | PRESENT | WRITABLE
        machine.ept[100 + page] = page << FRAME_SHIFT | PRESENT | WRITABLE
        machine.stamps[page] = machine.state[S.OWNER] | page << STAMP_PAGE_SHIFT
    return machine


Op = tuple[int, ...]
"""Time, kind, flags, a, b, and optionally hold and busy."""


def run(machine: Machine, until: int, *operations: Op) -> int:
    """Run to ``until`` ps; vCPUs that have nothing left to do halt."""
    machine.state[[S.OPERATION, S.END_PS]] = 0, until
    records = np.array([(*op, 0, 0)[:7] for op in sorted(operations)], OPERATION)
    while (reason := int(engine.run(machine, records, until))) == NEED_ACCESSES:
        machine.vcpus.field[machine.state[S.TURN], IDLE] = 1
    return reason


def busy(machine: Machine) -> None:
    """Give every vCPU more to do than any test lets it."""
    machine.vcpus.field[:, IDLE] = 0
    for vcpu in range(machine.vcpus.field.shape[0]):
        touch_pages(machine, vcpu, list(range(16)) * 200)


def flush(time: int) -> Op:
    """A flush request."""
    return time, OP_FLUSH, 0, 0, 0


def test_a_request_kicks_every_vcpu_in_guest_mode_once(costs: Costs) -> None:
    machine = mapped(costs, 3)
    busy(machine)
    assert run(machine, 20 * US, flush(5 * US)) == REACHED
    count = machine.counters
    assert count[C.kvm__remote_tlb_flush_requests] == count[C.kvm__remote_tlb_flush] == 1
    assert count[C.exit__kick] == count[C.kvm__tlb_flush] == count[C.instr__invept_global] == 3
    lost = 3 * (costs.vmexit_ps + costs.invept_ps)
    assert machine.vcpus.ledger[:, KICK].sum() == lost


@given(requests=st.lists(st.integers(0, 100), min_size=1, max_size=30), vcpus=st.integers(1, 4))
def test_requests_within_one_exit_flush_once(requests: list[int], vcpus: int, costs: Costs) -> None:
    """All requests fall within 100 ns, the exit that the first causes takes longer than that."""
    machine = mapped(costs, vcpus)
    busy(machine)
    run(machine, 20 * US, *(flush(5 * US + after * PS_PER_NS) for after in requests))
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == len(requests)
    assert machine.counters[C.kvm__remote_tlb_flush] == 1
    assert machine.counters[C.kvm__tlb_flush] == vcpus


@given(requests=st.lists(st.integers(0, 19_000), max_size=40), vcpus=st.integers(1, 4))
def test_executions_never_exceed_requests_times_vcpus(requests: list[int], vcpus: int, costs: Costs) -> None:
    machine = mapped(costs, vcpus)
    busy(machine)
    run(machine, 20 * US, *(flush(time * PS_PER_NS) for time in requests))
    count = machine.counters
    assert count[C.kvm__remote_tlb_flush] <= count[C.kvm__remote_tlb_flush_requests] == len(requests)
    assert count[C.kvm__remote_tlb_flush] <= count[C.exit__kick] <= count[C.kvm__tlb_flush] <= len(requests) * vcpus


def test_requests_farther_apart_than_an_exit_do_not_coalesce(costs: Costs) -> None:
    machine = mapped(costs, 2)
    busy(machine)
    apart = costs.vmexit_ps + costs.invept_ps
    run(machine, 40 * US, *(flush(5 * US + n * apart) for n in range(10)))
    assert machine.counters[C.kvm__remote_tlb_flush] == 10
    assert machine.counters[C.kvm__tlb_flush] == 20


def test_a_halted_vcpu_is_not_kicked_and_flushes_at_its_entry(costs: Costs) -> None:
    machine = mapped(costs, 2)
    machine.vcpus.field[:, IDLE] = 1
    run(machine, 20 * US, flush(5 * US), flush(9 * US))
    count = machine.counters
    assert count[C.kvm__remote_tlb_flush_requests] == 2
    assert count[C.kvm__remote_tlb_flush] == count[C.exit__kick] == 0
    assert count[C.kvm__tlb_flush] == 2, "one for each vCPU, not one for each request"
    assert (machine.vcpus.field[:, FLUSH_AT_ENTRY] == 1).all()


def test_a_vcpu_in_an_ept_violation_is_not_kicked(costs: Costs) -> None:
    machine = mapped(costs, 1)
    busy(machine)
    machine.vcpus.exit_ps[0, 0], machine.vcpus.retries[0, 0] = 10 * US, 1
    run(machine, 20 * US, flush(1 * US), flush(5 * US))
    assert machine.counters[C.kvm__remote_tlb_flush] == 0
    assert machine.counters[C.kvm__tlb_flush] == 1


def test_a_stalled_vcpu_is_outside_guest_mode_for_as_long(costs: Costs) -> None:
    machine = mapped(costs, 2)
    busy(machine)
    run(machine, 30 * US, (2 * US, OP_STALL, 0, 1, 10 * US), flush(5 * US), flush(9 * US), flush(20 * US))
    count = machine.counters
    assert count[C.exit__kick] == 2 + 2, "vCPU 0 at 5 and 9 us, both at 20"
    assert count[C.kvm__tlb_flush] == 2 + 1 + 2
    assert machine.vcpus.ledger[:, KICK].sum() == 4 * costs.vmexit_ps + 5 * costs.invept_ps
    assert machine.vcpus.ledger[:, HOST_TASK].tolist() == [0, 10 * US]


def test_an_invept_drops_everything_and_costs_a_cold_walk(costs: Costs) -> None:
    machine = mapped(costs, 1)
    touch_pages(machine, 0, [0])
    run(machine, 1 * US)
    cold = int(machine.counters[C.access__walk_refs])
    machine.vcpus.field[0, IDLE] = 0
    touch_pages(machine, 0, [1])
    run(machine, 2 * US)
    assert machine.counters[C.access__walk_refs] - cold == 2, "both leaves; the levels above are cached"
    run(machine, 3 * US, flush(3 * US))
    vcpus = machine.vcpus
    assert not (vcpus.l1_tag.any() or vcpus.stlb_tag.any() or vcpus.walk_tag.any())
    machine.counters[C.access__walk_refs] = 0
    vcpus.field[0, IDLE] = 0
    touch_pages(machine, 0, [1])
    run(machine, int(vcpus.field[0, CLOCK]) + 1 * US)
    assert machine.counters[C.access__walk_refs] == cold


def test_zap_keeps_the_frame_and_the_accessed_bit_in_software(costs: Costs) -> None:
    machine = mapped(costs, 1)
    touch_pages(machine, 0, [0, 1], STORE)
    run(machine, 2 * US, (2 * US, OP_ZAP, 0, 100, 3))
    assert machine.ept[100:103].tolist() == [
        0 << FRAME_SHIFT | WRITABLE | YOUNG,
        1 << FRAME_SHIFT | WRITABLE | YOUNG,
        2 << FRAME_SHIFT | WRITABLE,
    ]
    assert machine.counters[C.kvm__mmu_zapped] == 3
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 1, "one for the range"
    run(machine, 3 * US, (3 * US, OP_ZAP, 0, 100, 3))
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 1, "nothing was present: no flush"


def test_zap_puts_only_slow_leaves_under_prot_none(costs: Costs) -> None:
    machine = mapped(costs, 1)
    machine.ept[101] = (SLOTS // 2) << FRAME_SHIFT | PRESENT | WRITABLE
    run(machine, 1 * US, (1 * US, OP_ZAP, PROTNONE, 100, 3))
    assert ((machine.ept[100:103] & PROTNONE) != 0).tolist() == [False, True, False]
    assert machine.ept[103] & PRESENT, "outside the range"


@pytest.mark.parametrize("present", [True, False])
def test_move_carries_the_content_and_leaves_the_entry_to_the_next_fault(present: bool, costs: Costs) -> None:
    machine = mapped(costs, 1)
    stamp = int(machine.stamps[4])
    if not present:
        machine.ept[104] = (machine.ept[104] & ~PRESENT) | PROTNONE
    run(machine, 1 * US, (1 * US, OP_MOVE, 0, 104, 200))
    entry = int(machine.ept[104])
    assert (entry & FRAME_MASK) >> FRAME_SHIFT == 200
    assert not entry & (PRESENT | ACCESSED | DIRTY | PROTNONE)
    assert machine.stamps[200] == stamp
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == present


HEAD = 512
"""First gPA frame of a huge page, in slots 512.. ."""


def mapped_huge(costs: Costs) -> Machine:
    """As `mapped`, and 2 MiB of gPA on one block, where the guest's pages 512.. lie, in 4 KiB pieces of its own."""
    machine = mapped(costs, 1)
    pages = np.arange(HEAD, HEAD + TABLE_PAGES)
    machine.gpt[pages] = pages << FRAME_SHIFT | PRESENT | WRITABLE
    machine.ept[pages] = pages << FRAME_SHIFT | PRESENT | WRITABLE
    machine.stamps[pages] = machine.state[S.OWNER] | pages << STAMP_PAGE_SHIFT
    machine.tables.ept_pde[HEAD // TABLE_PAGES] = PRESENT | HUGE
    return machine


@pytest.mark.parametrize("touched", [True, False])
def test_a_zap_of_a_part_zaps_the_whole_entry_of_a_huge_page(touched: bool, costs: Costs) -> None:
    machine = mapped_huge(costs)
    if touched:
        touch_pages(machine, 0, [HEAD + 9], STORE)
    run(machine, 2 * US)
    bits = ACCESSED | DIRTY if touched else 0
    assert machine.tables.ept_pde[1] == PRESENT | HUGE | bits, "A and D are where the mapping is"
    assert not (machine.ept[HEAD : HEAD + TABLE_PAGES] & (ACCESSED | DIRTY)).any()
    run(machine, 3 * US, (3 * US, OP_ZAP, 0, HEAD + 100, 1))
    frames = np.arange(HEAD, HEAD + TABLE_PAGES) << FRAME_SHIFT | WRITABLE
    frames[0] |= YOUNG if touched else 0
    assert machine.ept[HEAD : HEAD + TABLE_PAGES].tolist() == frames.tolist()
    assert machine.tables.ept_pde[1] == PRESENT | HUGE, "it is still one page"
    assert machine.counters[C.kvm__mmu_zapped] == 1, "one entry"
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 1
    run(machine, 4 * US, (4 * US, OP_ZAP, 0, HEAD, 2 * TABLE_PAGES))
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 1, "nothing was present: no flush"


@pytest.mark.parametrize(("first", "protected"), [(HEAD, True), (0, True), (HEAD + 1, False)])
def test_a_slow_huge_page_is_protected_by_the_range_that_its_head_is_in(
    first: int, protected: bool, costs: Costs
) -> None:
    machine = mapped_huge(costs)
    machine.state[S.SLOW_FRAMES] = HEAD
    run(machine, 1 * US, (1 * US, OP_ZAP, PROTNONE, first, 2 * TABLE_PAGES - first))
    found = machine.ept[HEAD : HEAD + TABLE_PAGES] & (PRESENT | PROTNONE)
    assert set(found.tolist()) == {PROTNONE if protected else 0}


def test_a_huge_page_moves_as_one_with_one_flush(costs: Costs) -> None:
    machine = mapped_huge(costs)
    stamps = machine.stamps[HEAD : HEAD + TABLE_PAGES].copy()
    before = machine.budget.copy()
    run(machine, 1 * US, (1 * US, OP_MOVE, HUGE | PROTNONE, HEAD, 2048, 0, 10 * US))
    entries = machine.ept[HEAD : HEAD + TABLE_PAGES]
    assert entries.tolist() == ((2048 + np.arange(TABLE_PAGES)) << FRAME_SHIFT | WRITABLE | PROTNONE).tolist()
    assert np.array_equal(machine.stamps[2048 : 2048 + TABLE_PAGES], stamps)
    assert machine.tables.ept_pde[1] == PRESENT | HUGE
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 1
    assert (before - machine.budget).tolist() == [[2 << 20, 0], [0, 2 << 20]]
    # A violation anywhere in it sleeps until the copy is done.
    violation(machine, HEAD + 300)
    for gpfn in range(HEAD, HEAD + TABLE_PAGES):
        machine.ept[gpfn] = (machine.ept[gpfn] & ~PROTNONE) | PRESENT
    run(machine, 40 * US)
    assert machine.vcpus.ledger[0, EPT_REFAULT] > 10 * US
    assert machine.counters[C.integrity__mismatches] == 0


def test_scattered_pages_become_one_huge_page(costs: Costs) -> None:
    """What a collapse asks for: each is copied from where it lies, and one entry maps them all."""
    machine = mapped_huge(costs)
    machine.tables.ept_pde[1] = PRESENT | ACCESSED
    pages = np.arange(HEAD, HEAD + TABLE_PAGES)
    order = np.random.default_rng(4).permutation(pages)
    machine.ept[pages] = order << FRAME_SHIFT | PRESENT | WRITABLE
    machine.ept[HEAD + 40] |= ACCESSED
    machine.stamps[order] = machine.state[S.OWNER] | pages << STAMP_PAGE_SHIFT
    touch_pages(machine, 0, [HEAD + 7, HEAD + 300])
    run(machine, 2 * US, (2 * US, OP_MOVE, HUGE, HEAD, 1024))
    assert (machine.ept[pages] >> FRAME_SHIFT).tolist() == list(range(1024, 1536))
    assert machine.ept[HEAD] & YOUNG and not (machine.ept[pages[1:]] & YOUNG).any()
    assert machine.tables.ept_pde[1] == PRESENT | HUGE
    machine.ept[pages] |= PRESENT
    touch_pages(machine, 0, list(pages))
    machine.vcpus.field[0, IDLE] = 0
    run(machine, 200 * US)
    assert machine.counters[C.access__total] == 2 + TABLE_PAGES
    assert machine.counters[C.integrity__mismatches] == 0


def test_two_huge_pages_trade_places_with_one_flush(costs: Costs) -> None:
    machine = mapped_huge(costs)
    other = np.arange(2 * TABLE_PAGES, 3 * TABLE_PAGES)
    machine.ept[other] = (other + 1024) << FRAME_SHIFT | PRESENT | WRITABLE
    machine.stamps[other + 1024] = other
    machine.tables.ept_pde[2] = PRESENT | HUGE
    mine = machine.stamps[HEAD : HEAD + TABLE_PAGES].copy()
    run(machine, 1 * US, (1 * US, OP_SWAP, HUGE, HEAD, 2 * TABLE_PAGES))
    assert (machine.ept[HEAD : HEAD + TABLE_PAGES] >> FRAME_SHIFT).tolist() == (other + 1024).tolist()
    assert (machine.ept[other] >> FRAME_SHIFT).tolist() == list(range(HEAD, HEAD + TABLE_PAGES))
    assert np.array_equal(machine.stamps[other + 1024], mine)
    assert np.array_equal(machine.stamps[HEAD : HEAD + TABLE_PAGES], other)
    assert machine.counters[C.kvm__remote_tlb_flush_requests] == 1
    assert machine.counters[C.kvm__mmu_zapped] == 2


def violation(machine: Machine, page: int) -> None:
    """The next access of vCPU 0, to ``page``, has taken an EPT violation that the host answered with 1 us."""
    machine.vcpus.field[0, IDLE] = 0
    touch_pages(machine, 0, [page])
    machine.vcpus.exit_ps[0, 0], machine.vcpus.exit_part[0, 0], machine.vcpus.retries[0, 0] = US, EPT_REFAULT, 1


def failed_walk(machine: Machine, again: int = 0) -> int:
    """Time of the walk that met the violation, ps: as that of the one that succeeded; ``again`` more failed."""
    count = machine.counters
    assert count[C.access__walks] == 1 + count[C.access__fault_retries] == 2 + again
    assert count[C.access__walk_refs] % (2 + again) == count[C.access__walk_ps] % (2 + again) == 0
    return int(count[C.access__walk_ps]) // (2 + again)


def remap(machine: Machine, gpfn: int) -> None:
    """The host answers an EPT violation."""
    machine.ept[gpfn] |= PRESENT


@pytest.mark.parametrize(("page", "waits"), [(1, True), (9, False)])
def test_an_ept_violation_in_a_range_under_a_notifier_is_taken_again_until_it_is_through(
    page: int, waits: bool, costs: Costs
) -> None:
    """Zapping [100, 104) takes 20 us from 1 us on; the violation comes at about 1 us, too."""
    machine = mapped(costs, 1)
    machine.vcpus.field[0, IDLE] = 1
    run(machine, 1 * US, (1 * US, OP_ZAP, 0, 100, 4, 0, 20 * US))
    remap(machine, 100 + page)
    violation(machine, page)
    clock = int(machine.vcpus.field[0, CLOCK])
    run(machine, 60 * US)
    again = int(machine.counters[C.kvm__mmu_retries])
    walk = failed_walk(machine, again)
    left = 21 * US - clock - walk
    assert machine.vcpus.ledger[0, EPT_REFAULT] == (left + US if waits else US)
    assert again == machine.counters[C.exit__ept_violation] == (-(-left // (costs.ept_violation_ps + walk)) * waits)


def test_a_flush_request_waits_for_who_holds_the_mmu_lock(costs: Costs) -> None:
    """The first holds it for 10 us; the second comes 3 us later, the third, that a quantum ends, in the middle."""
    machine = mapped(costs, 1)
    busy(machine)
    held = (1 * US, OP_FLUSH, 0, 0, 0, 10 * US, 0)
    run(machine, 30 * US, held, (4 * US, OP_FLUSH, 0, 0, 0, 10 * US, 0))
    starts = [int(machine.vcpus.field[0, EXIT_START])]
    assert machine.counters[C.kvm__remote_tlb_flush] == 2
    run(machine, 35 * US, (31 * US, OP_FLUSH, 0, 0, 0, 10 * US, 0), flush(32 * US))
    starts.append(int(machine.vcpus.field[0, EXIT_START]))
    assert machine.counters[C.kvm__remote_tlb_flush] == 4
    assert abs(starts[0] - 11 * US) <= BIN_PS, "to the bin"
    assert starts[1] == 35 * US, "what was planned for a quantum is done by its end"


def test_a_harvest_holds_the_mmu_lock_while_it_clears_dirty_bits(costs: Costs) -> None:
    """At 2 us a page; a flush request that comes meanwhile waits."""
    machine = mapped(costs, 1, pml=True)
    touch_pages(machine, 0, [0, 1, 2], STORE)
    run(machine, 10 * US)
    logged = 512 - 1 - int(machine.pml.next[0])
    busy(machine)
    run(machine, 90 * US, (10 * US, OP_HARVEST, 0, 0, 2 * US), flush(11 * US))
    assert abs(machine.vcpus.field[0, EXIT_START] - (10 + 2 * logged) * US) <= BIN_PS


def test_an_ept_violation_of_a_page_under_migration_sleeps_until_the_copy_is_done(costs: Costs) -> None:
    machine = mapped(costs, 1)
    machine.vcpus.field[0, IDLE] = 1
    run(machine, 1 * US, (1 * US, OP_MOVE, 0, 101, 200, 0, 20 * US))
    remap(machine, 101)
    violation(machine, 1)
    clock = int(machine.vcpus.field[0, CLOCK])
    run(machine, 60 * US)
    clock += failed_walk(machine)
    assert machine.vcpus.ledger[0, EPT_REFAULT] == 21 * US - clock + US
    assert machine.counters[C.kvm__mmu_retries] == 0


def test_ept_violations_wait_for_who_holds_the_mmu_lock(costs: Costs) -> None:
    """A flush request at 1 us holds it for 10 us; its kick and INVEPT last about 1 us."""
    machine = mapped(costs, 1)
    machine.vcpus.field[0, IDLE] = 1
    run(machine, 1 * US, (1 * US, OP_FLUSH, 0, 0, 0, 10 * US, 0))
    violation(machine, 1)
    clock = int(machine.vcpus.field[0, CLOCK])
    run(machine, 60 * US)
    clock += failed_walk(machine)
    waited = int(machine.counters[C.kvm__mmu_lock_wait_ps])
    assert abs(waited - (11 * US - clock)) <= BIN_PS, "to the bin"
    assert machine.vcpus.ledger[0, EPT_REFAULT] == waited + US


@given(requests=st.lists(st.integers(0, 19_000), max_size=40), pcpus=st.integers(1, 3), vcpus=st.integers(2, 4))
def test_a_preempted_vcpu_flushes_once_when_it_comes_back(
    requests: list[int], pcpus: int, vcpus: int, costs: Costs
) -> None:
    """On shared pCPUs: one execution at most per entry, and every vCPU's time is the sum of its parts."""
    machine = mapped(costs, vcpus)
    machine.state[[S.PCPUS, S.FLEET_VCPUS, S.HOST_SLICE_PS]] = (pcpus if pcpus < vcpus else 0), vcpus, 3 * US
    busy(machine)
    run(machine, 20 * US, *(flush(time * PS_PER_NS) for time in requests))
    count = machine.counters
    assert count[C.kvm__remote_flush_executions] <= len(requests) * vcpus
    entries = int(count[C.exit__kick] + count[C.exit__preempted])
    assert count[C.kvm__tlb_flush] <= entries, "one flush an entry, however many requests"
    assert (machine.vcpus.ledger.sum(axis=1) == machine.vcpus.field[:, CLOCK]).all()
