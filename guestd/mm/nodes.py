"""NUMA nodes: free lists, watermarks, page flags, and the lists that hold every page in use.

Frames are numbered over both nodes: node 0 (fast) has frames [0, span), node 1 (slow) [span, 2 span), of which a share
is managed; the rest is as good as ballooned away, so that shares can change later. Watermarks follow Linux
(mm/page_alloc.c, __setup_per_zone_wmarks) plus WMARK_DEMOTE of the TPP patches (demote_scale_factor, 2 %).
"""

from math import isqrt
from typing import NamedTuple

import numpy as np

from guestd.jit import inline, kernel
from proto.arrays import Bytes, Ints, Mask, Words

FAST, SLOW = 0, 1
WMARK_MIN, WMARK_LOW, WMARK_HIGH, WMARK_DEMOTE = 0, 1, 2, 3

INACTIVE, ACTIVE = 0, 1
NO_PAGE = -1

F_LRU = 1 << 0
"""On an LRU list."""
F_ACTIVE = 1 << 1
F_REFERENCED = 1 << 2
F_DEMOTED = 1 << 3
"""Was demoted before (PG_demoted of the TPP patches)."""
F_BUSY = 1 << 4
"""A host operation on it is under way."""


class Nodes(NamedTuple):
    """Frames of both nodes; span = frames of one node, F = 2 span."""

    page: Ints
    """int32[F]: the page that a frame holds (reverse map), or NO_PAGE."""
    flags: Bytes
    """uint8[F]"""
    next: Ints
    """int32[F + 4]: LRU links; the last four are the heads of the lists node * 2 + active."""
    previous: Ints
    size: Words
    """int64[4]: pages on each list."""
    free: Ints
    """int32[F]: stack of free frames per node, from node * span."""
    free_count: Words
    """int64[2]"""
    watermark: Words
    """int64[2, 4]: frames."""
    managed: Words
    """int64[2]"""


def new_nodes(span: int, fast_managed: int, slow_managed: int, demote_scale: int = 200) -> Nodes:
    """Nodes with all managed frames free, lowest first. ``demote_scale``: WMARK_DEMOTE in 1/10000 of managed."""
    frames = 2 * span
    links = np.arange(frames + 4, dtype=np.int32)
    links[:frames] = NO_PAGE
    free = np.zeros(frames, np.int32)
    managed = np.array([fast_managed, slow_managed], np.int64)
    watermark = np.zeros((2, 4), np.int64)
    for node in (FAST, SLOW):
        count = int(managed[node])
        free[node * span : node * span + count] = np.arange(node * span + count - 1, node * span - 1, -1)
        # min_free_kbytes = 4 sqrt(lowmem KiB), shared by size (mm/page_alloc.c, calculate_min_free_kbytes).
        total_kib = 4 * int(managed.sum())
        minimum = min(isqrt(16 * total_kib), 262144) // 4 * count // max(1, int(managed.sum()))
        gap = max(minimum // 4, count // 1000)
        high = minimum + 2 * gap
        demote = min(count, max(2 * high, count * demote_scale // 10000))
        watermark[node] = (minimum, minimum + gap, high, demote)
    return Nodes(
        np.full(frames, NO_PAGE, np.int32),
        np.zeros(frames, np.uint8),
        links,
        links.copy(),
        np.zeros(4, np.int64),
        free,
        managed.copy(),
        watermark,
        managed,
    )


def span_of(nodes: Nodes) -> int:
    """Frames of one node."""
    return nodes.page.size // 2


@inline
def node_of(nodes: Nodes, frame: int) -> int:
    """The node of a frame."""
    return 1 if frame >= nodes.page.size // 2 else 0


@inline
def take_free(nodes: Nodes, node: int, keep: int) -> int:
    """Take a free frame of ``node`` if more than ``keep`` are free, else NO_PAGE."""
    if nodes.free_count[node] <= keep:
        return NO_PAGE
    nodes.free_count[node] -= 1
    return int(nodes.free[node * (nodes.page.size // 2) + nodes.free_count[node]])


@inline
def give_free(nodes: Nodes, frame: int) -> None:
    """Put a frame back on its node's free list."""
    node = node_of(nodes, frame)
    nodes.page[frame] = NO_PAGE
    nodes.flags[frame] = 0
    nodes.free[node * (nodes.page.size // 2) + nodes.free_count[node]] = frame
    nodes.free_count[node] += 1


@kernel
def give_all_free(nodes: Nodes, frames: Ints) -> None:
    """Put frames (int32[n]) back on their nodes' free lists."""
    for frame in frames:
        give_free(nodes, frame)


@inline
def allocate(nodes: Nodes, preferred: int) -> int:
    """A frame in allocation order: above the low watermark on the preferred node, then the other; then above min."""
    for mark in (WMARK_LOW, WMARK_MIN):
        for turn in range(2):
            node = preferred if turn == 0 else 1 - preferred
            frame = take_free(nodes, node, nodes.watermark[node, mark])
            if frame != NO_PAGE:
                return frame
    return NO_PAGE


@inline
def lru_add(nodes: Nodes, frame: int, active: int) -> None:
    """Add a frame at the head of its node's list."""
    which = 2 * node_of(nodes, frame) + active
    head = nodes.page.size + which
    first = nodes.next[head]
    nodes.next[frame], nodes.previous[frame] = first, head
    nodes.previous[first] = frame
    nodes.next[head] = frame
    nodes.size[which] += 1
    nodes.flags[frame] = (nodes.flags[frame] & ~F_ACTIVE) | F_LRU | (F_ACTIVE if active else 0)


@inline
def lru_remove(nodes: Nodes, frame: int) -> None:
    """Take a frame off its list (isolate)."""
    which = 2 * node_of(nodes, frame) + (1 if nodes.flags[frame] & F_ACTIVE else 0)
    after, before = nodes.next[frame], nodes.previous[frame]
    nodes.next[before], nodes.previous[after] = after, before
    nodes.size[which] -= 1
    nodes.flags[frame] &= ~F_LRU


@kernel
def isolate_tail(nodes: Nodes, node: int, active: int, out: Ints) -> int:
    """Isolate up to ``out.size`` frames (int32) from the tail of a list; returns how many."""
    head = nodes.page.size + 2 * node + active
    count = 0
    while count < out.size:
        frame = nodes.previous[head]
        if frame == head:
            break
        lru_remove(nodes, frame)
        out[count] = frame
        count += 1
    return count


@kernel
def put_back(nodes: Nodes, frames: Ints, active: Bytes, referenced: Bytes) -> None:
    """Put isolated frames (int32[n]) on the head of the active or inactive list, with or without PG_referenced."""
    for i in range(frames.size):
        frame = frames[i]
        lru_add(nodes, frame, 1 if active[i] else 0)
        if referenced[i]:
            nodes.flags[frame] |= F_REFERENCED
        else:
            nodes.flags[frame] &= ~F_REFERENCED


@inline
def _mark(nodes: Nodes, frame: int) -> int:
    activated = 0
    if nodes.flags[frame] & F_ACTIVE:
        nodes.flags[frame] |= F_REFERENCED
    elif nodes.flags[frame] & F_REFERENCED:
        if nodes.flags[frame] & F_LRU:
            lru_remove(nodes, frame)
            lru_add(nodes, frame, ACTIVE)
        nodes.flags[frame] &= ~F_REFERENCED
        activated = 1
    else:
        nodes.flags[frame] |= F_REFERENCED
    return activated


@kernel
def mark_accessed(nodes: Nodes, frames: Ints) -> int:
    """mark_page_accessed (mm/swap.c): inactive -> referenced -> active. Returns the number activated."""
    activated = 0
    for frame in frames:
        activated += _mark(nodes, frame)
    return activated


@kernel
def mark_inactive_accessed(nodes: Nodes, frames: Ints, active: Mask) -> int:
    """`mark_accessed` on the frames that are not active; ``active``: bool[n], which are. Returns the activated."""
    activated = 0
    for i in range(frames.size):
        active[i] = (nodes.flags[frames[i]] & F_ACTIVE) != 0
        if not active[i]:
            activated += _mark(nodes, frames[i])
    return activated
