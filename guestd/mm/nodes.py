"""NUMA nodes: free frames, watermarks, page flags, and the lists that hold every page in use.

Frames are numbered over both nodes: node 0 (fast) has frames [0, span), node 1 (slow) [span, 2 span), of which a share
is managed; the rest is as good as ballooned away, so that shares can change later. Watermarks follow Linux
(mm/page_alloc.c, __setup_per_zone_wmarks), with its WMARK_PROMO and the WMARK_DEMOTE of the TPP patches
(demote_scale_factor, 2 %).

A *unit* is what is managed as one: a 4 KiB page, or a huge page, the 512 frames of a block (`guestd.mm.page_alloc`) of
which the first, its *head*, carries F_HUGE and stands for all: on the lists, whose sizes count 512 for it, and wherever
frames of units are asked for. The other 511 have no flags of their own.
"""

from math import isqrt
from typing import NamedTuple

import numpy as np

from guestd.jit import inline, kernel
from guestd.mm.page_alloc import FreeBlocks, give_block, give_frame, new_free_blocks, take_block, take_frame
from proto.arrays import Bytes, Ints, Mask, Words
from proto.units import TABLE_PAGES

FAST, SLOW = 0, 1
WMARK_MIN, WMARK_LOW, WMARK_HIGH, WMARK_DEMOTE, WMARK_PROMO = 0, 1, 2, 3, 4
WMARKS = 5

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
F_HUGE = 1 << 5
"""The head of a huge page."""
F_SHADOW = 1 << 6
"""Keeps the content of a page that is mapped in fast memory (`guestd.mm.shadows`)."""


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
    free: FreeBlocks
    free_count: Words
    """int64[2]"""
    watermark: Words
    """int64[2, WMARKS]: frames."""
    managed: Words
    """int64[2]"""


def new_nodes(span: int, fast_managed: int, slow_managed: int, demote_scale: int = 200) -> Nodes:
    """Nodes with all managed frames free. ``demote_scale``: WMARK_DEMOTE in 1/10000 of managed."""
    frames = 2 * span
    links = np.arange(frames + 4, dtype=np.int32)
    links[:frames] = NO_PAGE
    managed = np.array([fast_managed, slow_managed], np.int64)
    watermark = np.zeros((2, WMARKS), np.int64)
    for node in (FAST, SLOW):
        count = int(managed[node])
        # min_free_kbytes = 4 sqrt(lowmem KiB), shared by size (mm/page_alloc.c, calculate_min_free_kbytes).
        total_kib = 4 * int(managed.sum())
        minimum = min(isqrt(16 * total_kib), 262144) // 4 * count // max(1, int(managed.sum()))
        gap = max(minimum // 4, count // 1000)
        high = minimum + 2 * gap
        demote = min(count, max(2 * high, count * demote_scale // 10000))
        watermark[node] = (minimum, minimum + gap, high, demote, high + gap)
    return Nodes(
        np.full(frames, NO_PAGE, np.int32),
        np.zeros(frames, np.uint8),
        links,
        links.copy(),
        np.zeros(4, np.int64),
        new_free_blocks(span, managed),
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
def unit_size(nodes: Nodes, frame: int) -> int:
    """Frames of the unit that ``frame`` stands for."""
    return TABLE_PAGES if (nodes.flags[frame] & F_HUGE) != 0 else 1


@inline
def take_free(nodes: Nodes, node: int, keep: int) -> int:
    """Take a free frame of ``node`` if more than ``keep`` are free, else NO_PAGE."""
    if nodes.free_count[node] <= keep:
        return NO_PAGE
    nodes.free_count[node] -= 1
    return take_frame(nodes.free, node, nodes.page.size >> 1)


@inline
def take_free_block(nodes: Nodes, node: int, keep: int) -> int:
    """Take a free block of ``node``, leaving ``keep`` frames free: its first frame, or NO_PAGE."""
    if nodes.free_count[node] - (TABLE_PAGES - 1) <= keep:
        return NO_PAGE
    frame = take_block(nodes.free, node, nodes.page.size >> 1)
    if frame != NO_PAGE:
        nodes.free_count[node] -= TABLE_PAGES
    return frame


@inline
def give_free(nodes: Nodes, frame: int) -> None:
    """Give a frame back to its node."""
    node = node_of(nodes, frame)
    nodes.page[frame] = NO_PAGE
    nodes.flags[frame] = 0
    nodes.free_count[node] += 1
    give_frame(nodes.free, node, nodes.page.size >> 1, frame)


@inline
def give_free_block(nodes: Nodes, frame: int) -> None:
    """Give a block back to its node; ``frame``: its first."""
    node = node_of(nodes, frame)
    for other in range(frame, frame + TABLE_PAGES):
        nodes.page[other] = NO_PAGE
        nodes.flags[other] = 0
    nodes.free_count[node] += TABLE_PAGES
    give_block(nodes.free, node, nodes.page.size >> 1, frame)


@kernel
def give_all_free(nodes: Nodes, frames: Words) -> None:
    """Give frames (int64[n]) back to their nodes."""
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
    nodes.size[which] += unit_size(nodes, frame)
    nodes.flags[frame] = (nodes.flags[frame] & ~F_ACTIVE) | F_LRU | (F_ACTIVE if active else 0)


@inline
def lru_remove(nodes: Nodes, frame: int) -> None:
    """Take a frame off its list (isolate)."""
    which = 2 * node_of(nodes, frame) + (1 if nodes.flags[frame] & F_ACTIVE else 0)
    after, before = nodes.next[frame], nodes.previous[frame]
    nodes.next[before], nodes.previous[after] = after, before
    nodes.size[which] -= unit_size(nodes, frame)
    nodes.flags[frame] &= ~F_LRU


@kernel
def isolate_tail(nodes: Nodes, node: int, active: int, out: Ints) -> int:
    """Isolate units of up to ``out.size`` pages (int32), or one more page's unit; returns how many units."""
    head = nodes.page.size + 2 * node + active
    count = pages = 0
    while pages < out.size:
        frame = nodes.previous[head]
        if frame == head:
            break
        lru_remove(nodes, frame)
        out[count] = frame
        count += 1
        pages += unit_size(nodes, frame)
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
def mark(nodes: Nodes, frame: int) -> int:
    """mark_page_accessed (mm/swap.c): inactive -> referenced -> active. Returns the pages activated."""
    activated = 0
    if nodes.flags[frame] & F_ACTIVE:
        nodes.flags[frame] |= F_REFERENCED
    elif nodes.flags[frame] & F_REFERENCED:
        if nodes.flags[frame] & F_LRU:
            lru_remove(nodes, frame)
            lru_add(nodes, frame, ACTIVE)
        nodes.flags[frame] &= ~F_REFERENCED
        activated = unit_size(nodes, frame)
    else:
        nodes.flags[frame] |= F_REFERENCED
    return activated


@kernel
def mark_accessed(nodes: Nodes, frames: Ints) -> int:
    """`mark` each frame. Returns the pages activated."""
    activated = 0
    for frame in frames:
        activated += mark(nodes, frame)
    return activated


@kernel
def mark_inactive_accessed(nodes: Nodes, frames: Ints, active: Mask) -> int:
    """`mark_accessed` on the frames that are not active; ``active``: bool[n], which are. Returns the activated."""
    activated = 0
    for i in range(frames.size):
        active[i] = (nodes.flags[frames[i]] & F_ACTIVE) != 0
        if not active[i]:
            activated += mark(nodes, frames[i])
    return activated
