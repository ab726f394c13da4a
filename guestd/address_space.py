"""A guest's virtual address space: VMAs at real addresses, and the dense page index under which tables are kept.

The GPT of a sparse 47-bit space is kept as the list of its leaf tables (2 MiB of gVA each, as one page-table page
maps), in order of address; a page's dense index is ``leaf table * 512 + offset``. Generators emit dense byte addresses
(dense page << 12 | offset); `gva` and `page_of` convert. Placement follows Linux on x86-64: heap upwards from a
randomised start_brk, mmap region downwards from a randomised mmap_base (arch/x86/mm/mmap.c).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.errors import GuestError
from proto.arrays import Bytes, Ints, Words
from proto.entry import MAX_PAGES
from proto.units import PAGE_SHIFT, TABLE_PAGES, TABLE_SHIFT

_HEAP_BASE = 0x5555_5555_4000
_MMAP_TOP = 0x7FFF_F7FF_F000
_RANDOM_PAGES = 1 << 28
"""Randomisation span of heap and mmap base, in pages (28 bits, as mmap_rnd_bits)."""


class Vma(NamedTuple):
    """A mapped range: name, gVA of its first page, length in pages."""

    name: str
    start: int
    pages: int

    @property
    def heap(self) -> bool:
        """It lies where Linux puts heaps, far below all that is mapped."""
        return self.start < _MMAP_TOP - 2 * (_RANDOM_PAGES << PAGE_SHIFT) - (MAX_PAGES << PAGE_SHIFT)


class AddressSpace:
    """VMAs and their leaf tables.

    ``table_gva``: int64[tables], gVA of the first byte that each leaf table maps, ascending.
    Raises GuestError if the VMAs need more than the page index can number.
    """

    def __init__(self, vmas: list[Vma]) -> None:
        self.vmas = sorted(vmas, key=lambda vma: vma.start)
        spans = [
            np.arange(v.start >> (PAGE_SHIFT + TABLE_SHIFT), (v.start + (v.pages << PAGE_SHIFT) - 1 >> 21) + 1)
            for v in self.vmas
        ]
        self.table_gva: Words = np.unique(np.concatenate(spans)).astype(np.int64) << (PAGE_SHIFT + TABLE_SHIFT)
        if self.pages > MAX_PAGES:
            raise GuestError(f"the workload maps {self.pages} pages; a guest can map {MAX_PAGES}")

    @property
    def tables(self) -> int:
        """Number of leaf tables."""
        return int(self.table_gva.size)

    @property
    def pages(self) -> int:
        """Size of the dense page index."""
        return self.tables * TABLE_PAGES

    def page_of(self, gva: npt.ArrayLike) -> Words:
        """Dense page index of each gVA (int64[n]), which must be mapped."""
        address = np.asarray(gva, np.int64)
        table = np.searchsorted(self.table_gva, address, side="right") - 1
        return (table << TABLE_SHIFT) | ((address >> PAGE_SHIFT) & (TABLE_PAGES - 1))

    def gva(self, page: npt.ArrayLike) -> Words:
        """gVA of each dense page (int64[n])."""
        index = np.asarray(page, np.int64)
        return self.table_gva[index >> TABLE_SHIFT] + ((index & (TABLE_PAGES - 1)) << PAGE_SHIFT)

    def first_page(self, name: str) -> int:
        """Dense index of the first page of a VMA; its pages follow consecutively."""
        return int(self.page_of(next(vma.start for vma in self.vmas if vma.name == name)))

    def whole_tables(self) -> Bytes:
        """1 for each leaf table whose 2 MiB lie wholly in one VMA, where a huge page may be (uint8[tables])."""
        whole = np.zeros(self.tables, np.uint8)
        for vma in self.vmas:
            first, end = np.searchsorted(self.table_gva, (vma.start, vma.start + (vma.pages << PAGE_SHIFT)))
            inside = self.table_gva[first:end] + (TABLE_PAGES << PAGE_SHIFT) <= vma.start + (vma.pages << PAGE_SHIFT)
            whole[first:end] = inside
        return whole

    def upper_entries(self, levels: int) -> tuple[Words, Ints]:
        """The page-table entries above the leaves, all absent, and the number of the entry that maps each one's table.

        int64[u] and int32[u]. In order: one PDE a leaf table, PDPTEs, PML4Es, with five ``levels`` PML5Es, CR3 (its own
        parent).
        """
        parents: list[Words] = []
        spans, below = self.table_gva >> (PAGE_SHIFT + TABLE_SHIFT), 0
        for _ in range(levels - 2):
            above, which = np.unique(spans >> TABLE_SHIFT, return_inverse=True)
            below += spans.size
            parents.append(below + which)
            spans = above
        below += spans.size
        parents += [np.full(spans.size, below), np.array([below])]
        parent = np.concatenate(parents).astype(np.int32)
        return np.zeros(parent.size, np.int64), parent

    def first_gva(self) -> int:
        """gVA of the lowest mapped byte."""
        return self.vmas[0].start


def mmap_region(name: str, pages: int, seed: int) -> Vma:
    """A VMA of ``pages`` at the top of the mmap region, at an address drawn from ``seed``."""
    return mmap_regions([(name, pages)], seed)[0]


def mmap_regions(sizes: list[tuple[str, int]], seed: int) -> list[Vma]:
    """VMAs of (name, pages), mapped one after the other: each lies right below the one before, as Linux places them."""
    start = _MMAP_TOP - (_draw(seed, 1) << PAGE_SHIFT)
    vmas = []
    for name, pages in sizes:
        start -= pages << PAGE_SHIFT
        vmas.append(Vma(name, start, pages))
    return vmas


def heap_region(name: str, pages: int, seed: int) -> Vma:
    """A VMA of ``pages`` at the bottom of the heap, at an address drawn from ``seed``."""
    return Vma(name, _HEAP_BASE + (_draw(seed, 2) << PAGE_SHIFT), pages)


def _draw(seed: int, salt: int) -> int:
    mixed = (seed * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed >> 20) % _RANDOM_PAGES
