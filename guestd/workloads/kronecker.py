"""A Kronecker (R-MAT) graph in CSR form, with Graph500's initiator: what `pagerank` and `bfs` run on.

Each bit of an edge's two ends is drawn from a = 0.57, b = c = 0.19, d = 0.05 (Graph500 specification 3.1; Chakrabarti
et al., SDM'04), and vertices are then renamed at random. The graph is drawn row by row, which is the same law: a row's
degree depends only on how many bits of its vertex are set, and given the row, the bits of its neighbours are
independent, 1 with b/(a+b) = 1/4 where the row has a 0 and with d/(c+d) = 5/24 where it has a 1.

Degrees are drawn and kept, and so is where each row starts (4.5 bytes a vertex). Neighbours are not: the i-th
neighbour of v is a hash of (seed, v, i), the same at every visit. The program's edge array, which is nearly all of its
memory, thus costs no private memory, while the program finds in it what it would find in a stored graph. Directed;
repeated edges and loops stay in, as in Graph500's edge lists; rows are unsorted. Two roundings: a degree is a binomial
of 8 trials an expected edge (7/8 of the multinomial's variance), and 5/24 is 53/256 (d = 0.0497).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.jit import assume, inline, int64, kernel
from guestd.random import streams
from guestd.workloads.scramble import MAX_BITS, Scrambler, new_scrambler, scramble, unscramble
from proto.arrays import Words
from proto.units import LINE_SIZE, PAGE_SIZE

Degrees = npt.NDArray[np.uint32]

ROW_ZERO, ROW_ONE = 76, 24
"""Per cent of the edges in whose row a bit is 0 (a + b), and 1 (c + d)."""
MIN_SCALE = 8
SLICE = 64
"""Edges of a row that are drawn at a time."""
_TRIALS = 8
_FRACTION = 16
_GROUP_SHIFT = 4
"""Row starts are kept for every 16th vertex; between them degrees are added up."""
_GROUP = 1 << _GROUP_SHIFT

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_M1, _M2, _M4 = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_M8 = np.uint64(0x0101010101010101)
_1, _2, _3, _4, _27, _30, _31, _32, _56 = (np.uint64(n) for n in (1, 2, 3, 4, 27, 30, 31, 32, 56))


class Graph(NamedTuple):
    """n = 2**scale vertices, named ``[0, n)`` after renaming."""

    degree: Degrees
    """uint32[n]"""
    start: Words
    """int64[n/16 + 1]: position in the edge array of the row of every 16th vertex; last = all edges."""
    names: Scrambler
    """From a vertex's bits to its name."""
    seed: np.uint64


def fit(total_bytes: int, vertex_bytes: int, edge_bytes: int, degree: float) -> tuple[int, int]:
    """(scale, edges) that fill ``total_bytes``; edges per vertex come out at 0.7 to 1.5 times ``degree``.

    The bounds of the workloads' parameters leave room for the smallest scale.
    """

    def edges(scale: int) -> int:
        return (total_bytes - (vertex_bytes << scale)) // edge_bytes

    scales = range(MAX_BITS, MIN_SCALE, -1)
    scale = next((scale for scale in scales if edges(scale) >= 0.7 * degree * (1 << scale)), MIN_SCALE)
    return scale, edges(scale)


def stream_heat(size: int) -> Words:
    """Accesses to each page of an array of ``size`` bytes when its lines are touched once: int64[pages]."""
    left = size - np.arange(-(-size // PAGE_SIZE)) * PAGE_SIZE
    return -(-np.minimum(left, PAGE_SIZE) // LINE_SIZE)


def expected_degrees(scale: int, edges: int, unit: int) -> list[int]:
    """Expected degree of a vertex by the number of its bits that are set (scale + 1 of them), in ``1/unit``."""
    return [
        unit * edges * ROW_ZERO ** (scale - ones) * ROW_ONE**ones // (ROW_ZERO + ROW_ONE) ** scale
        for ones in range(scale + 1)
    ]


def new_graph(seed: int, scale: int, edges: int) -> Graph:
    """Draw a graph of 2**scale vertices (8 <= scale <= 32) and about ``edges`` edges."""
    count = 1 << scale
    graph = Graph(
        np.zeros(count, np.uint32),
        np.zeros((count >> _GROUP_SHIFT) + 1, np.int64),
        new_scrambler(seed, scale),
        streams(seed, 1, salt=0x6B)[0, 0],
    )
    trials = np.array(expected_degrees(scale, edges, _TRIALS << _FRACTION), np.int64)
    _draw_degrees(graph, trials)
    return graph


@inline
def _mixed(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@inline
def ones(word: np.uint64) -> int:
    """Bits set in ``word``."""
    x = word - ((word >> _1) & _M1)
    x = (x & _M2) + ((x >> _2) & _M2)
    return int64((((x + (x >> _4)) & _M4) * _M8) >> _56)


@kernel
def _draw_degrees(graph: Graph, trials: Words) -> None:
    total = int64(0)
    for v in range(graph.degree.size):
        if v & (_GROUP - 1) == 0:
            graph.start[v >> _GROUP_SHIFT] = total
        bits = np.uint64(unscramble(graph.names, v))
        hashed = _mixed(graph.seed + bits * _GOLDEN)
        wanted = trials[ones(bits)]
        count = wanted >> _FRACTION
        if int64(hashed & np.uint64(0xFFFF)) < wanted & 0xFFFF:
            count += 1
        found = int64(0)
        word = hashed
        while count > 0:
            drawn = np.uint64(0xFFFFFFFFFFFFFFFF)
            for _ in range(3):  # three fair bits in a row: 1 of 8 trials
                word += _GOLDEN
                drawn &= _mixed(word)
            if count < 64:
                drawn &= (_1 << np.uint64(count)) - _1
            found += ones(drawn)
            count -= 64
        graph.degree[v] = found
        total += found
    graph.start[graph.start.size - 1] = total


@inline
def row_start(graph: Graph, v: int) -> int:
    """Position of the row of ``v`` in the edge array."""
    first = v & ~(_GROUP - 1)
    at = graph.start[v >> _GROUP_SHIFT]
    assume(first >= 0)
    for i in range(first, v):
        at += int64(graph.degree[i])
    return at


@inline
def draw_neighbours(graph: Graph, v: int, first: int, count: int, out: Words) -> None:
    """Neighbours ``first`` to ``first + count`` of ``v`` into ``out`` (int64[>= count])."""
    bits = np.uint64(unscramble(graph.names, v))
    mask = np.uint64(graph.names.mask)
    row = _mixed(graph.seed ^ _mixed(bits + _GOLDEN))
    for i in range(count):
        word = row + np.uint64(4 * (first + i)) * _GOLDEN
        quarter = _mixed(word + _GOLDEN)
        quarter &= quarter >> _32
        # 53/64 = 0.110101 in binary, from its last digit: a 1 is an "or" with a fair bit, a 0 an "and".
        keep = _mixed(word + _GOLDEN * _2)
        keep &= keep >> _32
        next_two = _mixed(word + _GOLDEN * _3)
        keep = (keep | next_two) & (next_two >> _32)
        last_two = _mixed(word + _GOLDEN * _4)
        keep |= last_two | (last_two >> _32)
        out[i] = scramble(graph.names, int64(quarter & (keep | ~bits) & mask))
