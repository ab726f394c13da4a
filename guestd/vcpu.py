"""State of a guest's vCPUs as arrays, and the invalidations that act on it.

One row per vCPU everywhere. Which instruction drops what: Intel SDM vol. 3, 4.10.4 (INVLPG, MOV CR3, INVPCID) and
29.4.3 (INVVPID, INVEPT). The guest's own invalidations never touch guest-physical mappings; an INVEPT drops all.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline, kernel
from guestd.tlb import TLB_TAG_SHIFT, WALK_WAYS, find
from proto.arrays import Bytes, Ints, Words
from proto.costs import Costs

CLOCK = 0
"""Virtual time of the vCPU, ps."""
POSITION = 1
"""Next access of the block."""
LENGTH = 2
"""Accesses in the block."""
LAST_BLOCK = 3
"""256-byte block of the access before."""
TAG_LEFT = 4
"""Loads until the load-latency facility tags one."""
DS_INDEX = 7
"""Records in the DS area."""
GUEST_UPPER = 8
"""1 when the guest's upper levels are in the paging-structure caches."""
EPT_UPPER = 9
EXIT_START = 10
EXIT_END = 11
"""The last VM exit: outside guest mode in [start, end)."""
FLUSH_AT_ENTRY = 12
"""1 when the entry that ends the last exit flushes already: further requests coalesce."""
IDLE = 13
"""1 when the vCPU has nothing to run (halted: outside guest mode)."""
RANDOM = 14
"""State of the load-tagging generator."""
DS_FAULT = 15
"""Index + 1 of the first record that met an EPT violation; 0 = none."""
FIELDS = 16

BUFFER = 16384
"""Accesses generated ahead per vCPU."""
LATENCY_BINS = 1024
LATENCY_BIN_SHIFT = 12
"""A bin of the latency histogram is 4.096 ns wide."""


class Vcpus(NamedTuple):
    """All vCPUs of a guest; n = vCPUs."""

    field: Words
    """int64[n, FIELDS]"""
    tlb: Words
    """int64[n, sets*ways]"""
    tlb_recent: Words
    """int64[n, sets]"""
    pde: Words
    """int64[n, entries]: guest paging-structure cache, keyed by leaf table."""
    pde_recent: Words
    nested: Words
    """int64[n, entries]: nested TLB, keyed by guest page-table page."""
    nested_recent: Words
    ept_pde: Words
    """int64[n, entries]: EPT paging-structure cache, keyed by gPA frame / 512."""
    ept_pde_recent: Words
    histogram: Words
    """int64[n, LATENCY_BINS]: latencies as the load saw them."""
    address: Words
    """int64[n, BUFFER]: dense byte address of each access."""
    kind: Bytes
    """uint8[n, BUFFER]: LOAD, STORE or MODIFY."""
    think_ps: Ints
    """int32[n, BUFFER]: compute before each access."""
    fault_ps: Words
    """int64[n, BUFFER]: what faults add before an access, in guest mode."""
    exit_ps: Words
    """int64[n, BUFFER]: what VM exits add before an access."""


def new_vcpus(count: int, costs: Costs, seed: int) -> Vcpus:
    """Powered-on vCPUs with empty caches. Cache geometry must be powers of two (checked with the host profile)."""
    sets = costs.stlb_entries // costs.stlb_ways

    def cache(entries: int) -> tuple[Words, Words]:
        return np.zeros((count, entries), np.int64), np.zeros((count, entries // WALK_WAYS), np.int64)

    vcpus = Vcpus(
        np.zeros((count, FIELDS), np.int64),
        np.zeros((count, costs.stlb_entries), np.int64),
        np.zeros((count, sets), np.int64),
        *cache(costs.pde_cache_entries),
        *cache(costs.nested_tlb_entries),
        *cache(costs.ept_pde_cache_entries),
        np.zeros((count, LATENCY_BINS), np.int64),
        np.zeros((count, BUFFER), np.int64),
        np.zeros((count, BUFFER), np.uint8),
        np.zeros((count, BUFFER), np.int32),
        np.zeros((count, BUFFER), np.int64),
        np.zeros((count, BUFFER), np.int64),
    )
    vcpus.field[:, LAST_BLOCK] = -1
    vcpus.field[:, RANDOM] = (seed * 2654435761 % (1 << 31) + np.arange(count) * 40503 + 1) & 0x7FFFFFFF
    vcpus.field[:, TAG_LEFT] = 1 + vcpus.field[:, RANDOM] % (2 * costs.load_latency_tag_interval - 1)
    return vcpus


@inline
def drop_guest(vcpus: Vcpus, vcpu: int) -> None:
    """MOV CR3 or INVPCID all-context: linear and combined mappings, guest paging structures."""
    vcpus.tlb[vcpu, :] = 0
    vcpus.pde[vcpu, :] = 0
    vcpus.field[vcpu, GUEST_UPPER] = 0


@inline
def drop_all(vcpus: Vcpus, vcpu: int) -> None:
    """INVEPT: guest-physical and combined mappings."""
    drop_guest(vcpus, vcpu)
    vcpus.nested[vcpu, :] = 0
    vcpus.ept_pde[vcpu, :] = 0
    vcpus.field[vcpu, EPT_UPPER] = 0


@kernel
def drop_guest_everywhere(vcpus: Vcpus) -> None:
    """A full guest flush on every vCPU."""
    for vcpu in range(vcpus.field.shape[0]):
        drop_guest(vcpus, vcpu)


@kernel
def drop_pages_everywhere(vcpus: Vcpus, pages: Words) -> None:
    """INVLPG of each page (int64[m]) on every vCPU: its entry, and all paging-structure caches of the PCID."""
    sets = vcpus.tlb_recent.shape[1]
    ways = vcpus.tlb.shape[1] // sets
    for vcpu in range(vcpus.field.shape[0]):
        tlb = vcpus.tlb[vcpu]
        for page in pages:
            base = (page & (sets - 1)) * ways
            way = find(tlb, base, ways, page + 1, TLB_TAG_SHIFT)
            if way >= 0:
                tlb[base + way] = 0
        vcpus.pde[vcpu, :] = 0
        vcpus.field[vcpu, GUEST_UPPER] = 0
