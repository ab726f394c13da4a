"""PageRank by pulling, over and over, on a Kronecker graph in CSR: GAPBS's (Beamer et al., arXiv 1508.03619).

The program is `pr_spmv.cc` with its data types: both directions of the graph in CSR (8-byte row pointers, 4-byte
vertices), of which an iteration reads the incoming one; 4-byte scores and contributions. An iteration divides each
score by its vertex's out-degree, then each vertex sums up its sources' contributions (score = 0.15 + 0.85 x sum). The
rows of the outgoing direction are read at the start only: half of the memory is cold, as in the program.

The sums are made, in fixed point (a mean score is 2**20), from contributions held privately: two of 4 bytes, the
out-degree and the graph's 4.5 bytes, together 1/13 of what the program has. A contribution is formed as soon as its
score is, but published in the phase in which the program writes it. vCPUs take vertices in the order in which they ask
for accesses, up to 64 edges at a time, as under OpenMP's dynamic schedule; iterations therefore follow each other
exactly, whatever the order in which vCPUs ask. Barriers cost no time. First touch: the graph is read from a file, array
by array, then scores and contributions are filled. Elements of one line that a stream reads one after the other are one
access. Left out: the error sum, the end after 20 iterations (scores go on converging; addresses do not depend on them).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.address_space import AddressSpace, mmap_regions
from guestd.jit import assume, int64, kernel, prefetch
from guestd.params import Param, resolve
from guestd.workloads.base import MIB, ROOM, Buffer, BuiltWorkload, WorkloadType, scaled_heat
from guestd.workloads.kronecker import SLICE, Graph, draw_neighbours, fit, new_graph, stream_heat
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.trace import LOAD, MODIFY, STORE
from proto.units import LINE_SIZE, PAGE_SHIFT, PAGE_SIZE

PARAMS = (
    Param("footprint", 0.875, "share of memory", "size of all arrays", "as gups", (), 0.05, 0.95),
    Param("degree", 24.0, "edges", "mean degree; about: vertices are a power of two, edges fill the rest",
          "Twitter graph of GAPBS: 1.47e9 edges, 6.2e7 vertices", (), 2.0, 256.0),
    Param("mlp", 6.0, "misses", "memory-level parallelism of a vCPU",
          "estimated: gathers are independent, line fill buffers bound them", (), 1.0, 16.0),
    Param("think_ns", 0.7, "ns", "compute per access", "estimated: 2 cycles an edge", (), 0.0, 1e6),
)  # fmt: skip

MEAN_SCORE = 1 << 20
DAMPING = 55706
"""0.85 in 1/65536."""
BASE_SCORE = MEAN_SCORE - (MEAN_SCORE * DAMPING >> 16)
_INDEX, _ELEMENT = 8, 4
_PER_LINE = LINE_SIZE // _ELEMENT
_MOST = (1 << 32) - 1

_PUBLISH, _GATHER = 0, 1
PHASE, VERTEX, EDGE, POSITION, SUM, LAST, PARITY, ITERATION = range(8)
"""Fields of the state: where the iteration is; EDGE within the row, POSITION in the edge array, LAST the line of the
contribution before, PARITY which of the two arrays of contributions is read."""

Halves = npt.NDArray[np.uint32]


class Where(NamedTuple):
    """Dense byte address of each array."""

    out_index: int
    in_index: int
    in_neighbours: int
    scores: int
    contributions: int


@kernel
def _count_links(graph: Graph, links: Halves, cursor: Words, until: int, scratch: Words) -> None:
    """Count outgoing edges (links: uint32[n]) in the rows up to position ``until`` of the edge array."""
    vertex, edge, position = cursor[0], cursor[1], cursor[2]
    while position < until:
        left = int64(graph.degree[vertex]) - edge
        if left == 0:
            vertex += 1
            edge = 0
            continue
        count = min(left, SLICE)
        draw_neighbours(graph, vertex, edge, count, scratch)
        for i in range(count):
            prefetch(links, scratch[i])
        for i in range(count):
            source = scratch[i]
            assume(source >= 0)
            links[source] += np.uint32(1)
        edge += count
        position += count
    cursor[0], cursor[1], cursor[2] = vertex, edge, position


@kernel
def _start(links: Halves, contribution: Halves) -> None:
    for v in range(links.size):
        if links[v] > 0:
            contribution[v] = MEAN_SCORE // int64(links[v])


@kernel
def _iterate(graph: Graph, links: Halves, contributions: Halves, state: Words, where: Where, address: Words,
             kind: Bytes, scratch: Words) -> int:  # fmt: skip
    """Emit accesses until the next 64 edges or 16 vertices might not fit; returns how many there are."""
    n = graph.degree.size
    vertex, edge, position = state[VERTEX], state[EDGE], state[POSITION]
    total, last = state[SUM], state[LAST]
    at = 0
    end = address.size - 2 * SLICE
    while at < end:
        assume(at >= 0)
        if state[PHASE] == _PUBLISH:
            while at < end and vertex < n:
                address[at], kind[at] = where.scores + _ELEMENT * vertex, LOAD
                address[at + 1], kind[at + 1] = where.out_index + _INDEX * vertex, LOAD
                address[at + 2], kind[at + 2] = where.out_index + _INDEX * vertex + LINE_SIZE, LOAD
                address[at + 3], kind[at + 3] = where.contributions + _ELEMENT * vertex, STORE
                at += 4
                vertex += _PER_LINE
            if vertex == n:
                vertex = edge = position = 0
                state[PHASE] = _GATHER
            continue
        old, new = contributions[state[PARITY]], contributions[1 - state[PARITY]]
        while at < end and vertex < n:
            if edge == 0:
                total, last = 0, -1
                if vertex & 7 == 0:
                    address[at], kind[at] = where.in_index + _INDEX * vertex, LOAD
                    at += 1
            left = int64(graph.degree[vertex]) - edge
            count = min(left, SLICE)
            draw_neighbours(graph, vertex, edge, count, scratch)
            for i in range(count):
                prefetch(old, scratch[i])
            for i in range(count):
                if position & (_PER_LINE - 1) == 0:
                    address[at], kind[at] = where.in_neighbours + _ELEMENT * position, LOAD
                    at += 1
                position += 1
                source = scratch[i]
                assume(source >= 0)
                total += int64(old[source])
                target = where.contributions + _ELEMENT * source
                if target >> 6 != last:
                    last = target >> 6
                    address[at], kind[at] = target, LOAD
                    at += 1
            edge += count
            if count == left:
                if links[vertex] > 0:
                    score = BASE_SCORE + (total * DAMPING >> 16)
                    new[vertex] = min(score // int64(links[vertex]), _MOST)
                if vertex & (_PER_LINE - 1) == _PER_LINE - 1:
                    address[at], kind[at] = where.scores + _ELEMENT * vertex, MODIFY
                    at += 1
                vertex += 1
                edge = 0
        if vertex == n:
            vertex = 0
            state[PHASE] = _PUBLISH
            state[PARITY] = 1 - state[PARITY]
            state[ITERATION] += 1
    state[VERTEX], state[EDGE], state[POSITION], state[SUM], state[LAST] = vertex, edge, position, total, last
    return at


class PageRank(BuiltWorkload):
    """See the module."""

    def __init__(self, config: GuestConfig) -> None:
        super().__init__()
        params = resolve(PARAMS, config.workload_params)
        total_bytes = int(config.total_pages * float(params["footprint"])) * PAGE_SIZE
        scale, edges = fit(total_bytes, 2 * (_INDEX + _ELEMENT), 2 * _ELEMENT, float(params["degree"]))
        self.graph = new_graph(config.seed, scale, edges)
        n, edges = self.graph.degree.size, int(self.graph.start[-1])
        sizes = {
            "out index": _INDEX * n, "out neighbours": _ELEMENT * edges, "in index": _INDEX * n,
            "in neighbours": _ELEMENT * edges, "scores": _ELEMENT * n, "contributions": _ELEMENT * n,
        }  # fmt: skip
        pages = {name: -(-size // PAGE_SIZE) for name, size in sizes.items()}
        self.space = AddressSpace(mmap_regions(list(pages.items()), config.seed))
        self.pages = {name: self.space.first_page(name) + np.arange(count) for name, count in pages.items()}
        base = {name: self.space.first_page(name) << PAGE_SHIFT for name in sizes}
        self.where = Where(base["out index"], base["in index"], base["in neighbours"], base["scores"],
                           base["contributions"])  # fmt: skip
        self.first_touch = np.concatenate(list(self.pages.values())).astype(np.int32)
        self._read_before = sum(pages[name] for name in ("out index", "out neighbours", "in index"))
        self.links = np.zeros(n, np.uint32)
        self.contributions = np.zeros((2, n), np.uint32)
        self.state = np.zeros(8, np.int64)
        self._cursor = np.zeros(3, np.int64)
        self._scratch = np.zeros(SLICE, np.int64)
        self._built = False
        self.mlp = float(params["mlp"])
        self.think_ps = round(float(params["think_ns"]) * 1000)

    def build(self, pages: int) -> int:
        # Out-degrees are counted while the incoming edges are read in.
        pages = min(pages, self.first_touch.size)
        if not self._built:
            edges = int(self.graph.start[-1])
            read = min(edges, max(0, pages - self._read_before) * (PAGE_SIZE // _ELEMENT))
            _count_links(self.graph, self.links, self._cursor, read, self._scratch)
            if read == edges:
                _start(self.links, self.contributions[0])
                self._built = True
        return pages

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        self.finish()
        count = int(_iterate(self.graph, self.links, self.contributions, self.state, self.where, buffer.address,
                             buffer.kind, self._scratch))  # fmt: skip
        buffer.think_ps[:count] = self.think_ps
        self.llc.mark(buffer.address[:count], buffer.kind[:count])
        return count

    def heat(self) -> Words | None:
        """Accesses of one iteration: each line of a stream once, a contribution also once for each of its links."""
        self.finish()
        heat = np.zeros(self.space.pages, np.int64)
        n, edges = self.links.size, int(self.graph.start[-1])
        heat[self.pages["out index"]] = heat[self.pages["in index"]] = stream_heat(_INDEX * n)
        heat[self.pages["in neighbours"]] = stream_heat(_ELEMENT * edges)
        heat[self.pages["scores"]] = 2 * stream_heat(_ELEMENT * n)
        gathered = self.links.reshape(-1, min(n, PAGE_SIZE // _ELEMENT)).sum(axis=1, dtype=np.int64)
        heat[self.pages["contributions"]] = stream_heat(_ELEMENT * n) + gathered
        return scaled_heat(heat)


TYPE = WorkloadType("pagerank", "PageRank (pull) on a Kronecker graph in CSR, half of it cold", PARAMS, PageRank,
                    16 * MIB)  # fmt: skip
assert 2 * SLICE < ROOM
