"""Truth along a run: whose hot set it is, and that bounds are bounds."""

import msgspec
import numpy as np
import pytest

from guestd.tiering.registry import policies
from proto.config import HostKernel
from proto.costs import Costs
from proto.counters import C
from tests.small_fleet import new_fleet, run_fleet, small_guest, with_thp


@pytest.mark.parametrize("policy", ["none", "oracle", "g-tpp", "h-tpp", "hyperplace"])
def test_every_policy_is_judged(policy: str, costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs, policy, run_ms=100, workload={"layout": "scattered"}))
    guest = fleet.guests[0]
    report = fleet.run().reports[0]
    found = report["hotness"]
    for name in ("precision", "recall", "f1", "oracle_fast_ratio"):
        assert 0 <= found[name] <= 1
    notion = policies()[policy].view != "-"
    assert found["hot_set"] == ("policy" if notion else "fast node")
    counters = guest.machine.counters
    assert counters[C.truth__believed] > 0
    assert counters[C.truth__accesses] == report["access"]["total"]
    # Of GUPS the law is known: an interval's accesses scatter around it.
    assert found["share_of_oracle"] <= 1.01
    assert counters[C.truth__right] <= counters[C.truth__believed]
    assert counters[C.truth__found] <= counters[C.truth__asked]


def test_the_hosts_hot_set_is_that_of_its_active_lists(costs: Costs) -> None:
    """What the guest found through the bitmap is what the host has, page by page, through the guest's table."""
    fleet = new_fleet(small_guest(costs, "h-tpp", run_ms=60))
    guest, vm = fleet.guests[0], fleet.host.vms[0]
    compared = 0
    while not guest.finished:
        hot = set(vm.tiering.hot_set().tolist()) if vm.memory.believed[0] else set()  # type: ignore[union-attr]
        bits = np.unpackbits(vm.memory.believed[1:].view(np.uint8), bitorder="little")
        compared += bool(hot) and set(np.flatnonzero(bits)) == hot
        if not fleet.step():
            break
    assert compared > 0


def test_all_fast_is_its_own_oracle(costs: Costs) -> None:
    found = run_fleet(small_guest(costs, "all-fast", run_ms=20, fast=8192))[0]["hotness"]
    assert found["share_of_oracle"] == found["oracle_fast_ratio"] == found["recall"] == 1


def test_without_fast_memory_there_is_nothing_to_judge(costs: Costs) -> None:
    assert "hotness" not in run_fleet(small_guest(costs, "all-slow", run_ms=20, fast=0))[0]


@pytest.mark.parametrize(("policy", "guest", "host"), [("g-tpp", "always", "never"), ("h-tpp", "never", "always")])
def test_huge_pages_are_hot_as_wholes(policy: str, guest: str, host: str, costs: Costs) -> None:
    config = with_thp(small_guest(costs, policy, run_ms=60, host=HostKernel()), guest, host)
    fleet = new_fleet(config)
    vm = fleet.guests[0]
    fleet.run()
    assert vm.machine.counters[C.truth__believed] > 512


def test_pebs_says_what_a_sample_costs(costs: Costs) -> None:
    report = run_fleet(small_guest(costs, "hyperplace"))[0]
    cost = report["pebs"]["cpu_ns_per_sample"]
    assert cost["measured"] > 0
    # A PMI, if one came, is part of it.
    assert costs.drain_record_ps / 1000 <= cost["modelled"] < costs.drain_record_ps / 1000 * 1.05
    dearer = msgspec.structs.replace(costs, drain_record_ps=4 * costs.drain_record_ps)
    again = run_fleet(small_guest(dearer, "hyperplace"))[0]["pebs"]["cpu_ns_per_sample"]
    assert again["modelled"] == pytest.approx(4 * cost["modelled"], rel=0.05)
