"""State of vCPUs at power-on, and which invalidation drops what (SDM vol. 3, 4.10.4 and 29.4.3)."""

import numpy as np
import pytest

from guestd.jit import kernel
from guestd.tlb import TLB_TAG_SHIFT
from guestd.vcpu import (
    EPT_UPPER,
    GUEST_UPPER,
    LAST_BLOCK,
    RANDOM,
    TAG_LEFT,
    Vcpus,
    drop_all,
    drop_guest_everywhere,
    drop_pages_everywhere,
    new_vcpus,
)
from proto.costs import Costs

FULL = ("tlb", "pde", "nested", "ept_pde")


@kernel
def invept(vcpus: Vcpus, vcpu: int) -> None:
    drop_all(vcpus, vcpu)


@pytest.fixture
def warm(costs: Costs) -> Vcpus:
    """Two vCPUs whose every cache is full; the TLB holds page i in its set's way i / sets."""
    vcpus = new_vcpus(2, costs, 1)
    sets = costs.stlb_entries // costs.stlb_ways
    for vcpu in range(2):
        for page in range(costs.stlb_entries):
            vcpus.tlb[vcpu, page % sets * costs.stlb_ways + page // sets] = (page + 1) << TLB_TAG_SHIFT
    for name in FULL[1:]:
        getattr(vcpus, name)[:] = 7
    vcpus.field[:, [GUEST_UPPER, EPT_UPPER]] = 1
    return vcpus


def filled(vcpus: Vcpus, vcpu: int) -> dict[str, int]:
    """Entries in use, by cache."""
    return {name: int(np.count_nonzero(getattr(vcpus, name)[vcpu])) for name in FULL}


def test_power_on_is_empty_and_every_vcpu_tags_on_its_own(costs: Costs) -> None:
    vcpus = new_vcpus(4, costs, 9)
    assert not any(getattr(vcpus, name).any() for name in FULL)
    assert (vcpus.field[:, LAST_BLOCK] == -1).all()
    span = 2 * costs.load_latency_tag_interval - 1
    assert ((vcpus.field[:, TAG_LEFT] >= 1) & (vcpus.field[:, TAG_LEFT] <= span)).all()
    assert np.unique(vcpus.field[:, RANDOM]).size == 4
    assert (new_vcpus(4, costs, 9).field == vcpus.field).all()
    assert (new_vcpus(4, costs, 10).field[:, RANDOM] != vcpus.field[:, RANDOM]).all()


def test_mov_cr3_drops_linear_mappings_and_leaves_guest_physical_ones(warm: Vcpus) -> None:
    before = filled(warm, 0)
    drop_guest_everywhere(warm)
    for vcpu in range(2):
        assert filled(warm, vcpu) == before | {"tlb": 0, "pde": 0}
        assert warm.field[vcpu, [GUEST_UPPER, EPT_UPPER]].tolist() == [0, 1]


def test_invlpg_drops_its_page_and_all_paging_structures(warm: Vcpus, costs: Costs) -> None:
    pages = np.array([3, 200, costs.stlb_entries + 5, 3], np.int64)
    before = filled(warm, 0)
    drop_pages_everywhere(warm, pages)
    for vcpu in range(2):
        assert filled(warm, vcpu) == before | {"tlb": costs.stlb_entries - 2, "pde": 0}
        assert not np.isin([4, 201], warm.tlb[vcpu] >> TLB_TAG_SHIFT).any()
        assert warm.field[vcpu, [GUEST_UPPER, EPT_UPPER]].tolist() == [0, 1]


def test_invept_drops_everything_of_one_vcpu(warm: Vcpus) -> None:
    before = filled(warm, 1)
    invept(warm, 0)
    assert filled(warm, 0) == dict.fromkeys(FULL, 0)
    assert filled(warm, 1) == before
    assert warm.field[:, [GUEST_UPPER, EPT_UPPER]].tolist() == [[0, 0], [1, 1]]
