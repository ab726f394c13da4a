"""The B+ tree once more, in plain Python: the same splits and the same order of allocation, nothing shared."""

from __future__ import annotations

from bisect import bisect_right

from guestd.workloads.bptree import Shape

Step = tuple[int, int, int]
"""Allocation number of a node, keys in it, slot."""


class Node:
    """A node; a leaf has no children."""

    def __init__(self, number: int, keys: list[int], children: list[Node]) -> None:
        self.number, self.keys, self.children = number, keys, children


class PlainTree:
    """A tree into which keys are inserted one by one."""

    def __init__(self, order: int) -> None:
        self.width = order - 1
        self.allocated = 0
        self.root = self._node([], [])

    def _node(self, keys: list[int], children: list[Node]) -> Node:
        self.allocated += 1
        return Node(self.allocated - 1, keys, children)

    def insert(self, key: int) -> None:
        """Insert a key that is not there."""
        split = self._insert(self.root, key, True)
        if split:
            up, right = split
            self.root = self._node([up], [self.root, right])

    def _insert(self, node: Node, key: int, edge: bool) -> tuple[int, Node] | None:
        slot = bisect_right(node.keys, key)
        if not node.children:
            node.keys.insert(slot, key)
            if len(node.keys) <= self.width:
                return None
            keep = self.width if edge and slot == self.width else (self.width + 1) // 2
            right = self._node(node.keys[keep:], [])
            del node.keys[keep:]
            return right.keys[0], right
        # Whether the whole path runs along the right edge decides at every level, as the kernel knows it only then.
        edge = edge and self._at_edge(node, key)
        split = self._insert(node.children[slot], key, edge)
        if split is None:
            return None
        up, child = split
        node.keys.insert(slot, up)
        node.children.insert(slot + 1, child)
        if len(node.keys) <= self.width:
            return None
        if edge and slot == self.width:
            right = self._node([], [node.children.pop()])
            return node.keys.pop(), right
        keep = self.width // 2 + (1 if slot <= self.width // 2 else 0)
        right = self._node(node.keys[keep + 1 :], node.children[keep + 1 :])
        middle = node.keys[keep]
        del node.keys[keep:], node.children[keep + 1 :]
        return middle, right

    def _at_edge(self, node: Node, key: int) -> bool:
        while node.children:
            if node.keys and key < node.keys[-1]:
                return False
            node = node.children[-1]
        return True

    def search(self, key: int) -> list[Step]:
        """The steps from the root to the leaf; in the leaf the slot is that behind the last key that is not larger."""
        node, steps = self.root, []
        while True:
            slot = bisect_right(node.keys, key)
            steps.append((node.number, len(node.keys), slot))
            if not node.children:
                return steps
            node = node.children[slot]

    def leaves(self, node: Node | None = None) -> list[Node]:
        """All leaves, in order."""
        node = node or self.root
        if not node.children:
            return [node]
        return [leaf for child in node.children for leaf in self.leaves(child)]

    def node_count(self) -> int:
        """How many nodes were allocated."""
        return self.allocated


def touches(shape: Shape, base: int, steps: list[Step]) -> list[int]:
    """Addresses that a search reads: header, compared keys, pointer of each node; no line twice in a row."""
    found: list[int] = []
    for position, (number, count, slot) in enumerate(steps):
        node = base + number * shape.node_bytes
        wanted = [node]
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            wanted.append(node + shape.keys_at + 8 * middle)
            if middle < slot:
                low = middle + 1
            else:
                high = middle
        pointer = slot - 1 if position == len(steps) - 1 else slot
        wanted.append(node + shape.pointers_at + 8 * pointer)
        for address in wanted:
            if not found or address // 64 != found[-1] // 64:
                found.append(address)
    return found
