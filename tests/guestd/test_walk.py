"""The two-dimensional walk: how many references, against the counts that the literature and the SDM give."""

import numpy as np
import pytest

from guestd import walk as mmu
from guestd.jit import kernel
from guestd.vcpu import FIELDS
from guestd.walk import PRICE_EPT_LEAF, PRICE_GUEST_LEAF_FAST, PRICE_GUEST_LEAF_SLOW, PRICE_UPPER, REFS_SHIFT
from proto.arrays import Words

PRICE = np.zeros(4, np.int64)
PRICE[[PRICE_UPPER, PRICE_GUEST_LEAF_FAST, PRICE_GUEST_LEAF_SLOW, PRICE_EPT_LEAF]] = (1, 100, 1000, 10_000)


@kernel
def walk(pde: Words, pde_recent: Words, nested: Words, nested_recent: Words, ept_pde: Words, ept_pde_recent: Words,
         field: Words, table: int, table_gpfn: int, table_slow: int, gpfn: int, price: Words) -> int:  # fmt: skip
    return mmu.walk(pde, pde_recent, nested, nested_recent, ept_pde, ept_pde_recent, field, table, table_gpfn,
                    table_slow, gpfn, price)  # fmt: skip


class Mmu:
    """The walk caches of one vCPU."""

    def __init__(self) -> None:
        self.caches = [np.zeros(size, np.int64) for size in (32, 8, 64, 16, 32, 8)]
        self.field = np.zeros(FIELDS, np.int64)

    def walk(self, table: int, gpfn: int, table_gpfn: int = 1 << 20, slow: int = 0) -> tuple[int, int]:
        """(references, cost)"""
        a, b, c, d, e, f = self.caches
        walked = int(walk(a, b, c, d, e, f, self.field, table, table_gpfn, slow, gpfn, PRICE))
        return walked >> REFS_SHIFT, walked & ((1 << REFS_SHIFT) - 1)


@pytest.mark.parametrize(("slow", "leaf"), [(0, 100), (1, 1000)])
def test_a_warm_walk_reads_both_leaves(slow: int, leaf: int) -> None:
    vcpu = Mmu()
    vcpu.walk(3, 5000, slow=slow)
    assert vcpu.walk(3, 5000, slow=slow) == (2, leaf + 10_000)
    assert vcpu.walk(3, 5001, slow=slow) == (2, leaf + 10_000), "the same 2 MiB of gPA"


def test_a_cold_walk_reads_24_but_for_what_it_caches_on_its_way() -> None:
    """4 x 4 levels: 24 (Bhargava et al.); the leaf table's EPT levels (3) and the data's top two are cached by then."""
    assert Mmu().walk(0, 5000)[0] == 24 - 3 - 2


def test_each_cache_saves_its_own_references() -> None:
    vcpu = Mmu()
    vcpu.walk(0, 5000)
    assert vcpu.walk(0, 5000 + 512)[0] == 3, "another 2 MiB of gPA: one EPT level more"
    assert vcpu.walk(1, 5000)[0] == 4, "another leaf table in the same GiB: one guest level, its own translation"
    assert vcpu.walk(1, 5000)[0] == 2


def test_costs_are_the_references_priced() -> None:
    vcpu = Mmu()
    refs, cost = vcpu.walk(0, 5000)
    leaves = 1 + 2  # the guest's leaf; the EPT leaves of the leaf table and of the data
    assert cost == (refs - leaves) * 1 + 2 * 10_000 + 100
