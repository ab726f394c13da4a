"""YCSB over a tree: a plain Python run touches the same addresses; keys follow the law, where and when they should."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.random import streams
from guestd.workloads import silo
from guestd.workloads.bptree import BATCH, INNERS, LEAVES
from guestd.workloads.indexed import OPERATIONS
from guestd.workloads.scramble import new_scrambler
from guestd.workloads.silo import MASSTREE, Law, Silo
from guestd.workloads.zipf import new_zipf
from proto.arrays import Words
from proto.costs import Costs
from proto.trace import LOAD, MODIFY, STORE
from tests.guestd.machines import guest_config
from tests.guestd.test_random import splitmix64
from tests.guestd.workloads.accesses import populated, take
from tests.guestd.workloads.plain_bptree import PlainTree, touches
from tests.guestd.workloads.test_scramble import plain
from tests.guestd.workloads.test_zipf import draw


@kernel
def key_of(law: Law, rank: int, shift: int) -> int:
    return silo.key_of(law, rank, shift)


@kernel
def rank_of(law: Law, key: int, shift: int) -> int:
    return silo.rank_of(law, key, shift)


def make(costs: Costs, vcpus: int = 1, **params: Any) -> Silo:
    return Silo(guest_config(costs, workload="silo", workload_params={"footprint": 0.1} | params, vcpus=vcpus))


def plain_key(law: Law, rank: int, operations: int) -> int:
    shift = operations // law.period * law.step if law.period else 0
    key = (rank + shift) % law.keys
    if not law.ordered:
        key = plain(law.names, key)
        while key >= law.keys:
            key = plain(law.names, key)
    return key


PARAMS: list[dict[str, Any]] = [
    {},
    {"mix": "c", "keys": "ordered"},
    {"mix": "silo", "tuple_bytes": 1064, "zipf_s": 0.5},
    {"mix": "b", "period": 40, "move": 0.03},
    {"tuple_bytes": 33, "period": 7, "move": 0.5, "keys": "ordered"},
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("vcpu", [0, 1])
def test_operations_are_those_of_a_plain_run(params: dict[str, Any], vcpu: int, costs: Costs) -> None:
    store = make(costs, vcpus=2, **params)
    found = take(store, 6000, vcpu, sizes=(700, 1111))
    law = store.law
    tree = PlainTree(MASSTREE.order)
    for key in range(law.keys):
        tree.insert(key)
    share = {"a": 0.5, "b": 0.05, "c": 0.0, "silo": 0.2}[str(params.get("mix", "a"))]
    state, operation = int(streams(11, 2)[vcpu, 0]), 0
    expected: list[tuple[int, int, int]] = []
    while len(expected) < len(found):
        state, drawn = splitmix64(state)
        rank = np.zeros(1, np.int64)
        draw(law.zipf, np.array([drawn >> 32]), np.array([drawn & 0xFFF]), rank)
        key = plain_key(law, int(rank[0]), operation)
        operation += 1
        update = (drawn >> 12 & (1 << 20) - 1) < int(share * (1 << 20))
        reads = touches(MASSTREE, store.tree.base, tree.search(key))
        expected += [(address, LOAD, 250_000 if i == 0 else 0) for i, address in enumerate(reads)]
        start = store.records + key * store.record_bytes
        for line in range(start // 64, (start + store.record_bytes - 1) // 64 + 1):
            first = line == start // 64
            kind = LOAD if not update else MODIFY if first else STORE
            expected.append((start if first else line * 64, kind, 0))
    assert found.tolist() == [list(row) for row in expected[: len(found)]]


@given(keys=st.integers(1, 5000), shift=st.integers(0, 10_000), ordered=st.booleans(), seed=st.integers(0, 100))
def test_each_rank_has_a_key_of_its_own(keys: int, shift: int, ordered: bool, seed: int) -> None:
    names = new_scrambler(seed, max(1, (keys - 1).bit_length()))
    law = Law(new_zipf(5, "1"), names, keys, ordered, 0, 0, 0)
    found = [key_of(law, rank, shift) for rank in range(keys)]
    assert sorted(found) == list(range(keys))
    assert [rank_of(law, key, shift) for key in found] == list(range(keys))


def hits(store: Silo, operations: int) -> Words:
    """Operations of the next so many (about) on each key: int64[keys]."""
    counts = np.zeros(store.law.keys, np.int64)
    left = operations
    while left > 0:
        rows = take(store, 4096)
        key, offset = np.divmod(rows[:, 0] - store.records, store.record_bytes)
        tuples = (offset == 0) & (rows[:, 0] >= store.records)
        counts += np.bincount(key[tuples], minlength=counts.size)
        left -= int(tuples.sum())
    return counts


@pytest.mark.parametrize("exponent", [0.99, 0.6])
def test_frequencies_of_keys_are_zipf_s(exponent: float, costs: Costs) -> None:
    store = make(costs, zipf_s=exponent)
    counts = hits(store, 200_000)
    weights = np.arange(1, store.law.keys + 1) ** -exponent
    law = weights / weights.sum() * counts.sum()
    by_rank = counts[[key_of(store.law, rank, 0) for rank in range(store.law.keys)]]
    group = np.unique((np.cumsum(law) / 50).astype(int), return_inverse=True)[1]
    expected, observed = np.bincount(group, law), np.bincount(group, by_rank)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < expected.size + 6 * (2 * expected.size) ** 0.5
    top = np.argsort(-counts)[:100]
    assert np.abs(np.diff(np.sort(top))).max() > 50, "the hottest keys lie scattered"


def test_the_hot_spot_moves_and_heat_with_it(costs: Costs) -> None:
    store = make(costs, period=2000, move=0.25, keys="ordered", vcpus=1)
    keys = store.law.keys
    for phase in range(4):
        before = store.heat()
        counts = hits(store, 2000 - BATCH - 300)
        start = phase * store.law.step
        hot = (np.arange(keys) - start) % keys < keys // 20
        assert counts[hot].sum() > 0.5 * counts.sum()
        assert before is not None
        hottest = int(before[store.records >> 12 :].argmax()) + (store.records >> 12)
        assert (store.records + start * store.record_bytes) >> 12 == hottest
        while int(store.state[0, OPERATIONS]) < 2000 * (phase + 1):
            take(store, 600, sizes=(600,))


@pytest.mark.parametrize("params", PARAMS)
def test_heat_is_the_probability_of_each_page(params: dict[str, Any], costs: Costs) -> None:
    store = make(costs, **params)
    heat = store.heat()
    tree = PlainTree(MASSTREE.order)
    for key in range(store.law.keys):
        tree.insert(key)
    expected = np.zeros(store.space.pages)
    weights = np.arange(1, store.law.keys + 1) ** -float(params.get("zipf_s", 0.99))
    for rank, weight in enumerate(weights / weights.sum()):
        key = plain_key(store.law, rank, 0)
        start = store.records + key * store.record_bytes
        lines = range(start // 64, (start + store.record_bytes - 1) // 64 + 1)
        addresses = touches(MASSTREE, store.tree.base, tree.search(key)) + [64 * line for line in lines]
        np.add.at(expected, np.array(addresses) >> 12, weight)
    assert heat is not None
    assert heat / heat.sum() == pytest.approx(expected / expected.sum(), rel=2e-3, abs=1e-9)


def test_first_touch_is_the_load_s(costs: Costs) -> None:
    store = make(costs)
    pages = populated(store)
    first = {vma.name: store.space.first_page(vma.name) for vma in store.space.vmas}
    tree = PlainTree(MASSTREE.order)
    seen: set[int] = set()
    expected: list[int] = []
    for key in range(store.law.keys):
        tree.insert(key)
        for name, size in (("tuples", (key + 1) * 128), ("index", tree.allocated * 320)):
            page = first[name] + (size - 1) // 4096
            for new in (page - 1, page):
                if new >= first[name] and new not in seen:
                    seen.add(new)
                    expected.append(new)
    assert pages == expected


def test_footprint_and_private_memory(costs: Costs) -> None:
    store = make(costs, footprint=0.875)
    pages = populated(store)
    assert len(pages) == pytest.approx(0.875 * 4096, rel=0.005)
    used = store.tree.state
    private = (int(used[LEAVES]) * 16 + int(used[INNERS]) * 32) * 4
    assert private * 30 < len(pages) * 4096
