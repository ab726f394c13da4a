"""Scans that walk the tree: on random trees against plain Python that recurses, in the guest's form and the host's."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.address_space import AddressSpace, Vma
from guestd.meter import Meter
from guestd.tiering.radix import Radix, ept_radix, radix_of, scan_dirty, scan_young
from proto.arrays import Bytes, Ints, Words
from proto.entry import ACCESSED, DIRTY, HUGE, PRESENT, YOUNG
from proto.units import TABLE_PAGES

GIB = 1 << 30
SPACES = {
    "one table": [Vma("heap", 5 * GIB, 512)],
    "neighbours": [Vma("heap", 5 * GIB, 3 * 512)],
    "over a GiB": [Vma("heap", 6 * GIB - (2 << 21), 4 * 512), Vma("far", 700 * GIB, 2 * 512)],
    "everywhere": [Vma(str(i), start, 512) for i, start in
                   enumerate((GIB, GIB + (4 << 21), 3 * GIB, 600 * GIB, 100_000 * GIB, 120_000 * GIB))],
}  # fmt: skip


class Tree:
    """A page table above its leaves, with the leaves; ``bits`` are drawn."""

    def __init__(self, upper: Words | Bytes, parent: Ints, tables: int, shape: Radix, bits: list[int]) -> None:
        self.parent, self.tables, self.shape, self.upper = parent, tables, shape, upper
        random = np.random.default_rng(bits[0])
        self.leaf = random.choice([0, PRESENT, PRESENT | ACCESSED, PRESENT | DIRTY, YOUNG], tables * TABLE_PAGES)
        for number in range(upper.size):
            upper[number] = bits[number % len(bits)] & (~HUGE if number >= tables else -1) & 0xFF
        for table in range(tables):
            if upper[table] & HUGE:
                self.leaf[table * TABLE_PAGES : (table + 1) * TABLE_PAGES] &= PRESENT
            elif upper[table] == 0:
                self.leaf[table * TABLE_PAGES : (table + 1) * TABLE_PAGES] = 0

    def children(self, number: int) -> list[int]:
        return [child for child in range(self.parent.size - 1) if self.parent[child] == number]

    def span(self, number: int) -> tuple[int, int]:
        """First page below an entry, and the one after the last."""
        if number < self.tables:
            return number * TABLE_PAGES, (number + 1) * TABLE_PAGES
        spans = [self.span(child) for child in self.children(number)]
        return spans[0][0], spans[-1][1]

    def scan(self, number: int, first: int, end: int, found: list[int]) -> int:
        """What `scan_young` does below an entry; entries visited."""
        seen = 0
        for child in self.children(number):
            low, high = self.span(child)
            if high <= first or low >= end:
                continue
            seen += 1
            entry = int(self.upper[child])
            whole = first <= low and high <= end
            if entry & HUGE:
                if first <= low and (entry & ACCESSED or self.leaf[low] & YOUNG):
                    found.append(low)
                if first <= low:
                    self.upper[child] = entry & ~ACCESSED
                    self.leaf[low] &= ~YOUNG
                continue
            if not entry & ACCESSED:
                continue
            if child < self.tables:
                for page in range(max(first, low), min(end, high)):
                    seen += 1
                    if self.leaf[page] & (ACCESSED | YOUNG):
                        found.append(page)
                        self.leaf[page] &= ~(ACCESSED | YOUNG)
            else:
                seen += self.scan(child, first, end, found)
            if whole:
                self.upper[child] = entry & ~ACCESSED
        return seen


def guest_tree(name: str, levels: int, bits: list[int]) -> Tree:
    upper, parent = AddressSpace(SPACES[name]).upper_entries(levels)
    tables = AddressSpace(SPACES[name]).tables
    return Tree(upper, parent, tables, radix_of(upper, parent, tables), bits)


def ept_tree(tables: int, bits: list[int]) -> Tree:
    above = -(-tables // TABLE_PAGES)
    upper = np.zeros(tables + above, np.uint8)
    root = upper.size
    parent = [tables + table // TABLE_PAGES for table in range(tables)] + [root] * (above + 1)
    return Tree(upper, np.array(parent, np.int32), tables, ept_radix(upper, tables), bits)


entries = st.sampled_from([0, PRESENT, PRESENT | ACCESSED, PRESENT | HUGE, PRESENT | HUGE | ACCESSED,
                           PRESENT | HUGE | DIRTY, PRESENT | ACCESSED | DIRTY])  # fmt: skip
drawn = st.lists(entries, min_size=1, max_size=12)
shares = st.tuples(st.floats(0, 1), st.floats(0, 1))


def check(make: Callable[[list[int]], Tree], bits: list[int], share: tuple[float, float]) -> None:
    tree, twin = make(bits), make(bits)
    pages = tree.leaf.size
    first, end = sorted(int(part * pages) for part in share)
    out = np.empty(end - first, np.int64)
    found, seen = scan_young(Meter().book, tree.leaf, tree.shape, first, end - first, out)
    expected: list[int] = []
    assert seen == twin.scan(twin.parent.size - 1, first, end, expected)
    assert out[:found].tolist() == expected
    assert np.array_equal(tree.leaf, twin.leaf)
    assert np.array_equal(tree.upper[:-1], twin.upper[:-1])
    again, _ = scan_young(Meter().book, tree.leaf, tree.shape, first, end - first, out)
    assert again == 0, "what was young is not young any more"


@given(bits=drawn, share=shares)
@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("name", SPACES)
def test_a_guest_s_tree_is_walked_where_it_was_accessed(
    name: str, levels: int, bits: list[int], share: tuple[float, float]
) -> None:
    check(lambda drawn: guest_tree(name, levels, drawn), bits, share)


@given(tables=st.sampled_from([1, 3, 513]), bits=drawn, share=shares)
def test_an_ept_is_walked_where_it_was_accessed(tables: int, bits: list[int], share: tuple[float, float]) -> None:
    check(lambda drawn: ept_tree(tables, drawn), bits, share)


@given(bits=drawn, share=shares)
def test_dirty_pages_are_found_in_every_table_that_there_is(bits: list[int], share: tuple[float, float]) -> None:
    tree = ept_tree(6, bits)
    before, above = tree.leaf.copy(), tree.upper.copy()
    first, end = sorted(int(part * tree.leaf.size) for part in share)
    out = np.empty(end - first, np.int64)
    found, seen = scan_dirty(Meter().book, tree.leaf, tree.upper, first, end - first, out)
    expected, visited = [], 0
    for table in range(first // TABLE_PAGES, -(-end // TABLE_PAGES)):
        low, high = max(first, table * TABLE_PAGES), min(end, (table + 1) * TABLE_PAGES)
        visited += 1
        if above[table] & HUGE:
            expected += [low] if above[table] & DIRTY and low == table * TABLE_PAGES and first <= low < end else []
        elif above[table]:
            visited += high - low
            expected += [page for page in range(low, high) if before[page] & DIRTY]
    assert (out[:found].tolist(), seen) == (expected, visited)
    assert scan_dirty(Meter().book, tree.leaf, tree.upper, first, end - first, out)[0] == 0


def test_an_idle_or_absent_gibibyte_costs_one_look() -> None:
    tree = ept_tree(3 * TABLE_PAGES, [PRESENT | ACCESSED])
    tree.upper[tree.tables :] = [PRESENT, 0, PRESENT | ACCESSED]
    tree.upper[2 * TABLE_PAGES : tree.tables] = 0
    tree.upper[2 * TABLE_PAGES + 7] = PRESENT | ACCESSED
    out = np.empty(tree.leaf.size, np.int64)
    _, seen = scan_young(Meter().book, tree.leaf, tree.shape, 0, tree.leaf.size, out)
    assert seen == 3 + TABLE_PAGES + TABLE_PAGES
