"""Breadth-first search: a tree of shortest paths, and the accesses of a plain search from the same root."""

from collections import deque
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.workloads.base import ROOM
from guestd.workloads.bfs import NONE, ONE, PHASE, SEARCH, SEARCHES, TAIL, Bfs, reach
from proto.arrays import Words
from proto.costs import Costs
from proto.trace import LOAD, MODIFY, STORE
from tests.guestd.machines import guest_config
from tests.guestd.workloads.accesses import new_buffer, populated, take
from tests.guestd.workloads.test_kronecker import row


def make(costs: Costs, vcpus: int = 1, seed: int = 11, **params: Any) -> Bfs:
    params = {"footprint": 0.05, "degree": 16.0} | params
    return Bfs(guest_config(costs, workload="bfs", workload_params=params, vcpus=vcpus, seed=seed))


def rows(work: Bfs) -> list[list[int]]:
    """Neighbours of each vertex."""
    return [row(work.graph, v) for v in range(work.graph.degree.size)]


def levels(neighbours: list[list[int]], root: int) -> list[int]:
    """Distance of each vertex from ``root``, -1 if there is no path."""
    found = [-1] * len(neighbours)
    found[root] = 0
    queue = deque([root])
    while queue:
        u = queue.popleft()
        for v in neighbours[u]:
            if found[v] < 0:
                found[v] = found[u] + 1
                queue.append(v)
    return found


def plain_search(work: Bfs, neighbours: list[list[int]], root: int) -> list[tuple[int, int]]:
    """Addresses and kinds of one search, the clearing of the tree included."""
    where, n = work.where, len(neighbours)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in neighbours])]).tolist()
    found = [(where.tree + 64 * line, STORE) for line in range(n // 8)]
    parent = [-1] * n
    parent[root] = root
    found += [(where.tree + 8 * root, STORE), (where.queue, STORE)]
    queue = [root]
    head = 0
    while head < len(queue):
        u = queue[head]
        if head % 8 == 0:
            found.append((where.queue + 8 * head, LOAD))
        head += 1
        found.append((where.bounds + 16 * u, LOAD))
        for i, v in enumerate(neighbours[u]):
            edge = starts[u] + i
            if i == 0 or edge % 8 == 0:
                found.append((where.edges + 8 * edge, LOAD))
            if parent[v] >= 0:
                found.append((where.tree + 8 * v, LOAD))
                continue
            parent[v] = u
            found.append((where.tree + 8 * v, MODIFY))
            if len(queue) % 8 == 0:
                found.append((where.queue + 8 * len(queue), STORE))
            queue.append(v)
    return found


def roots(found: Words, work: Bfs) -> list[int]:
    """Roots of the searches in a list of accesses (int64[n, 3]): the store before the queue's first."""
    at = np.flatnonzero((found[:, 0] == work.where.queue) & (found[:, 1] == STORE))
    return [int(vertex) for vertex in (found[at - 1, 0] - work.where.tree) // 8]


def test_accesses_are_those_of_plain_searches(costs: Costs) -> None:
    work = make(costs)
    neighbours = rows(work)
    found = take(work, 3 * int(work.graph.start[-1]), sizes=(ROOM, 2000))
    started = roots(found, work)
    assert len(started) >= 2 and len(set(started)) == len(started)
    expected = [access for root in started for access in plain_search(work, neighbours, root)]
    count = min(len(found), len(expected))
    assert count > len(expected) // 2
    assert [(address, kind) for address, kind, _ in found[:count].tolist()] == expected[:count]
    assert (found[:, 2] == 1000).all()


def finished_search(work: Bfs, vcpus: int = 1, sizes: tuple[int, ...] = (ROOM,)) -> tuple[list[int], list[int]]:
    """Vertices in the order in which the next whole search reached them, and parents shortly before its end."""
    turn = 0
    parent: list[int] = []
    begun = int(work.state[SEARCHES])
    while int(work.state[SEARCHES]) == begun or int(work.state[PHASE]) == SEARCH:
        if int(work.state[SEARCHES]) > begun:
            parent = work.parent.tolist()
        work.generate(turn % vcpus, new_buffer(sizes[turn % len(sizes)]))
        turn += 1
    assert int(work.state[SEARCHES]) == begun + 1
    return work.queue[: int(work.state[TAIL])].tolist(), parent


@given(sizes=st.lists(st.integers(ROOM, ROOM + 150), min_size=1, max_size=5), vcpus=st.integers(1, 4),
       seed=st.integers(0, 1000))  # fmt: skip
def test_a_search_makes_a_tree_of_shortest_paths_whoever_takes_part(
    sizes: list[int], vcpus: int, seed: int, costs: Costs
) -> None:
    work = make(costs, vcpus=vcpus, seed=seed)
    neighbours = rows(work)
    reached, parent = finished_search(work, vcpus, tuple(sizes))
    level = levels(neighbours, reached[0])
    assert sorted(reached) == [v for v, distance in enumerate(level) if distance >= 0]
    assert [level[v] for v in reached] == sorted(distance for distance in level if distance >= 0), "level by level"
    claimed = [v for v in range(len(parent)) if parent[v] != int(NONE) and v != reached[0]]
    assert set(claimed) <= set(reached)
    for v in claimed:
        assert v in neighbours[parent[v]]
        assert level[v] == level[parent[v]] + 1


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(ROOM, 3000), min_size=1, max_size=5), vcpus=st.integers(1, 4))
def test_together_vcpus_make_the_same_searches_whatever_their_buffers(
    sizes: list[int], vcpus: int, costs: Costs
) -> None:
    count = 30_000
    expected = take(make(costs), count)[:count, :2].tolist()
    shared = make(costs, vcpus=vcpus)
    found: list[list[int]] = []
    turn = 0
    while len(found) < count:
        buffer = new_buffer(sizes[turn % len(sizes)])
        filled = shared.generate(turn % vcpus, buffer)
        found += np.stack([buffer.address[:filled], buffer.kind[:filled]], axis=1).tolist()
        turn += 1
    assert found[:count] == expected


def test_layout_and_first_touch(costs: Costs) -> None:
    work = make(costs, footprint=0.875, degree=48.0)
    names = ("bounds", "edges", "tree", "queue")
    first = [work.space.first_page(name) for name in names]
    assert first == sorted(first, reverse=True)
    pages = populated(work, vcpus=2)
    assert pages == [page for name in names for page in range(work.pages[name].start, work.pages[name].stop)]
    assert len(pages) == pytest.approx(0.875 * 4096, rel=0.01)
    private = work.parent.nbytes + work.queue.nbytes + work.graph.degree.nbytes + work.graph.start.nbytes
    assert private * 25 < len(pages) * 4096


def test_heat_is_an_average_search(costs: Costs) -> None:
    work = make(costs, footprint=0.3, degree=48.0)
    heat = work.heat()
    assert heat is not None
    found = take(work, 4_000_000, sizes=(16384,))
    seen = np.bincount(found[:, 0] >> 12, minlength=heat.size)
    assert np.abs(heat / heat.sum() - seen / seen.sum()).sum() / 2 < 0.02
    for name, pages in work.pages.items():
        assert heat[pages].sum() / heat.sum() == pytest.approx(seen[pages].sum() / seen.sum(), rel=0.05), name


def test_reach_is_what_searches_reach(costs: Costs) -> None:
    work = make(costs, footprint=0.3, degree=24.0)
    chance, looks = reach(work.scale, work.expected_edges)
    assert (np.diff(chance) <= 0).all() and 0 < chance[0] <= ONE
    assert (np.diff(looks) <= 0).all() and looks[-1] >= 0
    mean = sum(int(part) * comb(work.scale, bits) for bits, part in enumerate(chance)) / ONE
    sizes = [len(finished_search(work)[0]) for _ in range(3)]
    assert np.median(sizes) == pytest.approx(mean, rel=0.02)
