"""Contention between VMs: the loaded-latency curve, the damped utilisation, and budgets below the ceiling."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet
from hostd.contention import DAMPING_PS, ROOM_SHARE, Contention, loaded_factor, write_factor
from proto.costs import Costs, TierCosts
from proto.counters import C
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import ENGINE, new_fleet, small_guest

QUANTUM = 10 * PS_PER_MS
demands = st.lists(
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=4, max_size=4), min_size=1, max_size=6
)  # fmt: skip


def settled(costs: Costs, asked: list[list[int]]) -> Contention:
    contention = Contention(costs, [1] * len(asked))
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


@given(threads=st.integers(0, 100))
@pytest.mark.parametrize("tier", ["fast", "slow"])
def test_the_write_ceiling_falls_with_the_threads_that_write(tier: str, threads: int, costs: Costs) -> None:
    side: TierCosts = getattr(costs, tier)
    points = np.array(side.write_curve)
    expected = np.interp(threads, points[:, 0], points[:, 1])
    assert expected - 1 < write_factor(side, threads) <= expected + 1e-9


def test_who_wrote_in_the_last_quantum_sets_the_write_ceiling_of_the_next(costs: Costs) -> None:
    vcpus = [4, 8, 3]
    contention = Contention(costs, vcpus)
    writes: list[list[int]] = [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1]]
    full = contention.ceiling(QUANTUM)
    assert contention.budgets([0, 1, 2], QUANTUM)
    assert contention.ceiling(QUANTUM).tolist() == full.tolist(), "nobody has written yet"
    for vm, demand in enumerate(writes):
        contention.settle(vm, np.array(demand))
    assert contention.ceiling(QUANTUM).tolist() == full.tolist(), "the ceiling of a quantum does not change in it"
    for everyone, threads in (([0, 1, 2], [8 + 3, 4 + 3]), ([0, 1], [8, 4])):
        contention.budgets(everyone, QUANTUM)
        contention.keep(everyone)
        assert contention.writers == threads
        factors = [write_factor(side, count) for side, count in zip((costs.fast, costs.slow), threads, strict=True)]
        assert contention.ceiling(QUANTUM)[:2].tolist() == full[:2].tolist()
        for found, whole, factor in zip(contention.ceiling(QUANTUM)[2:], full[2:], factors, strict=True):
            assert found == pytest.approx(int(whole) * factor / 1000, abs=1)
    assert write_factor(costs.slow, 7) == 850


@given(
    quanta=st.lists(demands, min_size=1, max_size=6),
    vcpus=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    stay=st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=6, max_size=6),
    moved=st.integers(0, 1 << 34),
)
def test_no_tier_serves_more_than_its_ceiling_in_a_quantum_whatever_is_asked(
    quanta: list[list[list[int]]], vcpus: list[int], stay: list[set[int]], moved: int, costs: Costs
) -> None:
    """Per tier and direction; VMs ask for anything, come and go, and the host moves pages beside them."""
    vcpus = vcpus[: min(len(asked) for asked in quanta)]
    contention = Contention(costs, vcpus)
    for asked, here in zip(quanta, stay, strict=False):
        running = sorted(vm for vm in here if vm < len(vcpus)) or [0]
        budgets = contention.budgets(running, QUANTUM)
        contention.keep(running)
        ceiling = contention.ceiling(QUANTUM)
        assert (np.array(list(budgets.values()), object).sum(axis=0) <= ceiling).all()
        before = contention.served.copy()
        for vm in running:
            contention.settle(vm, np.array(asked[vm], np.int64), np.full(4, moved))
        served = contention.served - before
        assert (served >= 0).all()
        assert (served <= ceiling).all()
        contention.close_quantum(QUANTUM)
        assert all(0 <= load <= 2_000_000 for load in contention.utilisation_ppm)


@given(asked=demands)
def test_a_demand_that_fits_can_be_repeated_and_all_of_the_rest_is_shared_out(
    asked: list[list[int]], costs: Costs
) -> None:
    everyone = list(range(len(asked)))
    contention = Contention(costs, [1] * len(asked))
    equal = contention.budgets(everyone, QUANTUM)
    assert len(set(equal.values())) == 1
    modest = [[abs(want) % (equal[0][i] + 1) for i, want in enumerate(demand)] for demand in asked]
    for vm in everyone:
        contention.settle(vm, np.array(modest[vm], np.int64))
    assert contention.served.tolist() == np.sum(modest, axis=0).tolist()
    budgets = contention.budgets(everyone, QUANTUM)
    for i, most in enumerate(contention.ceiling(QUANTUM).tolist()):
        # But for what is kept for those that ask for nothing.
        assert all(budgets[vm][i] >= modest[vm][i] - most // ROOM_SHARE for vm in everyone)
        assert most - len(everyone) < sum(budgets[vm][i] for vm in everyone) <= most


@example(costs_of=[17, 4, 10, 0], others=2, late=2)
@given(costs_of=st.lists(st.integers(0, 4096), min_size=4, max_size=4).filter(any), others=st.integers(1, 20),
       late=st.integers(0, 3))  # fmt: skip
def test_who_needs_several_budgets_at_once_is_not_starved_by_those_who_take_all_of_each(
    costs_of: list[int], others: int, late: int, costs: Costs
) -> None:
    """An access takes of several ceilings; once one of them was out, the others must not be lost for it by turns."""
    contention = Contention(costs, [1] * (others + 1))
    everyone, needed = list(range(others + 1)), [i for i in range(4) if costs_of[i]]
    contention.budgets(everyone, QUANTUM)
    done, quanta = 0, 40
    for quantum in range(quanta):
        budgets = contention.budgets(everyone, QUANTUM)
        for vm in everyone[1:]:
            contention.settle(vm, np.array(budgets[vm]))
        # The access that uses a budget up goes beyond it. Before `late` it asks of one ceiling only.
        fit = min(-(-budgets[0][i] // costs_of[i]) for i in needed)
        accesses = max(0, fit) if quantum >= late else 0
        asked = np.array([accesses * cost for cost in costs_of])
        if quantum < late:
            asked[needed[0]] = budgets[0][needed[0]]
        contention.settle(0, asked)
        done += accesses
    fair = min(int(contention.ceiling(QUANTUM)[i]) // (others + 1) // costs_of[i] for i in needed)
    # By search, the worst is 0.286 of its share (costs 17, 4, 10, 0 and two others).
    assert done >= (quanta - late) * fair // 4


def test_who_want_more_than_there_is_get_equal_shares(costs: Costs) -> None:
    contention = Contention(costs, [1, 1])
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
    contention = Contention(costs, [1] * (others + 1))
    first = list(range(others))
    for _ in range(20):
        budgets = contention.budgets(first, QUANTUM)
        for vm in first:
            contention.settle(vm, np.array(budgets[vm]))
    for _ in range(2):
        budgets = contention.budgets([*first, others], QUANTUM)
        for vm, budget in budgets.items():
            contention.settle(vm, np.array(budget))
    room = contention.ceiling(QUANTUM)
    assert all(share >= int(most) // (others + 1) for share, most in zip(budgets[others], room, strict=True))


@given(asked=st.lists(st.integers(0, 1 << 33), min_size=1, max_size=6))
def test_what_does_not_fit_waits_and_is_served_in_the_end(asked: list[int], costs: Costs) -> None:
    contention = Contention(costs, [1])
    for want in asked:
        contention.budgets([0], QUANTUM)
        contention.settle(0, np.full(4, want))
    for _ in range(1 + len(asked) * (1 << 33) // int(contention.ceiling(QUANTUM).min())):
        contention.budgets([0], QUANTUM)
        contention.settle(0, np.zeros(4, np.int64))
    assert contention.served.tolist() == [sum(asked)] * 4


def test_reads_and_writes_of_a_tier_add_up_to_its_utilisation(costs: Costs) -> None:
    contention = Contention(costs, [1])
    room = contention.ceiling(QUANTUM)
    contention.settle(0, np.array([room[0] // 4, 0, room[2] // 4, 0]))
    for _ in range(60):
        contention.close_quantum(QUANTUM)
    assert contention.utilisation_ppm[0] == pytest.approx(500_000, abs=5)
    assert contention.utilisation_ppm[1] == 0
    idle, local, slow, slow_local = Contention(costs, [1]).latencies()
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
        contention = Contention(costs, [1])
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


# -- a fleet ----------------------------------------------------------------------------------------------------------


def moved(fleet: InProcessFleet) -> list[list[int]]:
    """Bytes that the host's tiers moved so far: [tier][read, write]."""
    tiers = fleet.host.host_report({"total_s": 0.0, "by_vm": {}})["tiers"]
    return [[tier["read_bytes"], tier["write_bytes"]] for tier in tiers]


@pytest.mark.parametrize("policies", [("none", "none"), ("g-tpp", "hyperplace"), ("h-tpp", "g-tpp")])
def test_a_fleet_gets_no_more_of_a_tier_than_it_has_and_what_it_asks_for_is_booked_once(
    policies: tuple[str, str], costs: Costs
) -> None:
    """On tiers so thin that two VMs fight for them; looked at from outside, quantum by quantum."""
    fast = msgspec.structs.replace(costs.fast, read_bandwidth=2_000_000_000, write_bandwidth=1_500_000_000)
    slow = msgspec.structs.replace(costs.slow, read_bandwidth=1_200_000_000, write_bandwidth=900_000_000)
    costs = msgspec.structs.replace(costs, fast=fast, slow=slow)
    guests = [
        small_guest(costs, policy, vm=vm, pages=4096, fast=1024, vcpus=(2, 6)[vm], run_ms=150)
        for vm, policy in enumerate(policies)
    ]
    fleet = new_fleet(*guests)
    quantum = ENGINE.quantum_ps

    def room(rate: int) -> int:
        return rate * quantum // PS_PER_S

    # All 8 vCPUs write to both tiers in every quantum but the first, in which nobody has been seen to write.
    throttled = slow.write_bandwidth * write_factor(slow, 8) // 1000
    busiest = [[0, 0], [0, 0]]
    for count in range(1, 15):
        before = moved(fleet)
        while fleet.step() and len(fleet.guests) and fleet.guests[1].now < count * quantum:
            pass
        ceiling = [[room(fast.read_bandwidth), room(fast.write_bandwidth)],
                   [room(slow.read_bandwidth), room(throttled if count > 1 else slow.write_bandwidth)]]  # fmt: skip
        for tier in (0, 1):
            for direction in (0, 1):
                served = moved(fleet)[tier][direction] - before[tier][direction]
                assert served <= ceiling[tier][direction]
                busiest[tier][direction] = max(busiest[tier][direction], 100 * served // ceiling[tier][direction])
    assert max(busiest[1]) >= 95, "the slow tier was at its ceiling"
    while fleet.step():
        pass
    totals = [guest.machine.counters for guest in fleet.guests.values()]
    migrated = sum(int(counters[C.bytes__migrated]) for counters in totals)
    migrated += sum(int(vm.counters[C.bytes__migrated]) for vm in fleet.host.vms.values() if vm.flat)
    asked = {
        "fast": sum(int(counters[C.access__fast]) for counters in totals) * 64,
        "slow": sum(int(counters[C.access__slow]) for counters in totals) * 256,
    }
    assert policies == ("none", "none") or migrated > 1000 * 4096
    # Every access of GUPS, and the first touch of each page, reads and writes a granule, but for those that the LLC
    # serves and the few that find the block of the one before; what waits at the end was not served.
    hits = sum(int(counters[C.access__llc_hits]) for counters in totals)
    whole = asked["fast"] + asked["slow"] + migrated
    for direction in (0, 1):
        served = sum(tier[direction] for tier in moved(fleet))
        assert 0.99 * (whole - 256 * hits) <= served <= whole - 64 * hits
