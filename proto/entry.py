"""The 64-bit words that guests and host share: page-table entries (GPT and EPT alike) and content stamps.

An entry has the x86 bits (SDM vol. 3, 4.5 and 29.3.2): present, writable, accessed, dirty; PROT_NONE is bit 8 as in
Linux (arch/x86/include/asm/pgtable_types.h, _PAGE_BIT_PROTNONE). The frame starts at bit 12. The bits that the
hardware ignores in a GPT entry hold the emulator's scoreboard: the version that the page's content must have.

A stamp is what a frame holds instead of 4 KiB of data: owner (VM), page, version. A write bumps the version in
both places, so that a lost page, a mixed-up page and a lost write each show as a difference.
"""

import numpy as np
import numpy.typing as npt

Entries = npt.NDArray[np.int64]
"""A flat leaf page table: int64, one entry a page."""

PRESENT = 1 << 0
WRITABLE = 1 << 1
ACCESSED = 1 << 5
DIRTY = 1 << 6
HUGE = 1 << 7
"""In an entry above the leaf: it maps 2 MiB itself (PS). The leaf entries below it then only keep books."""
PROTNONE = 1 << 8
YOUNG = 1 << 9
"""Software bit: the A bit of an entry that was zapped, kept for the reclaim's next look (KVM: kvm_set_pfn_accessed)."""

SHADOWED = 1 << 11
"""Software bit of a GPT entry: read-only for the sake of the page's shadow, else writable (bit 52 in Nomad's patch)."""

FRAME_SHIFT = 12
FRAME_BITS = 28
FRAME_MASK = ((1 << FRAME_BITS) - 1) << FRAME_SHIFT
FLAG_MASK = (1 << FRAME_SHIFT) - 1

TABLE_SLOW = 1 << 44
"""In an entry above the leaf of the GPT: the table that it maps lies in the slow tier, by the last look at the EPT."""
TABLE_SEEN_SHIFT = 45
TABLE_SEEN_BITS = 17
TABLE_SEEN_MASK = ((1 << TABLE_SEEN_BITS) - 1) << TABLE_SEEN_SHIFT
"""There too: the epoch of the EPT at that look (`guestd.walk`)."""

VERSION_BITS = 18
ENTRY_VERSION_SHIFT = 44
ENTRY_VERSION_MASK = ((1 << VERSION_BITS) - 1) << ENTRY_VERSION_SHIFT
ENTRY_VERSION_ONE = 1 << ENTRY_VERSION_SHIFT

STAMP_VERSION_MASK = (1 << VERSION_BITS) - 1
STAMP_PAGE_SHIFT = VERSION_BITS
STAMP_PAGE_BITS = 28
STAMP_OWNER_SHIFT = STAMP_PAGE_SHIFT + STAMP_PAGE_BITS
STAMP_OWNER_BITS = 16

STAMP_TABLE_BASE = 3 << (STAMP_PAGE_BITS - 2)
"""Page numbers from here on name page-table pages and DS-area pages, which no gVA of the workload maps."""
MAX_PAGES = (1 << 27) - 512
"""Bound of a guest's dense page index (512 GiB of mapped gVA): it must fit the TLB's tag and leave room above."""
MAX_VMS = (1 << STAMP_OWNER_BITS) - 1


def owner_stamp(vm: int) -> int:
    """The owner part of VM ``vm``'s stamps; owner 0 is a frame that nobody wrote."""
    return (vm + 1) << STAMP_OWNER_SHIFT
