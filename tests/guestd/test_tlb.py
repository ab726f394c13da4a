"""The TLB arrays: geometry from a profile, and working sets that fit; what they do is held against `reference_mmu`."""

import numpy as np
import pytest

from guestd import tlb as hardware
from guestd.jit import kernel
from guestd.tlb import MISS, TlbGeometry, tlb_geometry
from guestd.vcpu import Vcpus, new_vcpus, tlb_of
from proto.costs import Costs
from tests.guestd.machines import small_costs


@kernel
def access(vcpus: Vcpus, geometry: TlbGeometry, page: int, context: int) -> int:
    """Look a page up, enter it if it is not there: MISS, 0 for an L1 hit, 1 for an STLB hit."""
    tlb = tlb_of(vcpus, 0)
    found = hardware.look_up_4k(tlb, geometry, page, context)
    if found == MISS:
        hardware.fill_4k(tlb, geometry, page, context, page, 0)
        return MISS
    return found & 1


@pytest.mark.parametrize("ways", [2, 4, 8, 16, 24])
def test_a_working_set_that_fits_stays(ways: int, costs: Costs) -> None:
    """Bit-PLRU never evicts while no set has more pages than ways."""
    costs = small_costs(costs, stlb_entries=8 * ways, stlb_ways=ways, stlb_2m_ways=ways)
    vcpus, geometry = new_vcpus(1, costs, 1), tlb_geometry(costs)
    assert [access(vcpus, geometry, page, 0) for page in range(8 * ways)] == [MISS] * (8 * ways)
    for _ in range(3):
        assert all(access(vcpus, geometry, page, 0) != MISS for page in range(8 * ways))
    assert [access(vcpus, geometry, 8 * ways - 1, 0) for _ in range(2)] == [0, 0], "the last one is in the L1"


def test_a_context_hits_its_own_entries_only(costs: Costs) -> None:
    vcpus, geometry = new_vcpus(1, costs, 1), tlb_geometry(costs)
    assert [access(vcpus, geometry, 7, context) for context in (0, 1, 0, 15, 1)] == [MISS, MISS, 0, MISS, 0]


def test_geometry_pads_ways_to_lanes(costs: Costs) -> None:
    geometry = tlb_geometry(small_costs(costs, l1_dtlb_4k_entries=72, l1_dtlb_4k_ways=9, stlb_entries=3072,
                                        stlb_ways=24, stlb_2m_ways=8))  # fmt: skip
    assert (geometry.l1_mask, geometry.l1_stride, geometry.l1_ways) == (7, 12, (1 << 9) - 1)
    assert (geometry.stlb_mask, geometry.stlb_stride) == (127, 24)
    assert (geometry.stlb_ways, geometry.stlb_ways_2m) == ((1 << 24) - 1, 255)


@kernel
def fill_2m(vcpus: Vcpus, geometry: TlbGeometry, table: int) -> None:
    hardware.fill_2m(tlb_of(vcpus, 0), geometry, table, 0, 512 * table, 0)


def test_2m_entries_take_no_more_than_their_ways_of_the_stlb(costs: Costs) -> None:
    costs = small_costs(costs, stlb_entries=16, stlb_ways=16, stlb_2m_ways=4)
    vcpus, geometry = new_vcpus(1, costs, 1), tlb_geometry(costs)
    for page in range(16):
        access(vcpus, geometry, page, 0)
    before = vcpus.stlb_tag[0].copy()
    for table in range(20):
        fill_2m(vcpus, geometry, table)
    assert (vcpus.stlb_tag[0, 4:] == before[4:]).all()
    assert not np.intersect1d(vcpus.stlb_tag[0, :4], before).size
