"""What a view reads in its page table, on random tables against plain Python, page by page."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.meter import Meter
from guestd.mm.nodes import NO_PAGE
from guestd.tiering import pages as ptes
from guestd.tiering.pages import MAPPED, expand, frame_of
from proto.entry import ACCESSED, DIRTY, PRESENT, PROTNONE, YOUNG
from proto.units import TABLE_PAGES
from tests.guestd.tiering.tables import HALF, PAGES, Table, ranges, tables

named = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=40).map(lambda pages: np.array(pages, np.int64))


def head(table: Table, page: int) -> int:
    return page // TABLE_PAGES * TABLE_PAGES if table.huge(page) else page


def visited(table: Table, first: int, end: int) -> int:
    """Entries that a walk of [first, end) looks at: each table's, and the leaves of those that are there."""
    seen = 0
    for number, kind in enumerate(table.kinds):
        low, high = max(first, number * TABLE_PAGES), min(end, (number + 1) * TABLE_PAGES)
        if low < high:
            seen += 1 + (high - low if kind == 1 else 0)
    return seen


@given(table=tables, span=ranges, node=st.integers(0, 1), limit=st.integers(0, PAGES))
def test_units_of_a_node_are_found_in_order_until_there_are_enough(
    table: Table, span: tuple[int, int], node: int, limit: int
) -> None:
    first, count = span
    out = np.full(min(limit, count), -1, np.int64)
    found, seen = ptes.on_node(Meter().book, table.leaf, table.pde, HALF, first, count, node, limit, out)
    expected: list[int] = []
    covered, stopped = 0, None
    for page in range(first, first + count):
        if head(table, page) != page or not table.leaf[page] & MAPPED or (frame_of(table.leaf[page]) >= HALF) != node:
            continue
        if covered >= limit:
            stopped = page
            break
        expected.append(page)
        covered += TABLE_PAGES if table.huge(page) else 1
    assert out[:found].tolist() == expected
    if stopped is None:
        assert seen == visited(table, first, first + count)
    else:
        own = 1 if table.huge(stopped) or stopped % TABLE_PAGES == 0 or stopped == first else 0
        assert seen == visited(table, first, stopped) + own


@given(table=tables, span=ranges)
def test_mapped_pages_are_counted_and_absent_tables_passed_over(table: Table, span: tuple[int, int]) -> None:
    first, count = span
    mapped, seen = ptes.count_mapped(Meter().book, table.leaf, table.pde, first, count)
    assert mapped == np.count_nonzero(table.leaf[first : first + count] & MAPPED)
    assert seen == visited(table, first, first + count)


@given(table=tables, pages=named)
def test_a_unit_is_known_by_its_first_page_and_frame(table: Table, pages: np.ndarray) -> None:
    book, n = Meter().book, pages.size
    heads, sizes, frames = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int32)
    ptes.heads(book, table.pde, pages, heads)
    ptes.sizes(book, table.pde, pages, sizes)
    ptes.frames(book, table.leaf, table.pde, pages, frames)
    for i, page in enumerate(pages):
        first = head(table, int(page))
        entry = int(table.leaf[first])
        assert heads[i] == first
        assert sizes[i] == (TABLE_PAGES if table.huge(int(page)) else 1)
        assert frames[i] == (frame_of(entry) if entry & MAPPED else NO_PAGE)


@given(table=tables, pages=named)
def test_accessed_and_dirty_bits_are_where_the_mapping_is(table: Table, pages: np.ndarray) -> None:
    book, before = Meter().book, table.copy()
    tested, young, dirty = (np.empty(pages.size, np.bool_) for _ in range(3))
    ptes.test_young(book, table.leaf, table.pde, pages, tested)
    assert np.array_equal(table.leaf, before.leaf) and np.array_equal(table.pde, before.pde)
    mapped = ptes.clear_young(book, table.leaf, table.pde, pages, young)
    ptes.clear_dirty(book, table.leaf, table.pde, pages, dirty)
    cleared: set[int] = set()
    expected = 0
    for i, page in enumerate(map(int, pages)):
        first = head(table, page)
        leaf = int(before.leaf[first])
        entry = int(before.pde[page // TABLE_PAGES]) | (leaf & YOUNG) if table.huge(page) else leaf
        assert tested[i] == bool(entry & (ACCESSED | YOUNG))
        assert young[i] == (tested[i] and first not in cleared)
        assert dirty[i] == (bool(entry & DIRTY) and first not in cleared)
        expected += bool(entry & ACCESSED) and first not in cleared
        cleared.add(first)
    assert mapped == expected
    ptes.test_young(book, table.leaf, table.pde, pages, tested)
    assert not tested.any()
    # Nothing else changed.
    for page in range(PAGES):
        if head(table, page) not in cleared:
            assert table.leaf[page] == before.leaf[page]
    for number in range(len(table.kinds)):
        changed = int(table.pde[number]) ^ int(before.pde[number])
        assert changed == 0 or (number * TABLE_PAGES in cleared and not changed & ~(ACCESSED | DIRTY))


@given(table=tables, pages=named)
def test_taking_protection_off_makes_whole_units_accessible(table: Table, pages: np.ndarray) -> None:
    before = table.copy()
    ptes.unprotect(Meter().book, table.leaf, table.pde, pages)
    touched = {head(table, int(page)) for page in pages}
    for page in range(PAGES):
        if head(table, page) in touched:
            assert table.leaf[page] == (int(before.leaf[page]) & ~PROTNONE) | PRESENT
        else:
            assert table.leaf[page] == before.leaf[page]


@given(units=st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from([1, 512])), max_size=8))
def test_units_are_spelled_out_in_order(units: list[tuple[int, int]]) -> None:
    firsts, sizes = (np.array(column, np.int64) for column in zip(*units, strict=True)) if units else ([], [])
    expected = [first + i for first, size in units for i in range(size)]
    assert expand(np.array(firsts, np.int64), np.array(sizes, np.int64)).tolist() == expected
