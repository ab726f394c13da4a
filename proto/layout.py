"""Layout of a VM's shared segment, of host operations, and of event records.

One segment (a sealed memfd) per VM, mapped by the host and by that guest only: its EPT and the stamps of its frames. A
VM's frames are a window of host-physical memory: slot s of the window is hPA frame ``window + s``; slots below
`fast_capacity` are fast, the others slow. Capacity is the VM's whole memory in each tier (as the double balloon sizes
its nodes), of which the provisioner backs only a share; untouched slots cost nothing.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from proto.entry import Entries
from proto.units import TABLE_PAGES

OP_FLUSH = 1
"""Request a flush of every vCPU (kvm_flush_remote_tlbs)."""
OP_ZAP = 2
"""Zap the leaf entries of gPA frames [a, a + b), then request one flush if any was present."""
OP_MOVE = 3
"""Zap gPA frame a, flush, copy its content to frame slot b, to be mapped there at its next fault."""

OP_STALL = 4
"""vCPU a is outside guest mode for b ps: its thread works for the host (task_work before it enters again)."""
OP_SWAP = 5
"""Zap gPA frames a and b, flush once, exchange their contents' places, to be mapped there at their next faults."""

OPERATION = np.dtype([
    ("time_ps", "<i8"), ("kind", "<i4"), ("flags", "<i4"), ("a", "<i8"), ("b", "<i8"), ("hold_ps", "<i8"),
    ("busy_ps", "<i8"),
])  # fmt: skip
"""A host operation on a VM at a virtual time. ``flags``: PROTNONE or 0, for OP_ZAP (set on slow leaves) and OP_MOVE.
``hold_ps``: how long its flush request holds mmu_lock; ``busy_ps``: how long EPT violations of its frames have to wait.
"""

EVENT = np.dtype(
    [("time_ps", "<i8"), ("vm", "<i4"), ("kind", "<i4"), ("gva", "<i8"), ("source", "<i4"), ("target", "<i4")]
)
"""A line of events.parquet: kind is an index into EVENT_KINDS; source and target are tiers or node numbers."""
EVENT_KINDS = ("promote", "demote", "phase")


class VmMemory(NamedTuple):
    """Views into a VM's shared segment."""

    ept: Entries
    """int64[gpa_pages]: gPA frame -> frame slot with flags."""
    stamps: npt.NDArray[np.int64]
    """int64[slots]: content stamp of each frame of the VM's window."""
    ept_pde: npt.NDArray[np.uint8]
    """uint8[gpa_pages / 512]: EPT entries above the leaves: A, D and HUGE bits."""
    ept_pdpte: npt.NDArray[np.uint8]
    """uint8[gpa_pages / 512 / 512, rounded up]: the entries above those, A bits."""


def gpa_pages(total_pages: int) -> int:
    """Size of the gPA space in pages: two guest nodes, each as large as the VM."""
    return 2 * total_pages


def _sizes(total_pages: int) -> tuple[int, int, int]:
    """Length of EPT (and stamps), of the EPT entries above it, and of those above them."""
    n = gpa_pages(total_pages)
    return n, -(-n // TABLE_PAGES), -(-n // TABLE_PAGES**2)


def segment_bytes(total_pages: int) -> int:
    """Bytes of a VM's segment: EPT and stamps over two nodes/tiers of the VM's whole size."""
    leaves, pdes, pdptes = _sizes(total_pages)
    return 16 * leaves + pdes + pdptes


def view_segment(buffer: memoryview | bytearray, total_pages: int) -> VmMemory:
    """The arrays of a segment laid over ``buffer`` (no copy)."""
    leaves, pdes, pdptes = _sizes(total_pages)
    words = np.frombuffer(buffer, np.int64, 2 * leaves)
    upper = np.frombuffer(buffer, np.uint8, pdes + pdptes, 16 * leaves)
    return VmMemory(words[:leaves], words[leaves:], upper[:pdes], upper[pdes:])
