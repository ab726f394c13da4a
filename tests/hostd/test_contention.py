"""Contention between VMs: the loaded-latency curve, the damped utilisation, and budgets below the ceiling."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.contention import DAMPING_PS, Contention, loaded_factor
from proto.costs import Costs, TierCosts
from proto.units import PS_PER_MS

QUANTUM = 10 * PS_PER_MS
demands = st.lists(
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=4, max_size=4), min_size=1, max_size=6
)  # fmt: skip


def settled(costs: Costs, asked: list[list[int]]) -> Contention:
    contention = Contention(costs, len(asked))
    for vm, demand in enumerate(asked):
        contention.settle(vm, np.array(demand, np.int64))
    return contention


@given(load=st.integers(0, 2_000_000))
@pytest.mark.parametrize("tier", ["fast", "slow"])
def test_the_loaded_latency_follows_the_curve_of_the_profile(tier: str, load: int, costs: Costs) -> None:
    side: TierCosts = getattr(costs, tier)
    points = np.array(side.curve)
    expected = np.interp(load / 1000, points[:, 0], points[:, 1])
    # Loads are whole thousandths, and so is the result: each rounds down.
    steepest = (np.diff(points[:, 1]) / np.diff(points[:, 0])).max()
    assert expected - steepest - 1 <= loaded_factor(side, load) <= expected + 1e-9


@given(load=st.integers(0, 999_999))
def test_more_load_never_means_less_latency(load: int, costs: Costs) -> None:
    for side in (costs.fast, costs.slow):
        assert loaded_factor(side, load) <= loaded_factor(side, load + 1)


@given(quanta=st.lists(demands, min_size=1, max_size=5))
def test_no_tier_serves_more_than_its_ceiling_whatever_guests_say(quanta: list[list[list[int]]], costs: Costs) -> None:
    vms = min(len(asked) for asked in quanta)
    contention = Contention(costs, vms)
    everyone = list(range(vms))
    for asked in quanta:
        budgets = contention.budgets(everyone, QUANTUM)
        assert (np.array(list(budgets.values()), object).sum(axis=0) <= contention.ceiling(QUANTUM)).all()
        before = contention.served.copy()
        for vm in everyone:
            contention.settle(vm, np.array(asked[vm], np.int64))
        served = contention.served - before
        assert (served >= 0).all()
        assert (served <= contention.ceiling(QUANTUM)).all()
        contention.close_quantum(QUANTUM)
        assert all(0 <= load <= 2_000_000 for load in contention.utilisation_ppm)


@given(asked=demands)
def test_a_demand_that_fits_can_be_repeated_and_the_rest_is_shared_equally(
    asked: list[list[int]], costs: Costs
) -> None:
    everyone = list(range(len(asked)))
    contention = Contention(costs, len(asked))
    equal = contention.budgets(everyone, QUANTUM)
    assert len(set(equal.values())) == 1
    modest = [[abs(want) % (equal[0][i] + 1) for i, want in enumerate(demand)] for demand in asked]
    for vm in everyone:
        contention.settle(vm, np.array(modest[vm], np.int64))
    assert contention.served.tolist() == np.sum(modest, axis=0).tolist()
    budgets = contention.budgets(everyone, QUANTUM)
    extra = {tuple(budget - own for budget, own in zip(budgets[vm], modest[vm], strict=True)) for vm in everyone}
    assert len(extra) == 1
    assert min(extra.pop()) >= 0


def test_who_want_more_than_there_is_get_equal_shares(costs: Costs) -> None:
    contention = Contention(costs, 2)
    room = [int(room) for room in contention.ceiling(QUANTUM)]
    for vm, factor in enumerate((3, 1)):
        contention.settle(vm, np.array([factor * most for most in room]))
    budgets = contention.budgets([0, 1], QUANTUM)
    waiting = [[3 * most for most in room], room]  # nothing was given before, so all of it waits
    for i, most in enumerate(room):
        assert budgets[0][i] + waiting[0][i] == budgets[1][i] + waiting[1][i] == most // 2


@pytest.mark.parametrize("others", [1, 99])
def test_who_starts_late_has_a_fair_share_at_once(others: int, costs: Costs) -> None:
    """Those who were first take all they get; the newcomer takes what it wants from its second quantum on."""
    contention = Contention(costs, others + 1)
    room = contention.ceiling(QUANTUM)
    first = list(range(others))
    for _ in range(20):
        budgets = contention.budgets(first, QUANTUM)
        for vm in first:
            contention.settle(vm, np.array(budgets[vm]))
    for _ in range(2):
        budgets = contention.budgets([*first, others], QUANTUM)
        for vm, budget in budgets.items():
            contention.settle(vm, np.array(budget))
    assert all(share >= int(most) // (others + 1) for share, most in zip(budgets[others], room, strict=True))


@given(asked=st.lists(st.integers(0, 1 << 33), min_size=1, max_size=6))
def test_what_does_not_fit_waits_and_is_served_in_the_end(asked: list[int], costs: Costs) -> None:
    contention = Contention(costs, 1)
    for want in asked:
        contention.budgets([0], QUANTUM)
        contention.settle(0, np.full(4, want))
    for _ in range(1 + len(asked) * (1 << 33) // int(contention.ceiling(QUANTUM).min())):
        contention.budgets([0], QUANTUM)
        contention.settle(0, np.zeros(4, np.int64))
    assert contention.served.tolist() == [sum(asked)] * 4


def test_reads_and_writes_of_a_tier_add_up_to_its_utilisation(costs: Costs) -> None:
    contention = Contention(costs, 1)
    room = contention.ceiling(QUANTUM)
    contention.settle(0, np.array([room[0] // 4, 0, room[2] // 4, 0]))
    for _ in range(60):
        contention.close_quantum(QUANTUM)
    assert contention.utilisation_ppm[0] == pytest.approx(500_000, abs=5)
    assert contention.utilisation_ppm[1] == 0
    idle, local, slow, slow_local = Contention(costs, 1).latencies()
    loaded = contention.latencies()
    assert (loaded[0], loaded[1]) == (
        idle * loaded_factor(costs.fast, contention.utilisation_ppm[0]) // 1000,
        local * loaded_factor(costs.fast, contention.utilisation_ppm[0]) // 1000,
    )
    assert loaded[0] > idle
    assert loaded[2:] == (slow, slow_local)


def test_the_damping_does_not_depend_on_the_quantum(costs: Costs) -> None:
    reached = []
    for quantum in (DAMPING_PS // 200, DAMPING_PS // 400):
        contention = Contention(costs, 1)
        contention.settle(0, contention.ceiling(quantum))
        for _ in range(3 * DAMPING_PS // quantum):
            contention.close_quantum(quantum)
        reached.append(contention.utilisation_ppm[1])
    assert reached[0] == pytest.approx(reached[1], rel=0.01)
    assert reached[0] == pytest.approx(2_000_000 * (1 - np.exp(-3)), rel=0.01)


@pytest.mark.parametrize("left", [0, 1])
def test_who_has_left_has_no_part_in_the_quanta_that_follow(left: int, costs: Costs) -> None:
    def next_budget(*stay: int) -> dict[str, Any]:
        contention = settled(costs, [[1 << 30] * 4, [1 << 20] * 4])
        contention.keep(list(stay))
        contention.close_quantum(QUANTUM)
        return {"budgets": contention.budgets([1 - left], QUANTUM), "load": contention.utilisation_ppm}

    alone = settled(costs, [[0] * 4 if vm == left else [1 << (30, 20)[vm]] * 4 for vm in (0, 1)])
    alone.close_quantum(QUANTUM)
    assert next_budget(1 - left) == {
        "budgets": alone.budgets([1 - left], QUANTUM), "load": alone.utilisation_ppm,
    }  # fmt: skip
