"""YCSB on an in-memory key-value store: Silo's (Tu et al., SOSP'13), a Masstree index over a heap of tuples.

Keys are loaded in order: for each a tuple is allocated, then the key goes into the index, a B+ tree with Masstree's
node layout (15 keys, 320 bytes). Tuples have Silo's 24-byte header and YCSBRecordSize = 100 bytes, in 128. Each vCPU
then runs operations of its own: draw a key, descend the index, and read the tuple's lines, or lock it (its first line
is read and written) and overwrite the others. Mixes are YCSB's A, B and C (50, 5 and 0 per cent updates), or Silo's own
20. Keys follow YCSB's scrambled Zipf law: a rank is drawn (guestd/workloads/zipf.py) and scattered over the keys by a
bijection, where YCSB's hash lets ranks collide. The hot spot moves, if ``period`` says so, by a share of the ranks each
time: what was hottest becomes coldest, and what follows takes its place.

The index is built and searched (guestd/workloads/bptree.py). Of the program's 151 bytes a key a guest's process holds
5: the index's keys. Tuples are numbers only. vCPUs do not wait for each other's locks, and nothing is aborted or
logged. First touch: tuples and nodes as the load, by one thread, allocates them.
"""

from typing import NamedTuple

import numpy as np

from guestd.address_space import AddressSpace, mmap_regions
from guestd.jit import assume, inline, int64, kernel
from guestd.params import Param, resolve
from guestd.random import State, next_u64
from guestd.workloads.base import MIB, ROOM, Buffer, WorkloadType, scaled_heat
from guestd.workloads.bptree import (
    BATCH,
    HEIGHT,
    KEY_BITS,
    MAX_HEIGHT,
    Shape,
    Tree,
    descend,
    new_tree,
    nodes_for,
    step_of,
)
from guestd.workloads.indexed import (
    DRAWN,
    NEXT,
    OPERATIONS,
    SEARCH_ACCESSES,
    STEP_ACCESSES,
    Indexed,
    emit_step,
    heat_step,
)
from guestd.workloads.scramble import Scrambler, new_scrambler, scramble, unscramble
from guestd.workloads.zipf import Zipf, draw_rank, mass, new_zipf
from proto.arrays import Bytes, Ints, Words
from proto.config import GuestConfig
from proto.trace import LOAD, MODIFY, STORE
from proto.units import LINE_SIZE, PAGE_SHIFT, PAGE_SIZE

MAX_TUPLE = 4096
PARAMS = (
    Param("footprint", 0.875, "share of memory", "size of index and tuples", "as gups", (), 0.05, 0.95),
    Param("mix", "a", "", "share of updates: a 50 %, b 5 %, c none, silo 20 %", "YCSB; Silo, ycsb.cc",
          ("a", "b", "c", "silo")),
    Param("zipf_s", 0.99, "", "exponent of the law of keys", "YCSB default", (), 0.01, 3.0),
    Param("keys", "scrambled", "", "where the hot keys lie: scattered, or side by side from the first on",
          "YCSB: scrambled", ("scrambled", "ordered")),
    Param("period", 0, "operations", "operations of a vCPU until the hot spot moves; 0 = never", "chosen", (),
          0, 1 << 40),
    Param("move", 0.1, "share of keys", "by how many ranks the hot spot moves", "chosen", (), 0.0, 1.0),
    Param("tuple_bytes", 128, "bytes", "size of a tuple with its header", "Silo: 24 + 100 bytes", (), 32, MAX_TUPLE),
    Param("mlp", 2.0, "misses", "memory-level parallelism of a vCPU",
          "estimated: Masstree prefetches a node's lines, nodes are a chain", (), 1.0, 16.0),
    Param("think_ns", 250.0, "ns", "compute per operation", "estimated: transaction begin, validation and commit", (),
          0.0, 1e6),
)  # fmt: skip

MASSTREE = Shape(order=16, keys_at=32, pointers_at=152, node_bytes=320)
_UPDATES = {"a": 50, "b": 5, "c": 0, "silo": 20}
_DRAW_BITS = 20


class Law(NamedTuple):
    """Which keys are drawn, and what is done to them."""

    zipf: Zipf
    names: Scrambler
    keys: int
    ordered: bool
    period: int
    step: int
    updates: int
    """Share in 1/2**20."""


@inline
def hot_shift(law: Law, operations: int) -> int:
    """By how many ranks the hot spot has moved after so many operations."""
    return 0 if law.period == 0 else (operations // law.period * law.step) % law.keys


@inline
def key_of(law: Law, rank: int, shift: int) -> int:
    """The key of a rank. A bijection of a power of two is repeated until it lands among the keys."""
    key = (rank + shift) % law.keys
    if not law.ordered:
        key = scramble(law.names, key)
        while key >= law.keys:
            key = scramble(law.names, key)
    return key


@inline
def rank_of(law: Law, key: int, shift: int) -> int:
    """The rank of a key."""
    rank = key
    if not law.ordered:
        rank = unscramble(law.names, rank)
        while rank >= law.keys:
            rank = unscramble(law.names, rank)
    return (rank - shift) % law.keys


@kernel
def _operate(tree: Tree, law: Law, tuples: int, tuple_bytes: int, operation_ps: int, rng: State, state: Words,
             update: Words, paths: Words, address: Words, kind: Bytes, think: Ints) -> int:  # fmt: skip
    """Emit whole operations while the next one is sure to fit; returns how many accesses they are."""
    height = tree.state[HEIGHT]
    keys = paths[BATCH]
    at = 0
    end = address.size - (height + 1) * STEP_ACCESSES - tuple_bytes // LINE_SIZE - 2
    while at <= end:
        assume(at >= 0)
        if state[NEXT] == state[DRAWN]:
            for j in range(BATCH):
                drawn = next_u64(rng)
                low = int64(drawn & np.uint64(0xFFFFFFFF))
                rank = draw_rank(law.zipf, int64(drawn >> np.uint64(32)), low & 0xFFF)
                keys[j] = key_of(law, rank, hot_shift(law, state[OPERATIONS]))
                update[j] = 1 if low >> (32 - _DRAW_BITS) < law.updates else 0
                state[OPERATIONS] += 1
            descend(tree, keys[:BATCH], paths)
            state[NEXT], state[DRAWN] = 0, BATCH
        which = state[NEXT]
        start = at
        for level in range(height + 1):
            at = emit_step(tree, paths[which, level], level == height, address, at)
        for i in range(start, at):
            kind[i] = LOAD
            think[i] = 0
        think[start] = operation_ps
        first = tuples + keys[which] * tuple_bytes
        line = first
        while line < first + tuple_bytes:
            address[at] = line
            kind[at] = LOAD if update[which] == 0 else MODIFY if line == first else STORE
            think[at] = 0
            at += 1
            line = (line & ~(LINE_SIZE - 1)) + LINE_SIZE
        state[NEXT] += 1
    return at


@kernel
def _heat_leaves(tree: Tree, law: Law, operations: int, tuples: int, tuple_bytes: int, weight: Words, heat: Words,
                 scratch: Words) -> None:  # fmt: skip
    """Add what operations touch in leaves and tuples, by their probability; ``weight``: int64[leaves] to fill."""
    shift = hot_shift(law, operations)
    for leaf in range(weight.size):
        begin = step_of(tree.leaves, leaf * tree.order, tree.order - 1, 0)
        for slot in range(1, ((begin >> 8) & 0xFF) + 1):
            key = int64(tree.leaves[leaf * tree.order + slot - 1])
            chance = mass(law.zipf, rank_of(law, key, shift))
            weight[leaf] += chance
            heat_step(tree, begin | slot, True, chance, heat, scratch)
            first = tuples + key * tuple_bytes
            line = first
            while line < first + tuple_bytes:
                heat[line >> PAGE_SHIFT] += chance
                line = (line & ~(LINE_SIZE - 1)) + LINE_SIZE


class Silo(Indexed):
    """See the module."""

    def __init__(self, config: GuestConfig) -> None:
        params = resolve(PARAMS, config.workload_params)
        self.steady = not params["period"]
        tuple_bytes = int(params["tuple_bytes"])
        total_bytes = int(config.total_pages * float(params["footprint"])) * PAGE_SIZE
        per_million = tuple_bytes * 10**6 + nodes_for(MASSTREE, 10**6, False) * MASSTREE.node_bytes
        keys = min(total_bytes * 10**6 // per_million, 1 << KEY_BITS)
        nodes = nodes_for(MASSTREE, keys, False) + MAX_HEIGHT
        pages = [-(-size // PAGE_SIZE) for size in (nodes * MASSTREE.node_bytes, keys * tuple_bytes)]
        self.space = AddressSpace(mmap_regions([("tuples", pages[1]), ("index", pages[0])], config.seed))
        names = new_scrambler(config.seed, max(1, (keys - 1).bit_length()))
        super().__init__(config, new_tree(MASSTREE, self.space.first_page("index") << PAGE_SHIFT, nodes),
                         self.space.first_page("tuples") << PAGE_SHIFT, tuple_bytes, keys, names, False,
                         np.zeros(0, np.int64))  # fmt: skip
        self.law = Law(
            zipf=new_zipf(keys, str(params["zipf_s"])),
            names=names,
            keys=keys,
            ordered=params["keys"] == "ordered",
            period=int(params["period"]),
            step=round(float(params["move"]) * keys),
            updates=(_UPDATES[str(params["mix"])] << _DRAW_BITS) // 100,
        )
        self._update = np.zeros((config.vcpus, BATCH), np.int64)
        self.mlp = float(params["mlp"])
        self.think_ps = round(float(params["think_ns"]) * 1000)

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        self.finish()
        count = int(_operate(self.tree, self.law, self.records, self.record_bytes, self.think_ps, self.rng[vcpu],
                             self.state[vcpu], self._update[vcpu], self.paths[vcpu], *buffer))  # fmt: skip
        self.llc.mark(buffer.address[:count], buffer.kind[:count])
        return count

    def leaf_heat(self, weight: Words, heat: Words, scratch: Words) -> None:
        """By the law as it is now: where the hot spot of the first vCPU is."""
        _heat_leaves(self.tree, self.law, int(self.state[0, OPERATIONS]), self.records, self.record_bytes, weight,
                     heat, scratch)  # fmt: skip

    def heat(self) -> Words | None:
        """By the law as it is now."""
        return scaled_heat(self.tree_heat())


TYPE = WorkloadType("silo", "YCSB on a key-value store: index and tuples, scrambled Zipf", PARAMS, Silo, 16 * MIB)
assert SEARCH_ACCESSES + MAX_TUPLE // LINE_SIZE + 2 < ROOM
