"""The graph: the stated law of degrees and of neighbours, and the same neighbours at every visit."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.workloads import kronecker
from guestd.workloads.kronecker import MIN_SCALE, SLICE, Graph, expected_degrees, fit, new_graph, stream_heat
from proto.arrays import Words
from tests.guestd.test_random import MASK, splitmix64
from tests.guestd.workloads.test_scramble import plain

SCALE, EDGES = 12, 24 << 12


@kernel
def draw(graph: Graph, v: int, first: int, count: int, out: Words) -> None:
    kronecker.draw_neighbours(graph, v, first, count, out)


@kernel
def row_start(graph: Graph, v: int) -> int:
    return kronecker.row_start(graph, v)


def row(graph: Graph, v: int) -> list[int]:
    """All neighbours of a vertex."""
    degree = int(graph.degree[v])
    out = np.zeros(max(1, degree), np.int64)
    draw(graph, v, 0, degree, out)
    neighbours: list[int] = out[:degree].tolist()
    return neighbours


def origins(graph: Graph) -> dict[int, int]:
    """Name of a vertex -> the bits from which its law comes."""
    return {plain(graph.names, bits): bits for bits in range(graph.degree.size)}


def mix(z: int) -> int:
    """The output function of splitmix64."""
    return splitmix64((z - 0x9E3779B97F4A7C15) & MASK)[1]


def plain_neighbour(graph: Graph, bits: int, i: int) -> int:
    """Neighbour ``i`` of the vertex whose origin is ``bits``, bit by bit from fair coins."""
    golden = 0x9E3779B97F4A7C15
    first = mix(int(graph.seed) ^ mix(bits + golden & MASK)) + 4 * i * golden & MASK
    words = [mix(first + step * golden & MASK) for step in (1, 2, 3, 4)]
    target = 0
    for bit in range(graph.names.mask.bit_length()):
        coin = [word >> bit + half & 1 for word in words for half in (0, 32)]
        quarter = coin[0] & coin[1]
        keep = coin[2]
        for position, digit in enumerate((0, 1, 0, 1, 1), start=3):  # 0.110101 in binary, from its end
            keep = keep | coin[position] if digit else keep & coin[position]
        target |= (quarter & (keep if bits >> bit & 1 else 1)) << bit
    return plain(graph.names, target)


@given(seed=st.integers(0, (1 << 63) - 1), scale=st.integers(MIN_SCALE, 14), data=st.data())
def test_neighbours_are_the_plain_function(seed: int, scale: int, data: st.DataObject) -> None:
    graph = new_graph(seed, scale, 1000)
    bits = data.draw(st.integers(0, (1 << scale) - 1))
    first, count = data.draw(st.integers(0, 1 << 30)), data.draw(st.integers(1, SLICE))
    out = np.zeros(SLICE, np.int64)
    draw(graph, plain(graph.names, bits), first, count, out)
    assert out[:count].tolist() == [plain_neighbour(graph, bits, first + i) for i in range(count)]


def test_degrees_follow_the_law() -> None:
    """Degree by the number of bits set: its mean, and a binomial's variance of 7/8 of it."""
    graph = new_graph(5, SCALE, EDGES)
    expected = expected_degrees(SCALE, EDGES, 1 << 40)
    by_kind: dict[int, list[int]] = {}
    for name, bits in origins(graph).items():
        by_kind.setdefault(bits.bit_count(), []).append(int(graph.degree[name]))
    for kind, degrees in by_kind.items():
        assert len(degrees) == comb(SCALE, kind)
        mean = expected[kind] / (1 << 40)
        assert mean == pytest.approx(EDGES * 0.76 ** (SCALE - kind) * 0.24**kind, rel=1e-6)
        if mean * len(degrees) > 20:
            assert abs(np.mean(degrees) - mean) < 5 * (mean * 7 / 8 / len(degrees)) ** 0.5
        if len(degrees) > 200 and mean > 1:
            assert np.var(degrees) == pytest.approx(mean * 7 / 8, rel=0.5)
    edges = int(graph.start[-1])
    assert abs(edges - EDGES) < 6 * EDGES**0.5


def test_the_initiator_is_graph500_s() -> None:
    """Shares of (row bit, neighbour bit) over all edges: a = 0.57, b = c = 0.19, d = 0.05, to the stated rounding."""
    graph = new_graph(7, SCALE, EDGES)
    origin = origins(graph)
    seen = np.zeros((2, 2))
    for name in range(graph.degree.size):
        for neighbour in row(graph, name):
            u, w = origin[name], origin[neighbour]
            for left, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
                matching = (u if left else ~u) & (w if right else ~w) & (graph.degree.size - 1)
                seen[left, right] += matching.bit_count()
    share = seen / seen.sum()
    assert share == pytest.approx(np.array([[0.57, 0.19], [0.1903, 0.0497]]), abs=0.003)


def test_rows_lie_one_behind_the_other() -> None:
    graph = new_graph(3, 10, 20_000)
    starts = np.concatenate([[0], np.cumsum(graph.degree)])
    assert [row_start(graph, v) for v in range(graph.degree.size)] == starts[:-1].tolist()
    assert int(graph.start[-1]) == starts[-1]


def test_a_row_is_the_same_in_whatever_pieces_it_is_drawn() -> None:
    graph = new_graph(3, 10, 20_000)
    hub = int(graph.degree.argmax())
    whole = row(graph, hub)
    assert len(whole) > 3 * SLICE
    pieces: list[int] = []
    out = np.zeros(7, np.int64)
    while len(pieces) < len(whole):
        count = min(7, len(whole) - len(pieces))
        draw(graph, hub, len(pieces), count, out)
        pieces += out[:count].tolist()
    assert pieces == whole


def test_seeds_make_different_graphs() -> None:
    graphs = [new_graph(seed, 10, 20_000) for seed in (1, 1, 2)]
    rows = [[row(graph, v) for v in range(64)] for graph in graphs]
    assert rows[0] == rows[1] != rows[2]


@given(total=st.integers(1 << 19, 1 << 45), vertex=st.integers(8, 64), edge=st.sampled_from((4, 8, 16)),
       degree=st.floats(2, 64))  # fmt: skip
def test_the_graph_fills_its_memory(total: int, vertex: int, edge: int, degree: float) -> None:
    scale, edges = fit(total, vertex, edge, degree)
    assert 0 <= total - (vertex << scale) - edges * edge < edge
    if MIN_SCALE < scale < 32:
        assert 0.7 * degree <= edges / (1 << scale) < 1.4 * degree + vertex / edge


@given(size=st.integers(1, 50_000))
def test_stream_heat_counts_the_lines_of_each_page(size: int) -> None:
    lines = [-(-min(4096, size - start) // 64) for start in range(0, size, 4096)]
    assert stream_heat(size).tolist() == lines
