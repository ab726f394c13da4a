"""The scan of a guest's list against the same in plain Python, page by page."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import private_memory
from guestd.tiering.registry import policies
from hostd.vm import Vm
from proto.costs import Costs
from proto.entry import ACCESSED, DIRTY, HUGE, PRESENT, YOUNG
from tests.small_fleet import small_guest

PAGES = 1024
SPACE = 2 * PAGES

RANGES = st.lists(st.integers(0, SPACE), min_size=2, max_size=12, unique=True).map(
    lambda cuts: [(first, end - first) for first, end in zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)]
)
YOUNGS = st.lists(st.tuples(st.integers(0, SPACE - 1), st.sampled_from([ACCESSED, YOUNG])), max_size=40)


@given(ranges=RANGES, youngs=YOUNGS, huge=st.sets(st.integers(0, SPACE // 512 - 1)))
def test_each_listed_page_has_its_bit_and_no_other_is_touched(
    costs: Costs, ranges: list[tuple[int, int]], youngs: list[tuple[int, int]], huge: set[int]
) -> None:
    config = small_guest(costs, pages=PAGES, fast=200)
    memory = private_memory(config)
    view = Vm(config, policies()["none"], memory).view
    memory.ept[:] = DIRTY
    memory.ept_pde[:] = PRESENT
    memory.ept_pde[sorted(huge)] = PRESENT | HUGE
    expected, mapped = [False] * SPACE, [False] * SPACE
    for page, bit in youngs:
        table = page // 512
        if table in huge:
            # A huge page's A is in its one entry; that it was young before a zap is in its first leaf.
            if bit == ACCESSED:
                memory.ept_pde[table] |= ACCESSED
            else:
                memory.ept[512 * table] |= YOUNG
            expected[512 * table : 512 * table + 512] = [True] * 512
            if bit == ACCESSED:
                mapped[512 * table : 512 * table + 512] = [True] * 512
        else:
            memory.ept[page] |= bit
            expected[page] = True
            mapped[page] |= bit == ACCESSED
    listed = [page for first, count in ranges for page in range(first, first + count)]
    units = {page // 512 if page // 512 in huge else (page,) for page in listed}
    before = view.now
    bits = np.unpackbits(view.scan_list(np.array(ranges, np.int64)), bitorder="little")
    assert bits[: len(listed)].tolist() == [expected[page] for page in listed]
    assert not bits[len(listed) :].any()
    found = any(mapped[page] for page in listed)
    request = costs.kick_base_ps + costs.kick_target_ps * config.vcpus
    assert view.now - before == len(units) * costs.scan_pte_ps + request * found
    assert len(view.operations) == found, "one flush for all"
    for page in range(SPACE):
        seen = page in listed or page // 512 in {listed_page // 512 for listed_page in listed} & huge
        if page // 512 not in huge:
            assert bool(memory.ept[page] & (ACCESSED | YOUNG)) == (expected[page] and not seen)
            assert memory.ept[page] & DIRTY
