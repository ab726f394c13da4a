"""State of a guest's vCPUs as arrays, one row per vCPU everywhere, and the ledger of where each one's time went.

A vCPU's clock only moves together with its ledger (`spend`), so that the time on each is the sum of its parts to the
picosecond. What the translation caches hold is said in `guestd.tlb` and `guestd.walk`, which instruction drops what in
`guestd.instructions`.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline, kernel
from guestd.tlb import LANES, Tlb, tlb_geometry
from proto.arrays import Bytes, Ints, Words
from proto.costs import Costs
from proto.counters import LEDGER, C, Counters

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
CONTEXT = 8
"""The context (EPTP, VPID, PCID) that is current: an index into `Vcpus.context`."""
FRACTURED = 9
"""1 when the TLB may hold parts of a guest's 2 MiB page that the EPT maps in pieces."""
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
HUGE_SEEN = 16
"""1 when a 2 MiB translation was ever entered, so that look-ups search those arrays too."""
KTHREAD_START = 17
KTHREAD_END = 18
"""The last run of a kernel thread on the vCPU: the process's page tables are loaded lazily in [start, end)."""
LAZY_FLUSHED = 19
"""`KTHREAD_END` of the last such run for whose end a flush is due already."""
OFF_PCPU = 20
"""1 while another vCPU has its pCPU."""
PV_FLUSHED = 21
"""`EXIT_START` + 1 of the last preemption for whose end KVM owes a flush already."""
LAST_WRITTEN = 22
"""256-byte block of the write before."""
FIELDS = 23

CONTEXTS = 16

BUFFER = 16384
"""Accesses generated ahead per vCPU."""
LATENCY_BINS = 1024
LATENCY_BIN_SHIFT = 12
"""A bin of the latency histogram is 4.096 ns wide."""

(THINK, STALL, MINOR_FAULT, HINT_FAULT, WP_FAULT, EPT_VIOLATION, EPT_REFAULT, KICK, PMI_EXIT, PML_FULL, HOST_TASK,
 PAUSED, PREEMPTED, INTERRUPT, AGENT, CONTEXT_SWITCH, PEBS_RECORD, THROTTLE, HALTED) = range(LEDGER)  # fmt: skip
"""Columns of the ledger: `proto.counters.C` from ``time__think_ps`` on, which says what each is."""


class Vcpus(NamedTuple):
    """All vCPUs of a guest; n = vCPUs."""

    field: Words
    """int64[n, FIELDS]"""
    ledger: Words
    """int64[n, LEDGER]: where the clock's time went, ps."""
    context: Words
    """int64[n, CONTEXTS, 3]: EPTP, VPID and PCID of each context; from VPID 0 on unused (`guestd.instructions`)."""
    l1_tag: Ints
    """int32[n, sets * stride], as all tags and data: see `guestd.tlb.Tlb`."""
    l1_data: Ints
    l1_recent: Words
    l1_2m_tag: Ints
    l1_2m_data: Ints
    l1_2m_recent: Words
    stlb_tag: Ints
    stlb_data: Ints
    stlb_recent: Words
    walk_tag: Ints
    """int32[n, slots]: paging-structure caches and nested TLB, see `guestd.walk.WalkGeometry`."""
    chain: Words
    """int64[n, 6]: scratch of the walk."""
    histogram: Words
    """int64[n, LATENCY_BINS]: latencies as the load saw them."""
    address: Words
    """int64[n, BUFFER]: dense byte address of each access."""
    kind: Bytes
    """uint8[n, BUFFER]: LOAD, STORE or MODIFY, with or without LLC_HIT."""
    think_ps: Ints
    """int32[n, BUFFER]: compute before each access."""
    fault_ps: Words
    """int64[n, BUFFER]: what faults add before an access, in guest mode."""
    fault_part: Bytes
    """uint8[n, BUFFER]: MINOR_FAULT, HINT_FAULT or WP_FAULT, the part that it belongs to."""
    exit_ps: Words
    """int64[n, BUFFER]: what EPT violations add before an access, without waiting for the mmu lock."""
    exit_part: Bytes
    """uint8[n, BUFFER]: EPT_VIOLATION or EPT_REFAULT."""
    retries: Bytes
    """uint8[n, BUFFER]: faults taken before an access, after each of which it walks again."""


def new_vcpus(count: int, costs: Costs, seed: int) -> Vcpus:
    """Powered-on vCPUs with empty caches. Geometry gives powers of two of sets (checked with the host profile)."""

    geometry = tlb_geometry(costs)

    def tlb(mask: int, stride: int) -> tuple[Ints, Ints, Words]:
        sets = mask + 1
        slots = sets * stride
        return np.zeros((count, slots), np.int32), np.zeros((count, slots), np.int32), np.zeros((count, sets), np.int64)

    slots = (costs.pde_cache_entries + costs.pdpte_cache_entries + costs.pml4e_cache_entries + costs.nested_tlb_entries
             + costs.ept_pde_cache_entries + costs.ept_pdpte_cache_entries + costs.ept_pml4e_cache_entries)  # fmt: skip
    vcpus = Vcpus(
        np.zeros((count, FIELDS), np.int64),
        np.zeros((count, LEDGER), np.int64),
        np.zeros((count, CONTEXTS, 3), np.int64),
        *tlb(geometry.l1_mask, geometry.l1_stride),
        *tlb(geometry.l1_2m_mask, geometry.l1_2m_stride),
        *tlb(geometry.stlb_mask, geometry.stlb_stride),
        np.zeros((count, max(slots, LANES)), np.int32),
        np.zeros((count, 6), np.int64),
        np.zeros((count, LATENCY_BINS), np.int64),
        np.zeros((count, BUFFER), np.int64),
        np.zeros((count, BUFFER), np.uint8),
        np.zeros((count, BUFFER), np.int32),
        np.zeros((count, BUFFER), np.int64),
        np.zeros((count, BUFFER), np.uint8),
        np.zeros((count, BUFFER), np.int64),
        np.zeros((count, BUFFER), np.uint8),
        np.zeros((count, BUFFER), np.uint8),
    )
    # KVM gives each vCPU a VPID of its own, and the VM one EPTP; the process runs under one PCID.
    vcpus.context[:, 0, 1] = 1 + np.arange(count)
    vcpus.context[:, 0, 2] = 1
    vcpus.field[:, LAST_BLOCK] = vcpus.field[:, LAST_WRITTEN] = -1
    vcpus.field[:, RANDOM] = (seed * 2654435761 % (1 << 31) + np.arange(count) * 40503 + 1) & 0x7FFFFFFF
    vcpus.field[:, TAG_LEFT] = 1 + vcpus.field[:, RANDOM] % (2 * costs.load_latency_tag_interval - 1)
    return vcpus


@inline
def tlb_of(vcpus: Vcpus, vcpu: int) -> Tlb:
    """The TLB arrays of one vCPU."""
    return Tlb(
        vcpus.l1_tag[vcpu],
        vcpus.l1_data[vcpu],
        vcpus.l1_recent[vcpu],
        vcpus.l1_2m_tag[vcpu],
        vcpus.l1_2m_data[vcpu],
        vcpus.l1_2m_recent[vcpu],
        vcpus.stlb_tag[vcpu],
        vcpus.stlb_data[vcpu],
        vcpus.stlb_recent[vcpu],
    )


def book(vcpus: Vcpus, vcpu: int | Words, part: int, ps: int) -> None:
    """Move the clock of ``vcpu`` (a number, or int64[n] of them) by ``ps`` and book it to ``part`` of the ledger."""
    vcpus.field[vcpu, CLOCK] += ps
    vcpus.ledger[vcpu, part] += ps


spend = inline(book)
"""`book` for kernels; one vCPU."""


@kernel
def total_time(vcpus: Vcpus, counters: Counters) -> None:
    """Bring the ``time`` group of the counters up to date: the ledgers of all vCPUs together."""
    for part in range(vcpus.ledger.shape[1]):
        total = 0
        for vcpu in range(vcpus.ledger.shape[0]):
            total += vcpus.ledger[vcpu, part]
        counters[C.time__think_ps + part] = total
