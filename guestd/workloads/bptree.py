"""A B+ tree in a guest's memory: the index of `btree` and `silo`, built by inserting, searched by descending.

Nodes have the program's layout (header, sorted keys, pointers) and lie in memory in the order in which splits
allocated them, leaves and inner nodes alike. A full node splits in half; one that is appended to at the right edge of
the tree stays full, and the new node begins with the new key, as in Masstree (Mao et al., EuroSys'12).

What a guest's process holds of a node: keys and children as 4-byte numbers, and how many nodes were allocated before
it, side by side. It holds no pointers from leaves to records: a record lies where the program put it when it inserted
the key, which the key itself tells (`btree`: by the inverse of the shuffle, `silo`: it is the key). Keys are below
2**31.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.jit import assume, inline, int64, kernel, prefetch
from proto.arrays import Ints, Words
from proto.units import LINE_SIZE, PAGE_SHIFT

Halves = npt.NDArray[np.uint32]

KEY_BITS = 31
EMPTY = (1 << 32) - 1
"""Key of a slot that is not in use; above all keys, so that counting keys needs no look at how many there are."""
MAX_ORDER = 128
MAX_HEIGHT = 30
LEAF = MAX_HEIGHT + 1
_FULLNESS = 72
BATCH = 16
"""Searches that descend side by side, so that this machine overlaps their cache misses."""

ROOT, HEIGHT, LEAVES, INNERS, KEYS = range(5)
"""Fields of the state; a tree of height 0 is one leaf."""


class Shape(NamedTuple):
    """How the program lays a node out."""

    order: int
    """Most children of an inner node; keys of any node: one less."""
    keys_at: int
    """Byte offset of the keys, 8 bytes each."""
    pointers_at: int
    node_bytes: int


class Tree(NamedTuple):
    """A tree. A row begins with its keys, ascending, then EMPTY; behind them is the node's number in allocation."""

    leaves: Halves
    """uint32[n, order] flattened"""
    inners: Halves
    """uint32[n, 2 * order] flattened: a row ends with the children: inner nodes, or leaves on the level above these."""
    state: Words
    nodes: int
    """Most nodes it may have."""
    order: int
    keys_at: int
    pointers_at: int
    node_bytes: int
    base: int
    """Dense byte address of the first node."""


class Touch(NamedTuple):
    """First touches of regions that are filled from their beginning to their end."""

    order: Ints
    """int32[...]: dense pages in the order of first touch."""
    known: Words
    """int64[1]"""
    first: Words
    """int64[regions]: first page of each."""
    touched: Words
    """int64[regions]: pages touched of each."""


def aligned_shape(order: int) -> Shape:
    """Header, keys and pointers each begin a line of their own (mitosis-workload-btree allocates them so)."""

    def lines(size: int) -> int:
        return -(-size // LINE_SIZE) * LINE_SIZE

    pointers = LINE_SIZE + lines(8 * (order - 1))
    return Shape(order, LINE_SIZE, pointers, pointers + lines(8 * order))


def nodes_for(shape: Shape, keys: int, shuffled: bool) -> int:
    """Nodes that so many keys take: all full if they come in order, else 72 % on average (68 to 80 %, by order)."""
    leaf = (shape.order - 1) * (_FULLNESS if shuffled else 100)
    children = shape.order * (_FULLNESS if shuffled else 100)
    leaves = -(-keys * 100 // leaf)
    return leaves + leaves * 100 // (children - 100) + 1


def new_tree(shape: Shape, base: int, nodes: int) -> Tree:
    """An empty tree of at most so many nodes; memory is taken as they are used. ``base``: dense byte address."""
    leaves = _aligned(nodes * shape.order)
    inners = _aligned((nodes // 2 + MAX_HEIGHT) * 2 * shape.order)
    return Tree(leaves, inners, np.zeros(5, np.int64), nodes, *shape, base)


def _aligned(size: int) -> Halves:
    """Zeros that begin a cache line of this machine: a row is in as few of them as can be."""
    words = np.zeros(size + LINE_SIZE // 4, np.uint32)
    skip = -words.ctypes.data % LINE_SIZE // 4
    return words[skip : skip + size]


@inline
def touch_until(touch: Touch, region: int, end_byte: int) -> None:
    """The program has written the region's first ``end_byte`` bytes."""
    while touch.touched[region] << PAGE_SHIFT < end_byte:
        touch.order[touch.known[0]] = touch.first[region] + touch.touched[region]
        touch.known[0] += 1
        touch.touched[region] += 1


@inline
def count_up_to(keys: Halves, row: int, width: int, key: int) -> int:
    """Keys of a row that are at most ``key``: the child to go to, or the slot behind the key. Without branches."""
    assume(row >= 0)
    found = 0
    for i in range(width):
        found += 1 if int64(keys[row + i]) <= key else 0
    return found


@inline
def step_of(keys: Halves, row: int, width: int, slot: int) -> int:
    """A step of a search that ends at ``slot`` of a node: (node << 16 | keys in it << 8 | slot)."""
    return int64(keys[row + width]) << 16 | count_up_to(keys, row, width, EMPTY - 1) << 8 | slot


@inline
def _allocate(tree: Tree, leaf: bool, touch: Touch) -> int:
    """A new node with no key; its number among leaves, or among inner nodes."""
    state, width = tree.state, tree.order - 1
    node = state[LEAVES] + state[INNERS]
    touch_until(touch, 0, (node + 1) * tree.node_bytes)
    number = state[LEAVES] if leaf else state[INNERS]
    rows = tree.leaves if leaf else tree.inners
    row = number * tree.order if leaf else number * 2 * tree.order
    for i in range(row, row + width):
        rows[i] = EMPTY
    rows[row + width] = node
    state[LEAVES if leaf else INNERS] += 1
    return number


@kernel
def _insert_leaf(tree: Tree, leaf: int, key: int, edge: bool, touch: Touch) -> int:
    """Insert into a leaf; returns the new leaf that a split made, or -1. ``edge``: it is the last leaf."""
    order = tree.order
    width = order - 1
    keys = tree.leaves
    row = leaf * order
    slot = count_up_to(keys, row, width, key)
    right = -1
    if keys[row + width - 1] != EMPTY:
        right = _allocate(tree, True, touch)
        half = (width + 1) // 2
        keep = width if edge and slot == width else half if slot >= half else half - 1
        for i in range(keep, width):
            keys[right * order + i - keep] = keys[row + i]
            keys[row + i] = EMPTY
        if slot >= half:
            row, slot = right * order, slot - keep
    for i in range(width - 1, slot, -1):
        keys[row + i] = keys[row + i - 1]
    keys[row + slot] = key
    return right


@kernel
def _insert_inner(tree: Tree, inner: int, slot: int, key: int, child: int, edge: bool, touch: Touch) -> tuple[int, int]:
    """Insert ``child`` behind child ``slot``, ``key`` between them; (new inner node or -1, the key that moves up)."""
    order = tree.order
    width = order - 1
    rows = tree.inners
    row = inner * 2 * order
    right, up = -1, 0
    if rows[row + width - 1] != EMPTY:
        right = _allocate(tree, False, touch)
        new = right * 2 * order
        # The left node keeps ``keep`` keys and one child more; the key behind them moves up.
        keep = width if edge and slot == width else width // 2
        if keep == width:
            rows[new + order] = child
            return right, key
        up = int64(rows[row + keep])
        for i in range(keep + 1, width):
            rows[new + i - keep - 1] = rows[row + i]
        for i in range(keep + 1, order):
            rows[new + order + i - keep - 1] = rows[row + order + i]
        for i in range(keep, width):
            rows[row + i] = EMPTY
        if slot > keep:
            row, slot = new, slot - keep - 1
    for i in range(width - 1, slot, -1):
        rows[row + i] = rows[row + i - 1]
        rows[row + order + i + 1] = rows[row + order + i]
    rows[row + slot] = key
    rows[row + order + slot + 1] = child
    return right, up


@kernel
def _insert(tree: Tree, key: int, touch: Touch, path: Words) -> int:
    """Insert a key from the root; returns the leaf that a split made, or -1. ``path``: int64[2 * MAX_HEIGHT]."""
    state, order = tree.state, tree.order
    width = order - 1
    if state[KEYS] == 0:
        state[ROOT] = _allocate(tree, True, touch)
    state[KEYS] += 1
    node = state[ROOT]
    edge = True
    height = state[HEIGHT]
    for level in range(height):
        row = node * 2 * order
        slot = count_up_to(tree.inners, row, width, key)
        edge = edge and (slot == width or tree.inners[row + slot] == EMPTY)
        path[2 * level], path[2 * level + 1] = node, slot
        node = int64(tree.inners[row + order + slot])
    new_leaf = right = _insert_leaf(tree, node, key, edge, touch)
    if right < 0:
        return -1
    up = int64(tree.leaves[right * order])
    for level in range(height - 1, -1, -1):
        right, up = _insert_inner(tree, path[2 * level], path[2 * level + 1], up, right, edge, touch)
        if right < 0:
            return new_leaf
    root = _allocate(tree, False, touch)
    row = root * 2 * order
    tree.inners[row] = up
    tree.inners[row + order] = state[ROOT]
    tree.inners[row + order + 1] = right
    state[ROOT] = root
    state[HEIGHT] += 1
    return new_leaf


@kernel
def descend(tree: Tree, keys: Words, paths: Words) -> None:
    """Search for ``keys`` (int64[k], k <= BATCH) side by side.

    ``paths``: int64[>= k, MAX_HEIGHT + 2]: the steps, and at LEAF the number of the leaf. In inner nodes a step's slot
    is the child; in the leaf it is that behind the key, and 0 if the key lies below all of its keys.
    """
    order, height = tree.order, tree.state[HEIGHT]
    width = order - 1
    for j in range(keys.size):
        paths[j, LEAF] = tree.state[ROOT]
    for level in range(height):
        rows = tree.inners if level + 1 < height else tree.leaves
        size = 2 * order if level + 1 < height else order
        for j in range(keys.size):
            row = paths[j, LEAF] * 2 * order
            slot = count_up_to(tree.inners, row, width, keys[j])
            child = int64(tree.inners[row + order + slot])
            paths[j, level], paths[j, LEAF] = step_of(tree.inners, row, width, slot), child
            for ahead in range(0, size, LINE_SIZE // 4):
                prefetch(rows, child * size + ahead)
            prefetch(rows, child * size + size - 1)
    for j in range(keys.size):
        row = paths[j, LEAF] * order
        slot = count_up_to(tree.leaves, row, width, keys[j])
        paths[j, height] = step_of(tree.leaves, row, width, slot)


@kernel
def insert(tree: Tree, keys: Words, touch: Touch, record_bytes: int, paths: Words) -> None:
    """Insert ``keys`` (int64[k], k <= BATCH), none of which is in the tree, one after the other.

    Their leaves are searched for side by side beforehand; the path to a leaf that splits is looked up again.
    ``touch``: first touches of nodes (region 0) and of records (region 1), of which the program allocates one of
    ``record_bytes`` before it inserts a key. ``paths``: int64[BATCH + 2, MAX_HEIGHT + 2], scratch.
    """
    order = tree.order
    width = order - 1
    path = paths[BATCH:].reshape(-1)
    if tree.state[KEYS] == 0:
        touch_until(touch, 1, record_bytes)
        _insert(tree, keys[0], touch, path)
        keys = keys[1:]
    descend(tree, keys, paths)
    for j in range(keys.size):
        touch_until(touch, 1, (tree.state[KEYS] + 1) * record_bytes)
        leaf = paths[j, LEAF]
        row = leaf * order
        assume(row >= 0)
        if tree.leaves[row + width - 1] == EMPTY:
            slot = count_up_to(tree.leaves, row, width, keys[j])
            for i in range(width - 1, slot, -1):
                tree.leaves[row + i] = tree.leaves[row + i - 1]
            tree.leaves[row + slot] = keys[j]
            tree.state[KEYS] += 1
        else:
            right = _insert(tree, keys[j], touch, path)
            first = int64(tree.leaves[right * order])
            for later in range(j + 1, keys.size):
                if paths[later, LEAF] == leaf and keys[later] >= first:
                    paths[later, LEAF] = right
