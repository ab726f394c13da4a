"""Lookups of random keys in a B+ tree: the in-memory index of mitosis-workload-btree (Memtis's and Demeter's "btree").

An array of 64-byte elements is filled, its keys are shuffled, and each is inserted: a 32-byte record is allocated, then
the key goes into the tree, whose nodes (header, keys and pointers in lines of their own; order 6) splits allocate in
between. So the hot upper levels lie scattered over the memory of the nodes, as they came into being. vCPUs then look up
keys, each its own: down the tree by binary search in each node, the record (a counter in it is raised), the element.
Every lookup finds its key.

The tree is built by inserting (guestd/workloads/bptree.py), in shuffled order or, with ``load = "sorted"``, in order.
Of the program's 164 bytes a key, a guest's process holds 11: the keys of leaves and inner nodes, and children. Elements
and records are numbers only. First touch: the elements, then records and nodes as the insertions allocate them.
"""

import numpy as np

from guestd.address_space import AddressSpace, heap_region, mmap_regions
from guestd.jit import assume, int64, kernel
from guestd.params import Param, resolve
from guestd.random import State, next_u64
from guestd.workloads.base import MIB, ROOM, Buffer, WorkloadType
from guestd.workloads.bptree import (
    BATCH,
    HEIGHT,
    KEY_BITS,
    KEYS,
    MAX_HEIGHT,
    MAX_ORDER,
    Tree,
    aligned_shape,
    descend,
    new_tree,
    nodes_for,
    step_of,
)
from guestd.workloads.indexed import (
    DRAWN,
    NEXT,
    SEARCH_ACCESSES,
    STEP_ACCESSES,
    Indexed,
    emit_step,
    heat_step,
)
from guestd.workloads.scramble import Scrambler, new_scrambler, scramble
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.trace import LOAD, MODIFY
from proto.units import PAGE_SHIFT, PAGE_SIZE

PARAMS = (
    Param("footprint", 0.875, "share of memory", "size of tree, records and elements", "as gups", (), 0.05, 0.95),
    Param("order", 6, "children", "most children of a node", "mitosis-workload-btree, config.h", (), 4, MAX_ORDER),
    Param("load", "shuffled", "", "order in which keys are inserted", "mitosis-workload-btree, btree1.c",
          ("shuffled", "sorted")),
    Param("mlp", 1.3, "misses", "memory-level parallelism of a vCPU", "estimated: one lookup is a chain of loads",
          (), 1.0, 16.0),
    Param("think_ns", 1.5, "ns", "compute per access", "estimated: two comparisons, of which some are mispredicted", (),
          0.0, 1e6),
)  # fmt: skip

RECORD, ELEMENT = 32, 64


@kernel
def _look_up(tree: Tree, names: Scrambler, shuffled: bool, records: int, elements: int, rng: State, state: Words,
             lookups: Words, paths: Words, address: Words, kind: Bytes) -> int:  # fmt: skip
    """Emit whole lookups while the next one is sure to fit; returns how many accesses they are."""
    height, count = tree.state[HEIGHT], tree.state[KEYS]
    keys = paths[BATCH]
    at = 0
    end = address.size - (height + 1) * STEP_ACCESSES - 2
    while at <= end:
        assume(at >= 0)
        if state[NEXT] == state[DRAWN]:
            for j in range(BATCH):
                lookups[j] = (int64(next_u64(rng) >> np.uint64(32)) * count) >> 32
                keys[j] = scramble(names, lookups[j]) if shuffled else lookups[j]
            descend(tree, keys[:BATCH], paths)
            state[NEXT], state[DRAWN] = 0, BATCH
        which = state[NEXT]
        start = at
        for level in range(height + 1):
            at = emit_step(tree, paths[which, level], level == height, address, at)
        for i in range(start, at):
            kind[i] = LOAD
        address[at], kind[at] = records + RECORD * lookups[which], MODIFY
        address[at + 1], kind[at + 1] = elements + ELEMENT * lookups[which], LOAD
        at += 2
        state[NEXT] += 1
    return at


@kernel
def _heat_leaves(tree: Tree, weight: Words, heat: Words, scratch: Words) -> None:
    """Add what one search for each key touches in the leaves; ``weight``: int64[leaves] to fill."""
    for leaf in range(weight.size):
        first = step_of(tree.leaves, leaf * tree.order, tree.order - 1, 0)
        weight[leaf] = (first >> 8) & 0xFF
        for slot in range(1, weight[leaf] + 1):
            heat_step(tree, first | slot, True, 1, heat, scratch)


class BTree(Indexed):
    """See the module."""

    steady = True

    def __init__(self, config: GuestConfig) -> None:
        params = resolve(PARAMS, config.workload_params)
        shape = aligned_shape(int(params["order"]))
        shuffled = params["load"] == "shuffled"
        total_bytes = int(config.total_pages * float(params["footprint"])) * PAGE_SIZE
        per_million = (RECORD + ELEMENT) * 10**6 + nodes_for(shape, 10**6, shuffled) * shape.node_bytes
        count = min(total_bytes * 10**6 // per_million, 1 << KEY_BITS)
        # Room for a tenth more nodes than expected; what is not needed is never touched.
        nodes = nodes_for(shape, count, shuffled) * (11 if shuffled else 10) // 10 + MAX_HEIGHT
        pages = [-(-size // PAGE_SIZE) for size in (nodes * shape.node_bytes, RECORD * count, ELEMENT * count)]
        self.space = AddressSpace(
            [heap_region("nodes", pages[0], config.seed),
             *mmap_regions([("elements", pages[2]), ("records", pages[1])], config.seed)]
        )  # fmt: skip
        first = {vma.name: self.space.first_page(vma.name) for vma in self.space.vmas}
        self.elements = first["elements"] << PAGE_SHIFT
        super().__init__(config, new_tree(shape, first["nodes"] << PAGE_SHIFT, nodes), first["records"] << PAGE_SHIFT,
                         RECORD, count, new_scrambler(config.seed, KEY_BITS), shuffled,
                         first["elements"] + np.arange(pages[2]))  # fmt: skip
        self._lookups = np.zeros((config.vcpus, BATCH), np.int64)
        self.mlp = float(params["mlp"])
        self.think_ps = round(float(params["think_ns"]) * 1000)

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        self.finish()
        count = int(_look_up(self.tree, self.names, self.shuffled, self.records, self.elements, self.rng[vcpu],
                             self.state[vcpu], self._lookups[vcpu], self.paths[vcpu], buffer.address,
                             buffer.kind))  # fmt: skip
        buffer.think_ps[:count] = self.think_ps
        self.llc.mark(buffer.address[:count], buffer.kind[:count])
        return count

    def leaf_heat(self, weight: Words, heat: Words, scratch: Words) -> None:
        """One search for each key."""
        _heat_leaves(self.tree, weight, heat, scratch)

    def heat(self) -> Words | None:
        """Accesses of one lookup of each key."""
        heat = self.tree_heat()
        keys = int(self.tree.state[KEYS])
        for base, size in ((self.records, RECORD), (self.elements, ELEMENT)):
            starts = np.arange(-(-keys * size // PAGE_SIZE)) * (PAGE_SIZE // size)
            heat[(base >> PAGE_SHIFT) + np.arange(starts.size)] = np.minimum(keys - starts, PAGE_SIZE // size)
        return heat


TYPE = WorkloadType("btree", "lookups of random keys in a B+ tree", PARAMS, BTree, 16 * MIB)
assert SEARCH_ACCESSES + 2 < ROOM
