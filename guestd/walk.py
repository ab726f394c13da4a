"""The two-dimensional page walk: which memory references a TLB miss needs, and what each costs.

Every entry above the leaves of the guest page table (GPT) has a number; `PageTables.parent` leads from an entry to the
one that maps its table, up to CR3. A walk climbs to the deepest entry that a paging-structure cache holds; such an
entry is a *combined mapping* and gives the host-physical address of the next table (SDM vol. 3, 29.4.1). From there it
descends: each guest entry is one reference, and each guest-physical address met, of a table below or of the data, is
translated by the nested TLB (tables only) or by a walk of the EPT, which has paging-structure caches of its own. With
all caches off a walk has (n + 1)(m + 1) - 1 references: 24 for 4 x 4 levels, 19 with 2 MiB on one side, 15 on both, 35
for 5 x 5 (Bhargava et al., ASPLOS'08). A reference costs what the place of its line costs (`price_walks`).

With EPT accessed and dirty bits on, the processor's accesses to guest tables count as writes to their pages (SDM vol.
3, 29.3.5): a nested translation of a table sets its EPT entry's D bit. Left out: a cache of PML5 entries; the walk does
not meet its own page-table lines in a cache line by line, their places are expected values.
"""

from typing import NamedTuple

from guestd.jit import assume, holds4, inline, int32, push4
from guestd.pml import Pml, set_dirty
from guestd.tlb import CONTEXT_BITS
from proto.arrays import Bytes, Ints, Words
from proto.costs import Costs
from proto.counters import Counters
from proto.entry import (
    ACCESSED,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    TABLE_SEEN_MASK,
    TABLE_SEEN_SHIFT,
    TABLE_SLOW,
)
from proto.units import TABLE_SHIFT

WAYS = 4
"""Associativity of the paging-structure caches and the nested TLB; first in, first out (unpublished)."""
EPTP_BITS = 3
EPTP_MASK = (1 << EPTP_BITS) - 1

PRICE_GUEST = 0
"""+ 2 * level + slow: a GPT entry of that level in a table of that tier (level 1 = leaf)."""
PRICE_EPT = 12
"""+ level: an EPT entry; KVM's tables lie in the fast tier."""
PRICES = 18

REFS_SHIFT = 48
"""`walk` returns cost in ps, and the number of references above this bit."""
ONE_REF = 1 << REFS_SHIFT
COST_MASK = ONE_REF - 1
UNBACKED = -1
"""Result of a walk that met a page-table page that the EPT does not map: an EPT violation."""


class WalkGeometry(NamedTuple):
    """First slot and sets - 1 of each cache in a vCPU's walk arrays; a cache of no entries has mask -1."""

    pde: int
    pde_mask: int
    pdpte: int
    pdpte_mask: int
    pml4e: int
    pml4e_mask: int
    nested: int
    nested_mask: int
    ept_pde: int
    ept_pde_mask: int
    ept_pdpte: int
    ept_pdpte_mask: int
    ept_pml4e: int
    ept_pml4e_mask: int
    slots: int
    """Slots of all caches together."""
    guest_slots: int
    """Slots [0, guest_slots) hold combined mappings, the others guest-physical ones."""
    guest_levels: int
    """4 or 5."""
    ept_levels: int


def walk_geometry(costs: Costs, guest_levels: int, ept_levels: int) -> WalkGeometry:
    """Geometry from a host profile, which was checked to give powers of two of 4-way sets."""
    entries = (costs.pde_cache_entries, costs.pdpte_cache_entries, costs.pml4e_cache_entries, costs.nested_tlb_entries,
               costs.ept_pde_cache_entries, costs.ept_pdpte_cache_entries, costs.ept_pml4e_cache_entries)  # fmt: skip
    fields: list[int] = []
    slots = 0
    for count in entries:
        fields += [slots, count // WAYS - 1]
        slots += count
    return WalkGeometry._make([*fields, slots, sum(entries[:3]), guest_levels, ept_levels])


class PageTables(NamedTuple):
    """Both page tables of a VM. Leaves: `Machine.gpt` and `Machine.ept`.

    ``upper``: int64[u], GPT entries above the leaves: the PDEs (one a leaf table, numbered alike), then PDPTEs, PML4Es,
    with five levels the PML5E, and last CR3. ``parent``: int32[u], number of the entry that maps an entry's table.
    ``ept_pde``, ``ept_pdpte``: see `proto.layout.VmMemory`.
    """

    upper: Words
    parent: Ints
    ept_pde: Bytes
    ept_pdpte: Bytes


@inline
def cached(tags: Ints, base: int, mask: int, number: int, key: int) -> int:
    """1 if the cache at slot ``base`` holds ``key``, in the set of ``number``; else 0."""
    if mask < 0:
        return 0
    return holds4(tags, base + (number & mask) * WAYS, int32(key))


@inline
def use(tags: Ints, base: int, mask: int, number: int, key: int) -> int:
    """The same; ``key`` is entered if it is not there, over the entry of its set that was entered first."""
    if mask < 0:
        return 0
    return push4(tags, base + (number & mask) * WAYS, int32(key))


@inline
def upper_key(number: int, context: int) -> int:
    """Tag of GPT entry ``number`` in a paging-structure cache."""
    return ((number + 1) << CONTEXT_BITS) | context


@inline
def physical_key(number: int, eptp: int) -> int:
    """Tag of a guest-physical mapping: of a frame in the nested TLB, of an EPT entry in its cache."""
    return ((number + 1) << EPTP_BITS) | eptp


@inline
def ept_walk(tags: Ints, geometry: WalkGeometry, tables: PageTables, frame: int, eptp: int, price: Words) -> int:
    """Walk the EPT to gPA ``frame``; ``references << REFS_SHIFT | cost``. Sets A in the upper entries that it reads."""
    assume(frame >= 0)
    number = frame >> TABLE_SHIFT
    total = 0
    if (tables.ept_pde[number] & HUGE) == 0:
        total = ONE_REF + price[PRICE_EPT + 1]
        if use(tags, geometry.ept_pde, geometry.ept_pde_mask, number, physical_key(number, eptp)) == 1:
            return total
    total += ONE_REF + price[PRICE_EPT + 2]
    tables.ept_pde[number] |= ACCESSED
    number >>= TABLE_SHIFT
    # Whether the few entries of this cache hit is hard to predict, so nothing jumps on it.
    miss = 1 - use(tags, geometry.ept_pdpte, geometry.ept_pdpte_mask, number, physical_key(number, eptp))
    total += miss * (ONE_REF + price[PRICE_EPT + 3])
    tables.ept_pdpte[number] |= miss * ACCESSED
    number >>= TABLE_SHIFT
    key = physical_key(number, eptp)
    if miss > cached(tags, geometry.ept_pml4e, geometry.ept_pml4e_mask, number, key):
        use(tags, geometry.ept_pml4e, geometry.ept_pml4e_mask, number, key)
        total += ONE_REF + price[PRICE_EPT + 4]
        if geometry.ept_levels == 5:
            total += ONE_REF + price[PRICE_EPT + 5]
    return total


@inline
def walk(tags: Ints, geometry: WalkGeometry, tables: PageTables, chain: Words, ept: Words, table: int,
         frame: int, context: int, eptp: int, slow_frames: int, epoch: int, price: Words, pml: Pml, vcpu: int,
         counters: Counters) -> int:  # fmt: skip
    """Walk to a page of leaf table ``table`` (or to its 2 MiB page) whose data lie in gPA ``frame``.

    ``tags``: the vCPU's walk caches, int32[slots]; ``chain``: int64[6] scratch.
    ``epoch``: of the EPT, which a table's entry keeps from the last look at the EPT's entry for it, so that a walk
    looks there again only after the host has changed the EPT. Returns ``references << REFS_SHIFT | cost_ps``, or
    UNBACKED; ``chain[5]`` is then the table's gPA frame.
    """
    upper = tables.upper
    assume(table >= 0)
    huge = 1 if (upper[table] & HUGE) != 0 else 0
    # Climb: chain[k] maps the table of level k + 1.
    depth = 0
    chain[0] = table
    found = 0
    if huge == 0:
        found = cached(tags, geometry.pde, geometry.pde_mask, table, upper_key(table, context))
    if found == 0:
        depth = 1
        number = tables.parent[table]
        chain[1] = number
        found = cached(tags, geometry.pdpte, geometry.pdpte_mask, number, upper_key(number, context))
        if found == 0:
            depth = 2
            number = tables.parent[number]
            chain[2] = number
            found = cached(tags, geometry.pml4e, geometry.pml4e_mask, number, upper_key(number, context))
            if found == 0:
                depth = 3
                number = tables.parent[number]
                chain[3] = number
                if geometry.guest_levels == 5:
                    depth = 4
                    chain[4] = tables.parent[number]
    total = 0
    at = depth
    translate = found == 0
    result = 0
    while True:
        assume(at >= 0)
        number = chain[at]
        assume(number >= 0)
        if translate:
            base = (upper[number] & FRAME_MASK) >> FRAME_SHIFT
            key = physical_key(base, eptp)
            if cached(tags, geometry.nested, geometry.nested_mask, base, key) == 0:
                if (upper[number] & TABLE_SEEN_MASK) >> TABLE_SEEN_SHIFT != epoch:
                    entry = ept[base]
                    if (entry & PRESENT) == 0:
                        chain[5] = base
                        result = UNBACKED
                        break
                    set_dirty(pml, vcpu, ept, tables.ept_pde, base, 1, counters)
                    lies_slow = TABLE_SLOW if ((entry & FRAME_MASK) >> FRAME_SHIFT) >= slow_frames else 0
                    kept = upper[number] & ~(TABLE_SLOW | TABLE_SEEN_MASK)
                    upper[number] = kept | lies_slow | (epoch << TABLE_SEEN_SHIFT)
                total += ept_walk(tags, geometry, tables, base, eptp, price)
                use(tags, geometry.nested, geometry.nested_mask, base, key)
        slow = 1 if (upper[number] & TABLE_SLOW) != 0 else 0
        total += ONE_REF + price[PRICE_GUEST + 2 * (at + 1) + slow]
        if at == huge:
            break
        at -= 1
        if (upper[chain[at]] & ACCESSED) == 0:
            upper[chain[at]] |= ACCESSED
        translate = True
    if result == 0:
        # A walk that faults enters nothing; one that does not enters all that it read.
        if depth >= 1 and huge == 0:
            use(tags, geometry.pde, geometry.pde_mask, table, upper_key(table, context))
        if depth >= 2:
            use(tags, geometry.pdpte, geometry.pdpte_mask, chain[1], upper_key(chain[1], context))
        if depth >= 3:
            use(tags, geometry.pml4e, geometry.pml4e_mask, chain[2], upper_key(chain[2], context))
        result = total + ept_walk(tags, geometry, tables, frame, eptp, price)
    return result


def price_walks(
    price: Words, costs: Costs, used_pages: int, llc_bytes: int, latency_ps: Words, huge_pages: int = 0
) -> int:
    """Set ``price`` (int64[PRICES], ps) for a quantum; returns the bytes of the LLC share that are left for data.

    A reference costs what the place of its line costs. Page-table lines are the hottest there are (one maps 32 KiB), so
    they are taken to fill first the core's L2 and then the VM's LLC share (``llc_bytes``), upper levels first; what is
    in neither is read from memory at the loaded latency ``latency_ps`` (int64[2, 2]) of the table's tier. Both page
    tables of ``used_pages`` count, but for leaves of the ``huge_pages`` (4 KiB pages of either table) that have none.
    An upper bound of what LRU keeps there.
    """
    l2, llc = costs.l2_bytes, llc_bytes
    for level in (5, 4, 3, 2, 1):
        size = 2 * max(8, 8 * used_pages >> 9 * (level - 1))
        if level == 1:
            size = max(16, size - 8 * huge_pages)
        in_l2 = min(l2, size)
        in_llc = min(llc, size - in_l2)
        l2, llc = l2 - in_l2, llc - in_llc
        cached_ps = in_l2 * costs.walk_cached_ref_ps + in_llc * costs.llc_latency_ps
        for slow in (0, 1):
            memory_ps = (size - in_l2 - in_llc) * int(latency_ps[slow, 0])
            price[PRICE_GUEST + 2 * level + slow] = (cached_ps + memory_ps) // size
        price[PRICE_EPT + level] = price[PRICE_GUEST + 2 * level]
    return llc
