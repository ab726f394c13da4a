"""The gVA space: dense pages and addresses convert both ways, VMAs lie where Linux puts them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.address_space import AddressSpace, Vma, heap_region, mmap_region, mmap_regions
from guestd.errors import GuestError
from proto.entry import MAX_PAGES

VMAS = st.lists(st.tuples(st.integers(0, 1 << 18), st.integers(1, 3000)), min_size=1, max_size=6)


@given(spans=VMAS)
def test_pages_and_addresses_convert_both_ways(spans: list[tuple[int, int]]) -> None:
    vmas: list[Vma] = []
    at = 0x10_0000
    for gap, pages in spans:
        at += gap << 12
        vmas.append(Vma(f"vma{len(vmas)}", at, pages))
        at += pages << 12
    space = AddressSpace(list(reversed(vmas)))
    seen = []
    for vma in vmas:
        gva = vma.start + np.arange(vma.pages, dtype=np.int64) * 4096
        dense = space.page_of(gva + 4095)
        assert (space.gva(dense) == gva).all()
        assert space.first_page(vma.name) == dense[0]
        assert (np.diff(dense) == 1).all(), "pages of a VMA are consecutive"
        seen += dense.tolist()
    assert len(set(seen)) == len(seen) and max(seen) < space.pages
    tables = {address >> 21 for vma in vmas for address in (vma.start + page * 4096 for page in range(vma.pages))}
    assert (space.table_gva >> 21).tolist() == sorted(tables)
    assert space.tables == len(tables)
    assert space.first_gva() == vmas[0].start


@given(seed=st.integers(0, (1 << 63) - 1))
def test_heap_and_mmap_region_lie_where_linux_puts_them(seed: int) -> None:
    heap, mapped = heap_region("heap", 100, seed), mmap_region("array", 100, seed)
    assert 0x5555_5555_4000 <= heap.start < 0x5555_5555_4000 + (1 << 40)
    assert mapped.start + (mapped.pages << 12) <= 0x7FFF_F7FF_F000
    assert mapped.start > 0x7FFF_F7FF_F000 - (1 << 40) - (101 << 12)
    assert heap.start % 4096 == mapped.start % 4096 == 0
    assert mmap_region("array", 100, seed) == mapped


@given(pages=st.lists(st.integers(1, 2000), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_mappings_lie_each_right_below_the_one_before(pages: list[int], seed: int) -> None:
    vmas = mmap_regions([(f"m{i}", count) for i, count in enumerate(pages)], seed)
    assert vmas[0] == mmap_region("m0", pages[0], seed)
    assert [vma.pages for vma in vmas] == pages
    for above, below in pairwise(vmas):
        assert below.start + (below.pages << 12) == above.start


def test_no_two_seeds_in_a_fleet_share_addresses() -> None:
    starts = {mmap_region("array", 100, seed).start for seed in range(2000)}
    assert len(starts) > 1990


def test_more_pages_than_the_index_numbers_are_refused() -> None:
    with pytest.raises(GuestError, match=str(MAX_PAGES)):
        AddressSpace([Vma("huge", 0, MAX_PAGES + 1)])
