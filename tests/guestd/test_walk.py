"""The two-dimensional walk: how many references, against the counts that the literature and the SDM give."""

import msgspec
import numpy as np
import pytest

from guestd import walk as mmu
from guestd.jit import kernel
from guestd.machine import Machine, S
from guestd.walk import COST_MASK, PRICE_EPT, PRICE_GUEST, PRICES, REFS_SHIFT, UNBACKED, price_walks
from proto.costs import Costs
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT, TABLE_SLOW, WRITABLE
from tests.guestd.machines import SLOTS, VMAS, bare_machine

CACHES = ("pde_cache_entries", "pdpte_cache_entries", "pml4e_cache_entries", "nested_tlb_entries",
          "ept_pde_cache_entries", "ept_pdpte_cache_entries", "ept_pml4e_cache_entries")  # fmt: skip
NAMES = [vma.name for vma in sorted(VMAS, key=lambda vma: vma.start)]


@kernel
def _walk(m: Machine, table: int, gpfn: int) -> int:
    vcpus = m.vcpus
    return mmu.walk(vcpus.walk_tag[0], m.walk_geometry, m.tables, vcpus.chain[0], m.ept, table,
                    gpfn, 0, 0, m.state[S.SLOW_FRAMES], m.state[S.EPT_EPOCH], m.price, m.pml, 0,
                    m.counters)  # fmt: skip


def walk(machine: Machine, name: str, gpfn: int) -> tuple[int, int]:
    """(references, cost) of a walk to the leaf table of that VMA, whose data lie in ``gpfn``."""
    walked = int(_walk(machine, NAMES.index(name), gpfn))
    assert walked != UNBACKED
    return walked >> REFS_SHIFT, walked & COST_MASK


def without_caches(costs: Costs) -> Costs:
    """No paging-structure cache, no nested TLB."""
    return msgspec.structs.replace(costs, **dict.fromkeys(CACHES, 0))


@pytest.mark.parametrize(
    ("levels", "guest_huge", "ept_huge", "references"),
    [((4, 4), False, False, 24), ((4, 4), True, False, 19), ((4, 4), False, True, 19), ((4, 4), True, True, 15),
     ((5, 5), False, False, 35), ((5, 4), False, False, 29), ((4, 5), False, False, 29)],
)  # fmt: skip
def test_without_caches_a_walk_has_the_references_of_the_literature(
    levels: tuple[int, int], guest_huge: bool, ept_huge: bool, references: int, costs: Costs
) -> None:
    """(n + 1)(m + 1) - 1 (Bhargava et al., ASPLOS'08), however often the same page is walked to."""
    machine = bare_machine(without_caches(costs), 1, 1, None, *levels)
    if guest_huge:
        machine.tables.upper[0] |= HUGE
    if ept_huge:
        machine.tables.ept_pde[:] = HUGE
    assert [walk(machine, "heap", 5000)[0] for _ in range(3)] == [references] * 3


def test_a_warm_walk_reads_both_leaves(costs: Costs) -> None:
    machine = bare_machine(costs, 1)
    walk(machine, "heap", 5000)
    price = machine.price
    fast = int(price[PRICE_GUEST + 2] + price[PRICE_EPT + 1])
    assert walk(machine, "heap", 5000) == (2, fast), "the leaf table of number 0 lies in a fast slot"
    assert walk(machine, "heap", 5001) == (2, fast), "the same 2 MiB of gPA"
    walk(machine, "next", 5000)
    slow = int(price[PRICE_GUEST + 3] + price[PRICE_EPT + 1])
    assert walk(machine, "next", 5000) == (2, slow), "that of number 1 in a slow one"


def test_each_cache_saves_its_own_references(costs: Costs) -> None:
    machine = bare_machine(costs, 1)
    walk(machine, "heap", 200)
    assert walk(machine, "heap", 200 + 512)[0] == 3, "another 2 MiB of gPA: one EPT level more"
    table = int(machine.tables.upper[NAMES.index("next")] & FRAME_MASK) >> FRAME_SHIFT
    assert table >> 9 == int(machine.tables.upper[0] & FRAME_MASK) >> FRAME_SHIFT >> 9
    assert walk(machine, "next", 200)[0] == 2 + 1 + 1, "same GiB, table in a known 2 MiB: PDE and the table's EPT leaf"
    assert walk(machine, "next", 200)[0] == 2
    machine.vcpus.walk_tag[0, : machine.walk_geometry.guest_slots] = 0
    assert walk(machine, "heap", 200)[0] == 4 + 1, "MOV CR3: all guest levels, but all tables are in the nested TLB"
    machine.vcpus.walk_tag[0, machine.walk_geometry.guest_slots :] = 0
    assert walk(machine, "heap", 200)[0] == 1 + 4, "guest-physical mappings gone: the data's whole EPT walk"


def test_a_walk_sets_the_bits_that_it_reads(costs: Costs) -> None:
    machine = bare_machine(costs, 1)
    upper, ept = machine.tables.upper, machine.ept
    walk(machine, "heap", 5000)
    way = [0]
    while machine.tables.parent[way[-1]] != way[-1]:
        way.append(int(machine.tables.parent[way[-1]]))
    assert ((upper[way[:-1]] & ACCESSED) != 0).all(), "PDE, PDPTE and PML4E were read; CR3 is a register"
    others = np.setdiff1d(np.arange(upper.size), way)
    assert not (upper[others] & ACCESSED).any()
    tables = (upper[way] & FRAME_MASK) >> FRAME_SHIFT
    assert ((ept[tables] & (ACCESSED | DIRTY)) == ACCESSED | DIRTY).all(), "an access to a guest table is a write"
    slow = ((ept[tables] & FRAME_MASK) >> FRAME_SHIFT) >= SLOTS // 2
    assert ((upper[way] & TABLE_SLOW) != 0).tolist() == slow.tolist()
    assert machine.tables.ept_pde[5000 >> 9] == ACCESSED


def test_a_table_that_the_ept_does_not_map_is_named_and_nothing_of_it_is_cached(costs: Costs) -> None:
    machine = bare_machine(costs, 1)
    table = int(machine.tables.upper[0] & FRAME_MASK) >> FRAME_SHIFT
    machine.ept[table] &= ~PRESENT
    assert int(_walk(machine, 0, 5000)) == UNBACKED
    assert machine.vcpus.chain[0, 5] == table
    assert not machine.vcpus.walk_tag[0, : machine.walk_geometry.guest_slots].any()
    machine.ept[table] |= PRESENT | WRITABLE
    assert walk(machine, "heap", 5000)[0] > 2


LATENCY = np.array([[70_000, 70_000], [300_000, 170_000]], np.int64)


def test_prices_follow_the_place_of_the_line(costs: Costs) -> None:
    """Hottest first: upper levels, then leaves, fill first L2 and then the LLC share; memory has the rest."""
    costs = msgspec.structs.replace(costs, l2_bytes=1 << 20, walk_cached_ref_ps=5_000, llc_latency_ps=25_000)
    price = np.zeros(PRICES, np.int64)
    assert price_walks(price, costs, 1 << 10, 1 << 22, LATENCY) == 1 << 22, "16 KiB of entries fit the L2"
    assert (price[2:12] == 5_000).all()
    assert (price[PRICE_EPT + 1 :] == 5_000).all()

    pages = 1 << 20
    entries = 16 * pages
    upper = entries // 512 + entries // 512**2 + 2 * 16
    in_l2 = (1 << 20) - upper
    assert price_walks(price, costs, pages, 8 << 20, LATENCY) == 0, "16 MiB of leaf entries leave nothing for data"
    in_memory = entries - in_l2 - (8 << 20)
    for slow in (0, 1):
        leaf = (in_l2 * 5_000 + (8 << 20) * 25_000 + in_memory * int(LATENCY[slow, 0])) // entries
        assert price[PRICE_GUEST + 2 + slow] == leaf
    assert price[PRICE_EPT + 1] == price[PRICE_GUEST + 2], "the EPT lies in fast memory"
    assert (price[4:12] == 5_000).all(), "upper levels stay in the L2"
    assert price_walks(price, costs, pages, 64 << 20, LATENCY) == (64 << 20) - (entries - in_l2)
