"""PML: the page-modification log of each vCPU, and the dirty bitmap that KVM empties it into.

Each time the hardware sets the D bit of an EPT entry it logs the gPA of the page, 4 KiB aligned (SDM vol. 3, 29.3.6).
The log has 512 entries and is filled downwards from index 511; an entry that finds no room is a VM exit. There is no
filter by address: with EPT A/D bits every access to a guest paging structure is a write to its page, so page-table
pages are logged too, and the pages of the DS area. KVM empties the log into the memory slot's dirty bitmap
(arch/x86/kvm/vmx/vmx.c, vmx_flush_pml_buffer) at every exit. Left out: logging that is switched on and off with a
memory slot's dirty logging; it is on from the start or never.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline, int64
from proto.arrays import Bytes, Words
from proto.costs import Costs
from proto.counters import C, Counters
from proto.entry import ACCESSED, DIRTY, HUGE
from proto.units import PAGE_SHIFT, TABLE_SHIFT

ENTRIES = 512
"""A page of 8-byte entries."""
FULL = -1
"""Index of a log without room."""

P_ON = 0
P_EXIT_PS = 1
P_ENTRY_PS = 2
PARAMS = 3


class Pml(NamedTuple):
    """The logs of all vCPUs of a guest."""

    log: Words
    """int64[vcpus, ENTRIES]: gPA of each page logged."""
    next: Words
    """int64[vcpus]: where the next entry goes, from ENTRIES - 1 down to FULL."""
    due: Words
    """int64[vcpus]: what exits for a full log took that the vCPU has yet to spend, ps."""
    dirty: Words
    """int64[2, words]: KVM's dirty bitmap, a bit a gPA page, and what the last harvest took; in the VM's segment."""
    params: Words
    """int64[PARAMS]"""


def new_pml(vcpus: int, dirty: Words, on: bool, costs: Costs) -> Pml:
    """Empty logs. ``on``: the host switched logging on; otherwise nothing is ever logged."""
    params = np.array([int(on), costs.vmexit_ps, costs.pml_entry_ps], np.int64)
    log = np.zeros((vcpus, ENTRIES if on else 1), np.int64)
    return Pml(log, np.full(vcpus, ENTRIES - 1, np.int64), np.zeros(vcpus, np.int64), dirty, params)


@inline
def flush_log(pml: Pml, vcpu: int) -> int:
    """vmx_flush_pml_buffer at an exit: empty a vCPU's log into the bitmap; what that adds to the exit, ps."""
    first = pml.next[vcpu] + 1
    for i in range(first, ENTRIES):
        gpfn = pml.log[vcpu, i] >> PAGE_SHIFT
        pml.dirty[0, gpfn >> 6] |= np.int64(1) << (gpfn & 63)
    pml.next[vcpu] = ENTRIES - 1
    return int((ENTRIES - first) * pml.params[P_ENTRY_PS])


@inline
def log_dirty(pml: Pml, vcpu: int, gpfn: int, useless: int, counters: Counters) -> None:
    """The EPT's D bit of ``gpfn`` went from 0 to 1 on ``vcpu``. For logging that is on.

    A log that was full is an exit, of which the vCPU is told by ``due``. ``useless``: 1 for a page that is not the
    workload's (a page table, the DS area).
    """
    if pml.next[vcpu] == FULL:
        pml.due[vcpu] += pml.params[P_EXIT_PS] + flush_log(pml, vcpu)
        counters[C.exit__pml_full] += 1
    pml.log[vcpu, pml.next[vcpu]] = gpfn << PAGE_SHIFT
    pml.next[vcpu] -= 1
    counters[C.pml__entries] += 1
    counters[C.pml__useless] += useless


@inline
def set_dirty(pml: Pml, vcpu: int, ept: Words, ept_pde: Bytes, gpfn: int, useless: int, counters: Counters) -> None:
    """A write reaches the frame that the EPT maps at ``gpfn``: A and D there, and a log entry where D was clear."""
    table = gpfn >> TABLE_SHIFT
    huge = (ept_pde[table] & HUGE) != 0
    entry = int64(ept_pde[table]) if huge else ept[gpfn]
    if (entry & (ACCESSED | DIRTY)) != (ACCESSED | DIRTY):
        if huge:
            ept_pde[table] |= ACCESSED | DIRTY
        else:
            ept[gpfn] = entry | ACCESSED | DIRTY
        if (entry & DIRTY) == 0 and pml.params[P_ON] != 0:
            log_dirty(pml, vcpu, gpfn, useless, counters)


@inline
def set_accessed(ept: Words, ept_pde: Bytes, gpfn: int) -> None:
    """A read reaches the frame that the EPT maps at ``gpfn``."""
    if (ept_pde[gpfn >> TABLE_SHIFT] & HUGE) != 0:
        ept_pde[gpfn >> TABLE_SHIFT] |= ACCESSED
    else:
        ept[gpfn] |= ACCESSED


@inline
def has_dirty(pml: Pml) -> bool:
    """Whether any page was logged since the last harvest."""
    found = False
    for vcpu in range(pml.next.size):
        found = found or pml.next[vcpu] != ENTRIES - 1
    for word in range(pml.dirty.shape[1]):
        found = found or pml.dirty[0, word] != 0
    return found


@inline
def take_dirty(pml: Pml, ept: Words, ept_pde: Bytes) -> int:
    """Move the bitmap to the row that the host reads, and clear the D bits of its pages on either level of the EPT.

    Returns the number of pages.
    """
    taken = 0
    for word in range(pml.dirty.shape[1]):
        bits = pml.dirty[0, word]
        if bits != 0:
            pml.dirty[0, word] = 0
            pml.dirty[1, word] |= bits
            for bit in range(64):
                if (bits >> bit) & 1:
                    gpfn = 64 * word + bit
                    ept[gpfn] &= ~DIRTY
                    ept_pde[gpfn >> TABLE_SHIFT] &= ~DIRTY & 0xFF
                    taken += 1
    return taken
