"""The LLC as data meets it: the filter against lists, draws against their probability, guests by hand."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.llc import HIT_BITS, WAYS, LlcFilter, draws_hit, hit_cuts
from guestd.random import State, next_u64, streams
from proto.arrays import Bytes, Words
from proto.config import Scalar
from proto.costs import Costs
from proto.trace import LLC_HIT, LOAD, MODIFY, STORE
from tests.guestd.machines import guest_config, run_guest

SET = WAYS * 64
"""Bytes of one set."""


class Lists:
    """The filter in plain Python: each set a list, most recently used first."""

    def __init__(self, sets: int) -> None:
        self.sets: list[list[int]] = [[] for _ in range(sets)]

    def use(self, line: int) -> bool:
        mixed = line * 0x9E3779B97F4A7C15 % (1 << 64) >> 32
        ways = self.sets[mixed * len(self.sets) >> 32]
        hit = line in ways
        if hit:
            ways.remove(line)
        ways.insert(0, line)
        del ways[WAYS:]
        return hit


@given(
    lines=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 63), st.sampled_from((LOAD, STORE, MODIFY)))),
    sets=st.integers(1, 9),
    cut=st.integers(0, 100),
)
def test_the_filter_is_lru_in_hashed_sets(lines: list[tuple[int, int, int]], sets: int, cut: int) -> None:
    lists, cache = Lists(sets), LlcFilter()
    cache.resize(sets * SET + 17)
    assert cache.size_bytes == sets * SET
    expected = [kind | (LLC_HIT if lists.use(line) else 0) for line, _, kind in lines]
    found: list[int] = []
    for part in (lines[:cut], lines[cut:]):
        kind = np.array([kind for _, _, kind in part], np.uint8)
        cache.mark(np.array([line << 6 | offset for line, offset, _ in part], np.int64), kind)
        found += kind.tolist()
    assert found == expected


@given(before=st.integers(0, 40), after=st.integers(0, 40), data=st.data())
def test_a_resized_filter_keeps_what_fits_of_the_most_recent(before: int, after: int, data: st.DataObject) -> None:
    lines = data.draw(st.lists(st.integers(0, 2000), min_size=1, max_size=800))
    cache = LlcFilter()
    cache.resize(before * SET)
    cache.mark(np.array(lines, np.int64) << 6, np.zeros(len(lines), np.uint8))
    cache.resize(after * SET)
    small = before > 0 and after > 0 and abs(after - before) * 16 < before
    assert cache.size_bytes == (before if small else after) * SET
    if before == 0 or after == 0 or small:
        return
    # Every line still there was there before; those that moved in last are the most recently used ones.
    was, now = Lists(before), Lists(after)
    for line in lines:
        was.use(line)
    for way in reversed(range(WAYS)):
        for ways in was.sets:
            if way < len(ways):
                now.use(ways[way])
    kept = {line for ways in now.sets for line in ways}
    # Looking changes the cache, so each line asks its own copy of it.
    for line in sorted(set(lines))[:20]:
        kind = np.zeros(1, np.uint8)
        copy = LlcFilter()
        copy.resize(before * SET)
        copy.mark(np.array(lines, np.int64) << 6, np.zeros(len(lines), np.uint8))
        copy.resize(after * SET)
        copy.mark(np.array([line << 6], np.int64), kind)
        assert (kind[0] == LLC_HIT) == (line in kept)


def test_a_filter_without_room_hits_nothing() -> None:
    cache = LlcFilter()
    kind = np.array([STORE] * 4, np.uint8)
    for share in (0, SET - 1):
        cache.resize(share)
        cache.mark(np.zeros(4, np.int64), kind)
        assert kind.tolist() == [STORE] * 4 and cache.size_bytes == 0


@given(lines=st.lists(st.integers(1, 10_000), min_size=1, max_size=20), share=st.integers(0, 1 << 24))
def test_classes_fill_the_share_hottest_first(lines: list[int], share: int) -> None:
    sizes = np.array(lines, np.int64)
    before = np.cumsum(sizes) - sizes
    cuts = hit_cuts(share, before, sizes)
    assert ((cuts >= 0) & (cuts <= 1 << HIT_BITS)).all()
    # A class gets nothing unless all hotter ones fit; what is cached in all is the share, or everything.
    for first, second in pairwise(cuts):
        assert first == 1 << HIT_BITS or second == 0
    cached = sum(int(cut) * size for cut, size in zip(cuts, lines, strict=True)) / (1 << HIT_BITS)
    assert cached == pytest.approx(min(share // 64, sum(lines)), abs=1e-2)


@kernel
def _draw(state: State, cut: int, page: Words, line: Words, hit: Bytes) -> None:
    for i in range(hit.size):
        r = next_u64(state)
        page[i] = np.int64(r >> np.uint64(32)) * 1000 >> 32
        line[i] = np.int64(r) & 511
        hit[i] = draws_hit(r, cut)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_draws_hit_with_the_stated_probability_whatever_the_address(share: float) -> None:
    count = 400_000
    cut = round(share * (1 << HIT_BITS))
    page, line, hit = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.uint8)
    _draw(streams(5, 1)[0], cut, page, line, hit)
    for group in (page, line, page % 7, np.zeros(count, np.int64)):
        each, hits = np.bincount(group), np.bincount(group, hit)
        sigma = np.sqrt(each * share * (1 - share))
        assert (np.abs(hits - each * share) <= 5.5 * sigma).all()


# -- a guest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_uniform_updates_hit_with_the_share_of_lines_that_fits(part: float, costs: Costs) -> None:
    """LRU under independent uniform accesses holds any line with the same probability: lines that fit / lines."""
    pages, total = 3584, 200_000
    tables = 16 * 4096
    config = guest_config(costs, workload_params={"distribution": "uniform"}, transactions=total, run_ps=0)
    _, report = run_guest(config, llc_bytes=tables + round(part * 4096 * pages))
    access = report["access"]
    assert access["total"] == access["fast"] + access["slow"] == total
    assert access["llc_hit_ratio"] == access["llc_hits"] / total
    sigma = (part * (1 - part) / total) ** 0.5
    # The room set aside for tables is data's as far as the last barrier found no tables in it.
    assert part - 5 * sigma <= access["llc_hit_ratio"] <= part + 5 * sigma + tables / (4096 * pages)
    assert report["integrity"]["mismatches"] == 0


def test_what_the_llc_serves_costs_its_latency_and_moves_no_byte_of_a_tier(costs: Costs) -> None:
    """Everything fits: an update costs think + (STLB hit or walk + LLC latency) / MLP, wherever its page lies."""
    costs = msgspec.structs.replace(costs, context_switch_ps=0)
    params: dict[str, Scalar] = {"footprint": 0.3, "distribution": "uniform", "mlp": 4.0, "think_ns": 2.0}
    total = 100_000
    config = guest_config(costs, workload_params=params, transactions=total, run_ps=0, fast_pages=512)
    guest, report = run_guest(config, llc_bytes=1 << 30)
    access = report["access"]
    assert access["llc_hits"] == access["total"] == total
    assert access["slow"] > total // 4, "most pages lie in the slow tier"
    each = 2_000 + costs.llc_latency_ps / 4
    translated = (access["walks"] * access["walk_ns_mean"] * 1000 + access["stlb_hits"] * costs.stlb_hit_ps) / 4
    clock = guest.ended_ps - guest.run_started_ps
    assert clock == pytest.approx(total * each + translated, abs=total)
    assert not guest.machine.vcpus.histogram[:, round(costs.slow.latency_random_ps) >> 12 :].any()


@pytest.mark.parametrize("fits", [True, False])
def test_a_scan_hits_when_all_of_it_fits_and_never_else(fits: bool, costs: Costs) -> None:
    config = guest_config(costs, workload="scan", workload_params={"footprint": 0.5}, vcpus=2)
    footprint = 4096 // 2 * 4096
    _, report = run_guest(config, llc_bytes=footprint + (16 * 4096 if fits else -64))
    assert report["access"]["llc_hits"] == (report["access"]["total"] if fits else 0)
