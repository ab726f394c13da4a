"""fleet.in_process: a whole fleet in one process, by the same messages as a real one."""

import pytest

from fleet.in_process import InProcessFleet, private_memory
from hostd.contention import write_factor
from proto.costs import Costs
from proto.layout import segment_bytes
from proto.units import PS_PER_S
from tests.small_fleet import ENGINE, check_memory, new_fleet, run_fleet, small_guest, small_host, without_measured


def test_guests_of_all_kinds_run_beside_each_other_to_their_own_ends(costs: Costs) -> None:
    guests = [
        small_guest(costs, "g-tpp", vm=0, run_ms=30),
        small_guest(costs, "h-tpp", vm=1, run_ms=50),
        small_guest(costs, "none", vm=2, start_ms=20, transactions=200_000),
    ]
    fleet = new_fleet(*guests)
    while fleet.step():
        check_memory(fleet)
    host = fleet.host
    assert host.done
    assert host.failures == []
    assert [host.reports[vm]["virtual_s"] for vm in (0, 1)] == [0.03, 0.05]
    assert host.reports[2]["transactions"] == 200_000
    for report in host.reports.values():
        assert report["integrity"]["mismatches"] == 0
        assert report["outcome"] == "ok"


def test_tenants_slow_each_other_down_by_what_the_tiers_can_serve(costs: Costs) -> None:
    alone = run_fleet(small_guest(costs, vm=0))[0]
    host = new_fleet(*(small_guest(costs, vm=vm) for vm in range(6))).run()
    crowd = host.reports
    assert crowd[0]["throughput_mops"] < 0.8 * alone["throughput_mops"]
    # Each access is a read-modify-write of one granule, in either phase.
    slow = sum(int(report["access"]["slow"]) for report in crowd.values())
    summary = host.host_report({"total_s": 0.0, "by_vm": {}})
    tier = summary["tiers"][1]
    most = costs.slow.write_bandwidth * (summary["virtual_s"] + ENGINE.quantum_ps / PS_PER_S)
    assert slow * costs.slow.granule_bytes <= most
    assert tier["write_bytes"] <= most
    for_12_vcpus = most * write_factor(costs.slow, 12) / 1000
    assert tier["write_bytes"] > 0.8 * for_12_vcpus, "and what it can serve to so many writers, it does"
    assert tier["utilisation"] > 0.5
    assert tier["loaded_latency_ns"] > costs.slow.latency_random_ps / 1000


def test_the_same_guests_alone_and_in_another_process_are_the_same(costs: Costs) -> None:
    guest = small_guest(costs, "hyperplace", seed=11)
    assert without_measured(run_fleet(guest)[0]) == without_measured(run_fleet(guest)[0])
    other = small_guest(costs, "hyperplace", seed=12)
    assert without_measured(run_fleet(other)[0]) != without_measured(run_fleet(guest)[0])


def test_a_guests_memory_is_its_own(costs: Costs) -> None:
    guests = [small_guest(costs, vm=vm, run_ms=5) for vm in range(2)]
    made = []

    def make_memory(config: object) -> object:
        made.append(private_memory(config))  # type: ignore[arg-type]
        return made[-1]

    fleet = InProcessFleet(small_host(costs), guests, make_memory=make_memory)  # type: ignore[arg-type]
    fleet.run()
    stamps = [set((memory.stamps >> 46).tolist()) for memory in made]
    assert stamps == [{0, 1}, {0, 2}], "every frame holds what its owner wrote, or nothing"
    once = [array for name, array in made[0]._asdict().items() if name not in {"ept_pde", "ept_pdpte"}]
    assert sum(array.nbytes for array in once) == segment_bytes(guests[0].total_pages), "the two lie in ept_upper"


@pytest.mark.parametrize("policy", ["none", "g-tpp", "h-tpp", "hyperplace"])
def test_virtual_time_is_the_sum_of_what_it_was_spent_on(policy: str, costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs, policy, vcpus=1))
    fleet.run()
    report = fleet.host.reports[0]
    assert fleet.guests[0].ended_ps == fleet.guests[0].run_started_ps + round(report["virtual_s"] * PS_PER_S)
    assert report["access"]["fast"] + report["access"]["slow"] == report["access"]["total"]
    assert report["access"]["total"] == report["transactions"]
    assert 0 <= report["kvm"]["guest_mode_ratio"] <= 1
    assert 0 <= report["agent_cpu"]["stolen_s"] <= report["virtual_s"]
