"""Translation caches against a list-and-set model: what is found, what is replaced, what a shootdown drops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd import tlb as hardware
from guestd.jit import kernel
from guestd.tlb import TLB_TAG_SHIFT, WALK_WAYS, drop_page
from proto.arrays import Words
from tests.guestd.reference import Cache


@kernel
def lookup_or_insert(tags: Words, recent: Words, key: int) -> bool:
    return hardware.lookup_or_insert(tags, recent, key)


@given(keys=st.lists(st.integers(0, 40), max_size=300), sets=st.sampled_from((1, 2, 8)))
def test_small_caches_hit_and_replace_as_the_model(keys: list[int], sets: int) -> None:
    tags, recent = np.zeros(sets * WALK_WAYS, np.int64), np.zeros(sets, np.int64)
    model: Cache[None] = Cache(sets * WALK_WAYS, WALK_WAYS)
    for key in keys:
        expected = key in model
        if not expected:
            model.put(key, None)
        model.use(key)
        assert lookup_or_insert(tags, recent, key) == expected
        assert [int(tag) - 1 for tag in tags if tag] == model.keys()


@pytest.mark.parametrize("ways", [2, 4, 16])
def test_a_working_set_that_fits_stays(ways: int) -> None:
    """Bit-PLRU never evicts while no set has more keys than ways."""
    sets = 8
    model: Cache[None] = Cache(sets * ways, ways)
    for key in list(range(sets * ways)) * 3:
        if key not in model:
            model.put(key, None)
        model.use(key)
    assert sorted(model.keys()) == list(range(sets * ways))


def test_drop_page_drops_it_on_every_vcpu_that_holds_it_and_nothing_else() -> None:
    sets, ways = 4, 4
    tlb = np.zeros((3, sets * ways), np.int64)
    for vcpu, page in ((0, 5), (2, 5), (1, 9), (2, 9)):
        way = (page & (sets - 1)) * ways + (page >> 2) % ways
        tlb[vcpu, way] = (page + 1) << TLB_TAG_SHIFT
    assert drop_page(tlb, sets, ways, 5) == 2
    assert sorted((tlb >> TLB_TAG_SHIFT)[tlb != 0].tolist()) == [10, 10]
    assert drop_page(tlb, sets, ways, 5) == 0
