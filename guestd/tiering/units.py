"""What migration, split and collapse do to the nodes: units change frames, and what stands for them on the lists.

A unit is known by the frame of its head (`guestd.mm.nodes`). Linux: mm/migrate.c, mm/huge_memory.c (__split_huge_page),
mm/khugepaged.c (collapse_huge_page).
"""

from guestd.jit import inline
from guestd.meter import metered
from guestd.mm.nodes import (
    ACTIVE,
    F_ACTIVE,
    F_BUSY,
    F_DEMOTED,
    F_HUGE,
    F_LRU,
    F_REFERENCED,
    FAST,
    INACTIVE,
    NO_PAGE,
    SLOW,
    WMARK_MIN,
    Nodes,
    lru_add,
    lru_remove,
    node_of,
    take_free,
    take_free_block,
    unit_size,
)
from guestd.tiering.pages import MAPPED, Pdes, frame_of
from proto.arrays import Ints, Mask, Words
from proto.entry import ACCESSED, HUGE, YOUNG
from proto.units import TABLE_PAGES, TABLE_SHIFT

NO_ROOM = -2
"""In place of a target: the unit could have moved, but the node has no frame, or no block, for it."""


@inline
def target_for(nodes: Nodes, frame: int, node: int, keep: int) -> int:
    """Take a free frame of ``node`` (of a huge page a block) for the unit of ``frame``; see `pick_targets`."""
    target = NO_PAGE
    if frame != NO_PAGE and (nodes.flags[frame] & F_BUSY) == 0 and node_of(nodes, frame) != node:
        huge = (nodes.flags[frame] & F_HUGE) != 0
        target = take_free_block(nodes, node, keep) if huge else take_free(nodes, node, keep)
        if target == NO_PAGE:
            target = NO_ROOM
    return target


@metered
def pick_targets(nodes: Nodes, frames: Ints, node: int, keep: int, out: Ints) -> None:
    """Take free frames of ``node`` for each unit: the first of them, or NO_ROOM; NO_PAGE where it cannot move."""
    for i in range(frames.size):
        out[i] = target_for(nodes, frames[i], node, keep)


@inline
def relink_unit(nodes: Nodes, frame: int, target: int, node: int) -> None:
    """See `relink`."""
    flags = nodes.flags[frame]
    if flags & F_LRU:
        lru_remove(nodes, frame)
    for j in range(unit_size(nodes, frame)):
        nodes.page[target + j] = nodes.page[frame + j]
        nodes.page[frame + j] = NO_PAGE
    nodes.flags[frame] = 0
    nodes.flags[target] = (flags & F_HUGE) | (F_DEMOTED if node == SLOW else 0)
    lru_add(nodes, target, ACTIVE if (flags & F_ACTIVE) and node == FAST else INACTIVE)


@metered
def relink(nodes: Nodes, frames: Ints, targets: Ints, node: int) -> None:
    """The units of ``frames`` now live in ``targets``: reverse map, flags and LRU list follow."""
    for i in range(frames.size):
        relink_unit(nodes, frames[i], targets[i], node)


@metered
def relink_pairs(nodes: Nodes, first: Ints, second: Ints) -> None:
    """The units of both frames of each pair, of one size, trade places, each keeping its active bit.

    That a page was seen once on its list, or came down by demotion, does not stay with the frame.
    """
    for i in range(first.size):
        a, b = first[i], second[i]
        flags_a, flags_b = nodes.flags[a], nodes.flags[b]
        for frame in (a, b):
            if nodes.flags[frame] & F_LRU:
                lru_remove(nodes, frame)
            nodes.flags[frame] &= ~(F_REFERENCED | F_DEMOTED)
        for j in range(unit_size(nodes, a)):
            nodes.page[a + j], nodes.page[b + j] = nodes.page[b + j], nodes.page[a + j]
        lru_add(nodes, a, 1 if flags_b & F_ACTIVE else 0)
        lru_add(nodes, b, 1 if flags_a & F_ACTIVE else 0)


@metered
def split(nodes: Nodes, heads: Ints) -> None:
    """Huge pages become 512 pages each, with their flags, where they are on a list or off it (lru_add_page_tail)."""
    for head in heads:
        flags = nodes.flags[head] & ~F_HUGE
        nodes.flags[head] = flags
        for frame in range(head + 1, head + TABLE_PAGES):
            nodes.flags[frame] = flags & (F_LRU | F_ACTIVE | F_REFERENCED | F_DEMOTED)
            if flags & F_LRU:
                after = nodes.next[frame - 1]
                nodes.next[frame - 1], nodes.previous[frame] = frame, frame - 1
                nodes.next[frame], nodes.previous[after] = after, frame


@metered
def collapse(nodes: Nodes, frames: Ints, target: int) -> None:
    """The pages of 512 ``frames`` become one huge page in the block from ``target`` on, which is inactive."""
    listed = False
    for i in range(TABLE_PAGES):
        frame = frames[i]
        if nodes.flags[frame] & F_LRU:
            lru_remove(nodes, frame)
            listed = True
        nodes.page[target + i] = nodes.page[frame]
        nodes.page[frame] = NO_PAGE
        nodes.flags[frame] = 0
    nodes.flags[target] = F_HUGE
    if listed:
        lru_add(nodes, target, INACTIVE)


@metered
def collapsible(table: Words, pde: Pdes, nodes: Nodes, first_pages: Words, out: Mask) -> int:
    """Which 512 pages have frames of one node, and were accessed, one at least; returns the entries visited."""
    half = nodes.page.size // 2
    visited = 0
    for i in range(first_pages.size):
        head = first_pages[i]
        number = head >> TABLE_SHIFT
        visited += 1
        out[i] = False
        if pde[number] == 0 or (pde[number] & HUGE) != 0:
            continue
        node = frame_of(table[head]) >= half
        able, young = True, False
        for page in range(head, head + TABLE_PAGES):
            visited += 1
            entry = table[page]
            able = (entry & MAPPED) != 0 and (frame_of(entry) >= half) == node
            if not able:
                break
            referenced = (nodes.flags[frame_of(entry)] & F_REFERENCED) != 0
            young = young or referenced or (entry & (ACCESSED | YOUNG)) != 0
        out[i] = able and young
    return visited


@metered
def take_block_for(nodes: Nodes, frames: Ints) -> int:
    """A free block of the node that all 512 ``frames`` are on, to collapse them into, or NO_PAGE."""
    half = nodes.page.size // 2
    node = 1 if frames[0] >= half else 0
    for frame in frames:
        if frame == NO_PAGE or (1 if frame >= half else 0) != node or (nodes.flags[frame] & F_BUSY) != 0:
            return NO_PAGE
    return take_free_block(nodes, node, nodes.watermark[node, WMARK_MIN])


def is_huge(nodes: Nodes, frames: Ints) -> Mask:
    """Which frames are heads of huge pages; NO_PAGE is none (bool[n])."""
    return ((nodes.flags[frames] & F_HUGE) != 0) & (frames != NO_PAGE)


def frame_sizes(nodes: Nodes, frames: Ints) -> Words:
    """Pages of each unit: 1 or 512 (int64[n])."""
    return is_huge(nodes, frames) * (TABLE_PAGES - 1) + 1
