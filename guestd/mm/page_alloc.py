"""Free frames of both nodes, kept in blocks of 512 (2 MiB), so that an aligned block can be had as a whole.

It stands for Linux's buddy allocator (mm/page_alloc.c) as far as tiering meets it: orders 0 and 9. Each block has a
bitmap of its free frames and lies on one of two lists of its node: blocks that are wholly free, and blocks that are
partly free. A single frame comes out of a partly free block, lowest first, and only if there is none does it break a
whole one; the last frame to come back makes the block whole again. All of it takes constant time and is deterministic.
Left out: the orders in between, migrate types, per-CPU lists, and compaction, which would make blocks by moving pages.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline, int64, kernel, trailing_zeros
from proto.arrays import Ints, Mask, Words
from proto.units import TABLE_PAGES, TABLE_SHIFT

WHOLE, PARTLY = 0, 1
WORDS = TABLE_PAGES // 64


class FreeBlocks(NamedTuple):
    """Blocks of both nodes, B altogether; those of node 1 are [B / 2, B)."""

    bitmap: Words
    """int64[B, 8]: a bit for each free frame."""
    available: Ints
    """int32[B]: free frames."""
    next: Ints
    """int32[B + 4]: links of the lists; the last four are the heads, 2 * node + WHOLE or PARTLY."""
    previous: Ints


def new_free_blocks(span: int, managed: Words) -> FreeBlocks:
    """All of the first ``managed[node]`` frames of each node (of ``span`` frames) free; lists in order of frame."""
    blocks = 2 * -(-span // TABLE_PAGES)
    links = np.arange(blocks + 4, dtype=np.int32)
    free = FreeBlocks(np.zeros((blocks, WORDS), np.int64), np.zeros(blocks, np.int32), links, links.copy())
    for node in (1, 0):
        first = node * blocks // 2
        bits = np.zeros((blocks // 2, TABLE_PAGES), np.uint8)
        bits.reshape(-1)[: int(managed[node])] = 1
        free.bitmap[first : first + blocks // 2] = np.packbits(bits, axis=1, bitorder="little").view(np.int64)
        free.available[first : first + blocks // 2] = bits.sum(axis=1)
        for block in range(first + blocks // 2 - 1, first - 1, -1):
            if free.available[block]:
                kind = WHOLE if free.available[block] == TABLE_PAGES else PARTLY
                _link_first(free, block, blocks + 2 * node + kind)
    return free


@inline
def _link(free: FreeBlocks, block: int, head: int) -> None:
    first = free.next[head]
    free.next[block], free.previous[block] = first, head
    free.previous[first] = block
    free.next[head] = block


@kernel
def _link_first(free: FreeBlocks, block: int, head: int) -> None:
    _link(free, block, head)


@inline
def _unlink(free: FreeBlocks, block: int) -> None:
    after, before = free.next[block], free.previous[block]
    free.next[before], free.previous[after] = after, before


@inline
def take_frame(free: FreeBlocks, node: int, span: int) -> int:
    """Take one frame of ``node``, which has one."""
    blocks = free.available.size
    head = blocks + 2 * node + PARTLY
    block = int64(free.next[head])
    if block == head:
        block = int64(free.next[head - PARTLY + WHOLE])
        _unlink(free, block)
        _link(free, block, head)
    word = 0
    while free.bitmap[block, word] == 0:
        word += 1
    bits = free.bitmap[block, word]
    free.bitmap[block, word] = bits & (bits - 1)
    free.available[block] -= 1
    if free.available[block] == 0:
        _unlink(free, block)
    return int(
        node * span + ((block - node * (blocks >> 1)) << TABLE_SHIFT) + (word << 6) + int64(trailing_zeros(bits))
    )


@inline
def take_block(free: FreeBlocks, node: int, span: int) -> int:
    """Take a wholly free block of ``node``: its first frame, or -1 if there is none."""
    blocks = free.available.size
    head = blocks + 2 * node + WHOLE
    block = int64(free.next[head])
    frame = int64(-1)
    if block != head:
        _unlink(free, block)
        for word in range(WORDS):
            free.bitmap[block, word] = 0
        free.available[block] = 0
        frame = node * span + ((block - node * (blocks >> 1)) << TABLE_SHIFT)
    return frame


@inline
def give_frame(free: FreeBlocks, node: int, span: int, frame: int) -> None:
    """Give one frame of ``node`` back."""
    blocks = free.available.size
    offset = frame - node * span
    block = node * (blocks >> 1) + (offset >> TABLE_SHIFT)
    free.bitmap[block, (offset & (TABLE_PAGES - 1)) >> 6] |= int64(1) << (offset & 63)
    free.available[block] += 1
    if free.available[block] == 1:
        _link(free, block, blocks + 2 * node + PARTLY)
    elif free.available[block] == TABLE_PAGES:
        _unlink(free, block)
        _link(free, block, blocks + 2 * node + WHOLE)


@inline
def give_block(free: FreeBlocks, node: int, span: int, frame: int) -> None:
    """Give a block that was taken as a whole back; ``frame``: its first."""
    blocks = free.available.size
    block = node * (blocks >> 1) + ((frame - node * span) >> TABLE_SHIFT)
    for word in range(WORDS):
        free.bitmap[block, word] = -1
    free.available[block] = TABLE_PAGES
    _link(free, block, blocks + 2 * node + WHOLE)


def is_free(free: FreeBlocks, span: int) -> Mask:
    """Which frames (bool[2 * span]) are free."""
    bits = np.unpackbits(free.bitmap.view(np.uint8), axis=1, bitorder="little").reshape(2, -1)
    return bits[:, :span].reshape(-1).view(np.bool_)
