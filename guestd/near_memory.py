"""Flat memory mode: the memory controller swaps 64-byte lines between DRAM and CXL memory, transparently below hPA.

Intel Flat Memory Mode as Memstrata (OSDI'24) describes it, at 1:1: the line of a fast frame and that of the slow frame
of the same number share one line of DRAM, and whichever of them missed last is there. A *contended* pair is one whose
frames are both used; where the partner is unused, a frame is *dedicated* and, once it is there, always hits. A VM's
frames are a window of hPA of its own, which is what page colouring is for: pairs contend inside a VM only. Content is
not moved here: a frame's stamp stays that of its hPA. Left out: walks, records and the kernel's small writes, which are
priced by where their frame lies and swap nothing, and what the controller's own bookkeeping of lines costs.
"""

from guestd.jit import inline, int64
from proto.arrays import Words
from proto.units import LINE_SIZE, PAGE_SHIFT

LINE_SHIFT = LINE_SIZE.bit_length() - 1
LINES = 1 << (PAGE_SHIFT - LINE_SHIFT)
"""Lines of a page: the bits of a word of the state. Bit set = the slow frame's line is in DRAM."""


@inline
def misses(near: Words, slow_frames: int, frame: int, address: int) -> int:
    """1 if the line at ``address`` of ``frame`` is not in DRAM, else 0. ``near``: int64[pairs], the mode's state."""
    slow = 1 if frame >= slow_frames else 0
    line = (address >> LINE_SHIFT) & (LINES - 1)
    return int(((near[frame - slow * slow_frames] >> line) & 1) ^ slow)


@inline
def may_swap(budget: Words) -> bool:
    """Whether the quantum has bandwidth left for a swap, which moves a line each way in both tiers."""
    return bool(budget[0, 0] > 0 and budget[0, 1] > 0 and budget[1, 0] > 0 and budget[1, 1] > 0)


@inline
def swap_in(near: Words, slow_frames: int, frame: int, address: int, budget: Words, read_bytes: Words,
            write_bytes: Words, local: int) -> None:  # fmt: skip
    """The line missed, and takes the place of its partner's; what is moved beside the read of it from slow memory."""
    slow = 1 if frame >= slow_frames else 0
    near[frame - slow * slow_frames] ^= int64(1) << ((address >> LINE_SHIFT) & (LINES - 1))
    budget[1, 0] -= write_bytes[0, local]
    budget[0, 0] -= read_bytes[0, local]
    budget[1, 1] -= write_bytes[1, local]


@inline
def copy_page(near: Words, slow_frames: int, frame: int, write: int, budget: Words) -> None:
    """The host reads or writes all of ``frame``: each line that is not in DRAM is swapped in first."""
    slow = 1 if frame >= slow_frames else 0
    missed = int64(0)
    for line in range(LINES):
        missed += ((near[frame - slow * slow_frames] >> line) & 1) ^ slow
    near[frame - slow * slow_frames] = -slow
    for way in range(2):
        budget[way, 0] -= LINE_SIZE * missed
        budget[way, 1] -= LINE_SIZE * missed
    budget[write, 0] -= LINE_SIZE * (LINES if write == 1 else LINES - missed)
