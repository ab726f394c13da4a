"""Layout of a VM's shared segment, of host operations, of events and heat records.

One segment (a sealed memfd) per VM, mapped by the host and by that guest only: its EPT, the stamps of its frames,
bitmaps of its pages. A VM's frames are a window of host-physical memory: slot s of the window is hPA frame
``window + s``; slots below `fast_capacity` are fast, the others slow. Capacity is the VM's whole memory in each tier
(as the double balloon sizes its nodes), of which the provisioner backs only a share; untouched slots cost nothing.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from proto.entry import Entries
from proto.units import TABLE_PAGES

OP_FLUSH = 1
"""Request a flush of every vCPU (kvm_flush_remote_tlbs)."""
OP_ZAP = 2
"""Zap the entries of gPA frames [a, a + b), of a huge page all, then request one flush if any was present."""
OP_MOVE = 3
"""Zap gPA frame a, flush, copy its content to frame slot b, to be mapped there at its next fault."""

OP_STALL = 4
"""vCPU a is outside guest mode for b ps: its thread works for the host (task_work before it enters again)."""
OP_SWAP = 5
"""Zap gPA frames a and b, flush once, exchange their contents' places, to be mapped there at their next faults."""
OP_HARVEST = 6
"""Empty all logs of dirty pages, move the bitmap to the row for the host, clear those D bits, and request one flush."""
OP_PAUSE = 7
"""Stop all vCPUs for b ps, with one flush request, which each executes as it enters the guest again.

OP_TRADE and OP_SWITCH at the same time happen meanwhile, so they rewrite entries in place and request nothing."""
OP_TRADE = 8
"""Let gPA frames a and b trade their frame slots, contents moving along through a buffer."""
OP_COPY = 9
"""Copy the content of gPA frame a to frame slot b; it stays mapped where it is, and the VM runs on."""
OP_SWITCH = 10
"""Map gPA frame a to frame slot b, which has a copy of it (OP_COPY). If the log of dirty pages names it since the host
last read the log, it is copied once more, and the pause is ``busy_ps`` longer."""
OP_WALK_GPT = 11
"""The host walks the guest's page table and clears its A bits: see `VmMemory.walk`. One flush request if it cleared any
and no flush is due anyhow. With NARROW in ``flags`` it looks only at tables whose page the log of dirty pages named."""
NARROW = 1
OP_TRANSACTION_BEGIN = 12
"""The guest's own: it begins to copy page a, which stays mapped (`guestd.transaction`)."""
OP_TRANSACTION_END = 13
"""The guest's own: its copy of page a in gPA frame b takes the page's place, unless the page was written meanwhile."""

OPERATION = np.dtype([
    ("time_ps", "<i8"), ("kind", "<i4"), ("flags", "<i4"), ("a", "<i8"), ("b", "<i8"), ("hold_ps", "<i8"),
    ("busy_ps", "<i8"),
])  # fmt: skip
"""A host operation on a VM at a virtual time. ``flags``: PROTNONE for OP_ZAP (set on slow entries) and OP_MOVE; HUGE
for OP_MOVE, OP_SWAP and OP_TRADE: of the 512 pages from each of a and b on, which are one huge page afterwards. For
OP_TRANSACTION_END `guestd.transaction.READ_ONLY`, and in the bits above it the vCPU that copies.
``hold_ps``: how long its flush request holds mmu_lock; ``busy_ps``: how long EPT violations of its frames have to wait.
"""

EVENT = np.dtype(
    [("time_ps", "<i8"), ("vm", "<i4"), ("kind", "<i4"), ("gva", "<i8"), ("source", "<i4"), ("target", "<i4")]
)
"""A line of events.parquet: kind is an index into EVENT_KINDS; source and target are tiers or node numbers."""
EVENT_KINDS = ("promote", "demote", "phase")


HEAT = np.dtype(
    [("time_ps", "<i8"), ("vm", "<i4"), ("space", "<i4"), ("address", "<i8"), ("accesses", "<i8"), ("hot_pages", "<i8")]
)
"""A line of heat.parquet: accesses to the 2 MiB from ``address`` on in the sampling interval that ended at ``time_ps``,
and pages of it that were then in the policy's hot set; ``space`` is an index into HEAT_SPACES."""
HEAT_SPACES = ("gva", "gpa", "hpa")


class VmMemory(NamedTuple):
    """Views into a VM's shared segment."""

    ept: Entries
    """int64[gpa_pages]: gPA frame -> frame slot with flags."""
    stamps: npt.NDArray[np.int64]
    """int64[slots]: content stamp of each frame of the VM's window."""
    ept_upper: npt.NDArray[np.uint8]
    """The next two, one after the other."""
    ept_pde: npt.NDArray[np.uint8]
    """uint8[gpa_pages / 512]: EPT entries above the leaves: A, D and HUGE bits, and PRESENT once there is a table. HUGE
    stays while a huge page is zapped: its leaves' PRESENT bits say whether it is mapped."""
    ept_pdpte: npt.NDArray[np.uint8]
    """uint8[gpa_pages / 512 / 512, rounded up]: the entries above those: A and PRESENT bits."""
    dirty: npt.NDArray[np.int64]
    """int64[2, words]: a bit a gPA page that was logged as dirty (PML). Row 0 since the last harvest, as KVM fills it;
    row 1 what that harvest took, for the host to read."""
    believed: npt.NDArray[np.int64]
    """int64[1 + words]: 1 if a host-side policy has a notion of hot pages, then a bit for each gPA page that it takes
    for hot. It is for the emulator, which holds it against the truth."""
    walk: npt.NDArray[np.int64]
    """int64[4, words]: what a walk of the guest's page table (OP_WALK_GPT) hands over, rows W_*; a bit a gPA page but
    for the last."""
    pebs: npt.NDArray[np.int64]
    """int64[words]: with ``host.pebs=shared`` the host's PEBS buffer, one memory for all VMs, an area a vCPU of the
    fleet; otherwise empty."""


W_YOUNG = 0
"""Pages that were accessed since the host last read this row."""
W_LEFT = 1
"""Leaf tables in which the last walk left an A bit as it was, for the next narrow walk."""
W_LEAVE = 2
"""Pages whose A bit a walk leaves as it is; the host's to set."""
W_VISITED = 3
"""In its first word: entries that walks looked at since the host last read it."""


def gpa_pages(total_pages: int) -> int:
    """Size of the gPA space in pages: two guest nodes, each as large as the VM."""
    return 2 * total_pages


_BITMAPS = 7
"""Two of dirty pages, the rows of a walk, and the last, of which a word more, of pages that a policy takes for hot."""


def _sizes(total_pages: int) -> tuple[int, int, int, int]:
    """Length of EPT (and stamps), of a dirty bitmap in words, of the EPT's PDEs, of its PDPTEs."""
    n = gpa_pages(total_pages)
    return n, -(-n // 64), -(-n // TABLE_PAGES), -(-n // TABLE_PAGES**2)


def segment_bytes(total_pages: int) -> int:
    """Bytes of a VM's segment: EPT and stamps over two nodes/tiers of the VM's whole size, and the bitmaps."""
    leaves, bitmap, pdes, pdptes = _sizes(total_pages)
    return 8 * (2 * leaves + _BITMAPS * bitmap + 1) + pdes + pdptes


def view_segment(buffer: memoryview | bytearray, total_pages: int) -> VmMemory:
    """The arrays of a segment laid over ``buffer`` (no copy)."""
    leaves, bitmap, pdes, pdptes = _sizes(total_pages)
    words = np.frombuffer(buffer, np.int64, 2 * leaves + _BITMAPS * bitmap + 1)
    bitmaps = words[2 * leaves : -(bitmap + 1)].reshape(-1, bitmap)
    upper = np.frombuffer(buffer, np.uint8, pdes + pdptes, words.nbytes)
    return VmMemory(
        ept=words[:leaves],
        stamps=words[leaves : 2 * leaves],
        ept_upper=upper,
        ept_pde=upper[:pdes],
        ept_pdpte=upper[pdes:],
        dirty=bitmaps[:2],
        walk=bitmaps[2:],
        believed=words[-(bitmap + 1) :],
        pebs=np.zeros(0, np.int64),
    )
