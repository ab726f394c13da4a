"""PageRank: its scores are those of numpy on the same graph, its accesses those of a plain run of the same loops."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.workloads.base import ROOM
from guestd.workloads.pagerank import (
    BASE_SCORE,
    DAMPING,
    ITERATION,
    MEAN_SCORE,
    PARITY,
    PageRank,
)
from proto.arrays import Words
from proto.costs import Costs
from proto.trace import LOAD, MODIFY, STORE
from tests.guestd.machines import guest_config
from tests.guestd.workloads.accesses import new_buffer, populated, take
from tests.guestd.workloads.test_kronecker import row


def make(costs: Costs, vcpus: int = 1, **params: Any) -> PageRank:
    params = {"footprint": 0.05, "degree": 20.0} | params
    return PageRank(guest_config(costs, workload="pagerank", workload_params=params, vcpus=vcpus))


def rows(work: PageRank) -> list[list[int]]:
    """Sources of each vertex."""
    return [row(work.graph, v) for v in range(work.graph.degree.size)]


def plain_run(work: PageRank, sources: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Addresses and kinds of iteration after iteration."""
    where, n = work.where, len(sources)
    while True:
        for line in range(0, n, 16):
            yield where.scores + 4 * line, LOAD
            yield where.out_index + 8 * line, LOAD
            yield where.out_index + 8 * line + 64, LOAD
            yield where.contributions + 4 * line, STORE
        edge = 0
        for v in range(n):
            if v % 8 == 0:
                yield where.in_index + 8 * v, LOAD
            last = -1
            for source in sources[v]:
                if edge % 16 == 0:
                    yield where.in_neighbours + 4 * edge, LOAD
                edge += 1
                address = where.contributions + 4 * source
                if address // 64 != last:
                    yield address, LOAD
                last = address // 64
            if v % 16 == 15:
                yield where.scores + 4 * v, MODIFY


def iterate(work: PageRank, iterations: int, vcpus: int = 1, sizes: tuple[int, ...] = (ROOM,)) -> Words:
    """Run at least so far, vCPUs taking turns, and return the contributions then (int64[n])."""
    turn = 0
    while int(work.state[ITERATION]) < iterations:
        work.generate(turn % vcpus, new_buffer(sizes[turn % len(sizes)]))
        turn += 1
    assert int(work.state[ITERATION]) == iterations
    return work.contributions[int(work.state[PARITY])].astype(np.int64)


def test_accesses_are_those_of_the_plain_loops(costs: Costs) -> None:
    work = make(costs)
    found = take(work, 2 * int(work.graph.start[-1]) + 20_000, sizes=(700, 2000))
    expected = list(islice(plain_run(work, rows(work)), len(found)))
    assert [(address, kind) for address, kind, _ in found.tolist()] == expected
    assert int(work.state[ITERATION]) >= 1
    assert (found[:, 2] == 700).all()


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(ROOM, 3000), min_size=1, max_size=5), vcpus=st.integers(1, 4))
def test_together_vcpus_run_the_same_loops_whatever_their_buffers(sizes: list[int], vcpus: int, costs: Costs) -> None:
    alone, shared = make(costs), make(costs, vcpus=vcpus)
    count = 20_000
    expected = take(alone, count)[:, :2]
    found: list[list[int]] = []
    turn = 0
    while len(found) < count:
        buffer = new_buffer(sizes[turn % len(sizes)])
        filled = shared.generate(turn % vcpus, buffer)
        found += np.stack([buffer.address[:filled], buffer.kind[:filled]], axis=1).tolist()
        turn += 1
    assert found[:count] == expected[:count].tolist()


@pytest.mark.parametrize("vcpus", [1, 3])
def test_scores_are_those_of_the_graph(vcpus: int, costs: Costs) -> None:
    """Exactly those of the same arithmetic in Python, and nearly those of floating point."""
    work = make(costs, vcpus=vcpus)
    sources = rows(work)
    n = len(sources)
    links = np.bincount(np.concatenate(sources).astype(np.int64), minlength=n)
    work.finish()
    assert np.array_equal(work.links, links)
    whole = [MEAN_SCORE // int(link) if link else 0 for link in links]
    real = np.where(links > 0, 1 / np.maximum(links, 1), 0)
    for iteration in range(1, 6):
        sums = [sum(whole[source] for source in sources[v]) for v in range(n)]
        scores = [BASE_SCORE + (total * DAMPING >> 16) for total in sums]
        whole = [score // int(link) if link else 0 for score, link in zip(scores, links, strict=True)]
        found = iterate(work, iteration, vcpus, (ROOM, 999, 2500))
        assert found.tolist() == whole
        real_scores = 0.15 + 0.85 * np.array([real[source].sum() for source in sources])
        real = np.where(links > 0, real_scores / np.maximum(links, 1), 0)
        assert np.array(scores) / MEAN_SCORE == pytest.approx(real_scores, rel=1e-3)
        # Each vertex gives 0.15, and of what vertices with links had, 0.85 is passed on.
        given_on = int((found * links).sum())
        had = sum(score for score, link in zip(scores, links, strict=True) if link)
        assert given_on <= had < given_on + links.sum()


def test_layout_and_first_touch(costs: Costs) -> None:
    """Six arrays in a row, the graph first, each page once and in order; edges are counted while they are read."""
    work = make(costs, footprint=0.875)
    names = ("out index", "out neighbours", "in index", "in neighbours", "scores", "contributions")
    first = [work.space.first_page(name) for name in names]
    assert first == sorted(first, reverse=True), "each lies below the one before"
    pages = populated(work, vcpus=2)
    assert pages == [page for name in names for page in work.pages[name].tolist()]
    assert len(pages) == pytest.approx(0.875 * 4096, rel=0.01)
    assert int(work.links.sum()) == int(work.graph.start[-1])
    private = work.links.nbytes + work.contributions.nbytes + work.graph.degree.nbytes + work.graph.start.nbytes
    assert private * 12 < len(pages) * 4096


def test_the_graph_is_read_no_further_than_touched(costs: Costs) -> None:
    work = make(costs, footprint=0.875)
    before = sum(len(work.pages[name]) for name in ("out index", "out neighbours", "in index"))
    work.build(before)
    assert not work.links.any()
    work.build(before + 10)
    assert 10 * 1024 <= int(work.links.sum()) < 10 * 1024 + 64


def test_heat_is_one_iteration(costs: Costs) -> None:
    work = make(costs)
    heat = work.heat()
    streams = work.links.size // 16 * (4 + 2 + 1)
    total = streams + -(-int(work.graph.start[-1]) // 16) + int(work.links.sum())
    assert heat is not None
    assert int(heat.sum()) == total
    one = list(islice(plain_run(work, rows(work)), total))
    seen = np.bincount(np.array([address for address, _ in one]) >> 12, minlength=heat.size)
    # Two sources in one line, one after the other, are one access; heat counts them apart.
    assert np.abs(heat - seen).sum() < 0.02 * total
    assert (heat[work.pages["out neighbours"]] == 0).all()
