"""Breadth-first searches from random roots, one after the other, on a Kronecker graph in CSR: Graph500's kernel 2.

The program is the top-down search of Graph500's reference code 2.1 (omp-csr) with its data types: 16 bytes of row
bounds and 8 bytes of tree (parents) and of queue a vertex, 8 bytes an edge. Each search first clears the tree, then
takes vertices from the queue in order, and claims every neighbour that has no parent yet. The graph is directed, where
Graph500 adds each edge in both directions: its mean degree is twice the edge factor all the same.

The searches are made, in parents and queue of 4 bytes each; with the graph's 4.5 bytes that is 1/33 of what the
program has. vCPUs share a search: they take queued vertices in the order in which they ask for accesses, up to 64 edges
at a time. All that are in the queue of one level come before those of the next, so the tree is a breadth-first tree
whatever the order in which vCPUs ask; barriers between levels cost no time. First touch: the graph is read, then tree
and queue are filled. Left out: the bottom-up steps of a direction-optimising search, the validation of trees and the
edge list that it needs.
"""

from decimal import Decimal, localcontext
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.address_space import AddressSpace, mmap_regions
from guestd.jit import assume, int64, kernel, prefetch
from guestd.params import Param, resolve
from guestd.random import State, next_u64, streams
from guestd.workloads.base import MIB, ROOM, Buffer, BuiltWorkload, WorkloadType, scaled_heat
from guestd.workloads.kronecker import (
    SLICE,
    Graph,
    draw_neighbours,
    expected_degrees,
    fit,
    new_graph,
    ones,
    row_start,
    stream_heat,
)
from guestd.workloads.scramble import unscramble
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.trace import LOAD, MODIFY, STORE
from proto.units import LINE_SIZE, PAGE_SHIFT, PAGE_SIZE

PARAMS = (
    Param("footprint", 0.875, "share of memory", "size of all arrays", "as gups", (), 0.05, 0.95),
    Param("degree", 48.0, "edges", "mean degree; about: vertices are a power of two, edges fill the rest",
          "Demeter, workload.py: edge factor 24, each edge in both directions", (), 2.0, 256.0),
    Param("mlp", 4.0, "misses", "memory-level parallelism of a vCPU",
          "estimated: looks at neighbours are independent, claims are not", (), 1.0, 16.0),
    Param("think_ns", 1.0, "ns", "compute per access", "estimated: 3 cycles an edge", (), 0.0, 1e6),
)  # fmt: skip

_BOUNDS, _WORD = 16, 8
_PER_LINE = LINE_SIZE // _WORD
CLEAR, SEARCH = 0, 1
PHASE, CLEARED, HEAD, TAIL, EDGE, POSITION, SEARCHES = range(7)
"""Fields of the state: PHASE is CLEAR or SEARCH; vertices cleared; next and end of the queue; EDGE within the row of
the vertex at the head, POSITION in the edge array; searches begun."""
ONE = 1 << 16
"""Unit of the law of heat."""
_FINE = 1 << 80

Vertices = npt.NDArray[np.uint32]
NONE = np.uint32(0xFFFFFFFF)
"""Parent of a vertex that has none."""


class Where(NamedTuple):
    """Dense byte address of each array."""

    bounds: int
    edges: int
    tree: int
    queue: int


@kernel
def _search(graph: Graph, parent: Vertices, queue: Vertices, state: Words, roots: State, where: Where,
            address: Words, kind: Bytes, scratch: Words) -> int:  # fmt: skip
    """Emit accesses until the next 64 edges might not fit; returns how many there are."""
    n = parent.size
    head, tail, edge, position = state[HEAD], state[TAIL], state[EDGE], state[POSITION]
    at = 0
    end = address.size - 3 * SLICE
    while at < end:
        assume(at >= 0)
        if state[PHASE] == CLEAR:
            cleared = state[CLEARED]
            while at < end and cleared < n:
                for v in range(cleared, cleared + _PER_LINE):
                    parent[v] = NONE
                address[at], kind[at] = where.tree + _WORD * cleared, STORE
                at += 1
                cleared += _PER_LINE
            state[CLEARED] = cleared
            if cleared == n:
                root = int64(next_u64(roots) & np.uint64(n - 1))
                while graph.degree[root] == 0:
                    root = int64(next_u64(roots) & np.uint64(n - 1))
                parent[root] = root
                queue[0] = root
                address[at], kind[at] = where.tree + _WORD * root, STORE
                address[at + 1], kind[at + 1] = where.queue, STORE
                at += 2
                head, tail, edge = 0, 1, 0
                state[PHASE] = SEARCH
                state[SEARCHES] += 1
            continue
        while at < end and head < tail:
            vertex = int64(queue[head])
            if edge == 0:
                if head & (_PER_LINE - 1) == 0:
                    address[at], kind[at] = where.queue + _WORD * head, LOAD
                    at += 1
                address[at], kind[at] = where.bounds + _BOUNDS * vertex, LOAD
                at += 1
                position = row_start(graph, vertex)
            left = int64(graph.degree[vertex]) - edge
            count = min(left, SLICE)
            draw_neighbours(graph, vertex, edge, count, scratch)
            for i in range(count):
                prefetch(parent, scratch[i])
            for i in range(count):
                if position & (_PER_LINE - 1) == 0 or edge + i == 0:
                    address[at], kind[at] = where.edges + _WORD * position, LOAD
                    at += 1
                position += 1
                neighbour = scratch[i]
                assume(neighbour >= 0)
                address[at] = where.tree + _WORD * neighbour
                if parent[neighbour] == NONE:
                    kind[at] = MODIFY
                    at += 1
                    parent[neighbour] = vertex
                    queue[tail] = neighbour
                    if tail & (_PER_LINE - 1) == 0:
                        address[at], kind[at] = where.queue + _WORD * tail, STORE
                        at += 1
                    tail += 1
                else:
                    kind[at] = LOAD
                    at += 1
            edge += count
            if count == left:
                head += 1
                edge = 0
        if head == tail:
            state[CLEARED] = 0
            state[PHASE] = CLEAR
    state[HEAD], state[TAIL], state[EDGE], state[POSITION] = head, tail, edge, position
    return at


@kernel
def _spread(graph: Graph, reached: Words, looks: Words, bounds: Words, edges: Words, tree: Words) -> int:
    """Add what each vertex costs a search on average, by the number of set bits of its name's origin.

    ``reached``, ``looks``: int64[scale + 1], probability that a search comes to it, and edges to it that a search
    follows, in ONE. ``bounds``, ``edges``, ``tree``: int64[pages] of each array. Returns the mean number of vertices
    reached, in ONE.
    """
    total = position = int64(0)
    for v in range(graph.degree.size):
        kind = ones(np.uint64(unscramble(graph.names, v)))
        total += reached[kind]
        bounds[(_BOUNDS * v) >> PAGE_SHIFT] += reached[kind]
        tree[(_WORD * v) >> PAGE_SHIFT] += looks[kind]
        end = position + int64(graph.degree[v])
        first = True
        while position < end:
            page = (_WORD * position) >> PAGE_SHIFT
            stop = min(end, (page + 1) * (PAGE_SIZE // _WORD))
            # A row of d edges that begins anywhere in a line touches 1 + (d - 1) / 8 lines on average.
            edges[page] += reached[kind] * (stop - position + (_PER_LINE - 1 if first else 0)) // _PER_LINE
            first = False
            position = stop
    return total


def reach(scale: int, edges: int) -> tuple[Words, Words]:
    """Chance that a search reaches a vertex, and edges to it that it follows: int64[scale + 1] by set bits, in ONE.

    A vertex is reached unless none of the edges to it comes from a vertex that is: 1 - exp(-mean degree x share of
    edges followed), iterated to its fixed point, by decimal arithmetic so that it is the same everywhere.
    """
    with localcontext() as context:
        context.prec = 30
        mean = [Decimal(degree) / ONE for degree in expected_degrees(scale, edges, ONE)]
        share = [Decimal(comb(scale, bits) * part) / _FINE for bits, part in
                 enumerate(expected_degrees(scale, 1, _FINE))]  # fmt: skip
        followed = Decimal(1)
        for _ in range(30):
            reached = [1 - (-degree * followed).exp() for degree in mean]
            followed = sum((part * chance for part, chance in zip(share, reached, strict=True)), Decimal(0))
        return (np.array([int(ONE * chance) for chance in reached], np.int64),
                np.array([int(ONE * degree * followed) for degree in mean], np.int64))  # fmt: skip


class Bfs(BuiltWorkload):
    """See the module."""

    def __init__(self, config: GuestConfig) -> None:
        super().__init__()
        params = resolve(PARAMS, config.workload_params)
        total_bytes = int(config.total_pages * float(params["footprint"])) * PAGE_SIZE
        self.scale, self.expected_edges = fit(total_bytes, _BOUNDS + 2 * _WORD, _WORD, float(params["degree"]))
        self.graph = new_graph(config.seed, self.scale, self.expected_edges)
        n, edges = self.graph.degree.size, int(self.graph.start[-1])
        sizes = {"bounds": _BOUNDS * n, "edges": _WORD * edges, "tree": _WORD * n, "queue": _WORD * n}
        pages = {name: -(-size // PAGE_SIZE) for name, size in sizes.items()}
        self.space = AddressSpace(mmap_regions(list(pages.items()), config.seed))
        first = {name: self.space.first_page(name) for name in sizes}
        self.pages = {name: slice(first[name], first[name] + pages[name]) for name in sizes}
        self.where = Where(*(first[name] << PAGE_SHIFT for name in sizes))
        self.first_touch = np.concatenate([np.arange(first[name], first[name] + pages[name]) for name in sizes]).astype(
            np.int32
        )
        self.parent = np.full(n, NONE, np.uint32)
        self.queue = np.zeros(n, np.uint32)
        self.state = np.zeros(7, np.int64)
        self._roots = streams(config.seed, 1, salt=0xB5)[0]
        self._scratch = np.zeros(SLICE, np.int64)
        self.mlp = float(params["mlp"])
        self.think_ps = round(float(params["think_ns"]) * 1000)

    def build(self, pages: int) -> int:
        return min(pages, self.first_touch.size)

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        count = int(_search(self.graph, self.parent, self.queue, self.state, self._roots, self.where, buffer.address,
                            buffer.kind, self._scratch))  # fmt: skip
        buffer.think_ps[:count] = self.think_ps
        self.llc.mark(buffer.address[:count], buffer.kind[:count])
        return count

    def heat(self) -> Words | None:
        """Accesses of a search from an average root."""
        heat = np.zeros(self.space.pages, np.int64)
        parts = {name: heat[pages] for name, pages in self.pages.items()}
        reached, looks = reach(self.scale, self.expected_edges)
        total = int(_spread(self.graph, reached, looks, parts["bounds"], parts["edges"], parts["tree"])) // ONE
        parts["tree"] += ONE * stream_heat(_WORD * self.parent.size)
        queue = stream_heat(_WORD * total)
        parts["queue"][: queue.size] = 2 * ONE * queue
        return scaled_heat(heat)


TYPE = WorkloadType("bfs", "breadth-first searches (top-down) on a Kronecker graph in CSR", PARAMS, Bfs, 16 * MIB)
assert 3 * SLICE < ROOM
