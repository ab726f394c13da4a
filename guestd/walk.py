"""The two-dimensional page walk: how many memory references a TLB miss needs, and what each costs.

A guest leaf lookup needs the guest page-table entry (its own gPA translated through the nested TLB or the EPT) and then
the EPT leaf of the data's gPA; upper levels are skipped when a paging-structure cache holds them. Cold, a 4x4 walk has
24 references (Bhargava et al., ASPLOS'08). Upper-level lines sit in L1/L2; a leaf line sits in the LLC with the
probability that the page tables fit there, else in the tier of its page-table page. So the price of a flush is not a
constant: it emerges from the references that it causes.
"""

from guestd.jit import inline
from guestd.tlb import lookup_or_insert
from guestd.vcpu import EPT_UPPER, GUEST_UPPER
from proto.arrays import Words

PRICE_UPPER = 0
PRICE_GUEST_LEAF_FAST = 1
PRICE_GUEST_LEAF_SLOW = 2
PRICE_EPT_LEAF = 3
PRICES = 4

REFS_SHIFT = 48
"""`walk` returns cost in ps, and the number of references above this bit."""

_UPPER_NESTED_KEY = 1 << 40


@inline
def _ept_refs(ept_pde: Words, ept_pde_recent: Words, field: Words, gpfn: int) -> int:
    """Upper EPT references of translating one gPA frame; the leaf reference comes on top."""
    refs = 0
    if not lookup_or_insert(ept_pde, ept_pde_recent, gpfn >> 9):
        refs = 1 if field[EPT_UPPER] == 1 else 3
        field[EPT_UPPER] = 1
    return refs


@inline
def walk(pde: Words, pde_recent: Words, nested: Words, nested_recent: Words, ept_pde: Words, ept_pde_recent: Words,
         field: Words, table: int, table_gpfn: int, table_slow: int, gpfn: int, price: Words) -> int:  # fmt: skip
    """Walk to the page of leaf table ``table`` that maps gPA frame ``gpfn``, on the vCPU that the caches belong to.

    ``field``: its row of fields; ``price``: int64[PRICES] ps. Returns ``references << REFS_SHIFT | cost_ps``.
    """
    upper = 0
    ept_leaves = 1
    if not lookup_or_insert(pde, pde_recent, table):
        guest_upper = 3 if field[GUEST_UPPER] == 0 else 1
        field[GUEST_UPPER] = 1
        upper += guest_upper
        # Upper page-table pages are few: one nested-TLB entry stands for those of a GiB.
        if not lookup_or_insert(nested, nested_recent, _UPPER_NESTED_KEY | (table >> 9)):
            upper += guest_upper * (1 + _ept_refs(ept_pde, ept_pde_recent, field, table_gpfn))
    if not lookup_or_insert(nested, nested_recent, table):
        upper += _ept_refs(ept_pde, ept_pde_recent, field, table_gpfn)
        ept_leaves += 1
    upper += _ept_refs(ept_pde, ept_pde_recent, field, gpfn)
    cost = upper * price[PRICE_UPPER] + ept_leaves * price[PRICE_EPT_LEAF] + price[PRICE_GUEST_LEAF_FAST + table_slow]
    return ((upper + ept_leaves + 1) << REFS_SHIFT) | cost
