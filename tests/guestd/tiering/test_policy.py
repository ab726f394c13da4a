"""The conformance suite: what every registered policy owes, whoever wrote it.

A third party's policy is checked by the same tests once its package is installed.
"""

from fractions import Fraction

import msgspec
import numpy as np
import pytest

from fleet.errors import SpecError
from fleet.in_process import InProcessFleet
from fleet.spec import load
from guestd.guest import Guest
from guestd.params import resolve
from guestd.tiering.policy import Policy, Tiering
from guestd.tiering.registry import policies
from proto.arrays import Words
from proto.costs import Costs
from proto.counters import C
from proto.messages import Bye, Stop
from proto.units import PS_PER_MS
from tests.small_fleet import check_memory, new_fleet, run_fleet, small_guest, until_populated, without_measured

NAMES = sorted(policies())


@pytest.fixture(params=NAMES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return policies()[request.param]


def _moved(fleet: InProcessFleet) -> int:
    """Bytes migrated so far, by guest and host."""
    guest, vm = fleet.guests[0], fleet.host.vms[0]
    return int(guest.machine.counters[C.bytes__migrated] + vm.counters[C.bytes__migrated])


def _accesses(guest: Guest) -> Words:
    """Accesses so far, fast and slow (int64[2])."""
    return guest.machine.counters[[C.access__fast, C.access__slow]].copy()


def test_no_content_is_lost_and_memory_is_conserved_at_every_barrier(policy: Policy, costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs, policy.name))
    barriers = 0
    while fleet.step():
        check_memory(fleet)
        barriers += 1
    assert barriers > 5
    assert fleet.host.failures == []
    report = fleet.host.reports[0]
    assert report["outcome"] == "ok"
    assert report["integrity"]["mismatches"] == 0
    heat = fleet.guests[0].workload.heat()
    assert heat is not None
    assert report["integrity"]["pages_checked"] == np.count_nonzero(heat)
    # Every access is checked, those of populating too: one store per page.
    assert report["integrity"]["accesses_checked"] == report["transactions"] + report["integrity"]["pages_checked"]


def test_the_same_spec_gives_the_same_report(policy: Policy, costs: Costs) -> None:
    guests = [small_guest(costs, policy.name, vm=vm, seed=5 + vm, run_ms=30) for vm in range(2)]
    first, second = run_fleet(*guests), run_fleet(*guests)
    for vm in (0, 1):
        assert without_measured(first[vm]) == without_measured(second[vm])
    assert first[0]["transactions"] != first[1]["transactions"] or first[0]["access"] != first[1]["access"]


def test_a_run_that_is_stopped_in_the_middle_reports_what_it_has(policy: Policy, costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs, policy.name, run_ms=10_000))
    for _ in range(8):
        assert fleet.step()
    ((vm, message),) = fleet.host.stop("enough")
    assert isinstance(message, Stop)
    assert fleet.host.receive(vm, Bye(report=msgspec.json.encode(fleet.guests[vm].report()))) == []
    assert fleet.host.done
    report = fleet.host.reports[vm]
    assert report["outcome"] == "stopped"
    assert 0 < report["virtual_s"] < 10
    assert report["integrity"]["mismatches"] == 0
    check_memory(fleet)


def test_cpu_is_booked_to_stages_if_and_only_if_the_policy_manages(policy: Policy, costs: Costs) -> None:
    report = run_fleet(small_guest(costs, policy.name))[0]
    cpu = report["agent_cpu"]
    assert cpu["where"] == ("host" if policy.view == "host" else "guest")
    for kind in ("measured_s", "modelled_s"):
        stages = cpu[kind]["track"] + cpu[kind]["classify"] + cpu[kind]["migrate"]
        assert (stages > 0) == (policy.view != "-")
        assert stages <= cpu[kind]["total"]
        assert (cpu[kind]["migrate"] > 0) <= policy.moves_alone
    moved = report["migration"]["promoted_pages"] + report["migration"]["demoted_pages"]
    assert (moved > 0) == (policy.view != "-" and policy.moves_alone)
    assert (report["migration"]["bytes"] > 0) == (moved > 0)


def test_an_idle_vm_is_left_alone_once_its_watermarks_are_met(policy: Policy, costs: Costs) -> None:
    config = msgspec.structs.replace(small_guest(costs, policy.name, run_ms=200), workload="idle")
    fleet = new_fleet(config)
    until_populated(fleet)
    moved = []
    while fleet.step():
        moved.append(_moved(fleet))
    settled = len(moved) // 2
    assert moved[settled] == moved[-1]
    assert fleet.host.reports[0]["integrity"]["mismatches"] == 0


def test_a_static_hot_set_is_placed_better_than_at_random(policy: Policy, costs: Costs) -> None:
    """Over the end of the run; at random, the fast share of accesses would be that of memory."""
    if policy.name == "none" or policy.fast_share is not None or policy.no_gain:
        assert not policy.no_gain or len(policy.no_gain.split()) > 3
        return
    fleet = new_fleet(small_guest(costs, policy.name, pages=4096, vcpus=1, run_ms=600))
    guest = until_populated(fleet)
    began = guest.now
    assert policy.gains_ps(resolve(policy.params, policy.warm_up), 4096) <= 450 * PS_PER_MS
    while guest.now < began + 450 * PS_PER_MS:
        assert fleet.step()
    before = _accesses(guest)
    while fleet.step():
        pass
    fast, slow = _accesses(guest) - before
    assert fast / (fast + slow) > guest.config.fast_pages / guest.config.total_pages


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_the_loss_of_a_vm_at_any_point_costs_no_other(policy: Policy, at: float, costs: Costs) -> None:
    guests = [small_guest(costs, policy.name, vm=vm, seed=5 + vm, run_ms=30) for vm in range(2)]
    fleet = new_fleet(*guests)
    steps = 0
    while new_steps := fleet.step():
        steps += new_steps
    fleet = new_fleet(*guests)
    for _ in range(int(at * steps)):
        assert fleet.step()
    fleet.kill(1)
    host = fleet.run()
    assert [failure["kind"] for failure in host.failures] == ["killed"]
    assert host.reports[0]["outcome"] == "ok"
    assert host.reports[0]["integrity"]["mismatches"] == 0


def test_too_little_memory_and_too_short_a_run_are_refused(policy: Policy) -> None:
    least = policy.min_memory_bytes
    assert least % (2 << 20) == 0
    if least > 16 << 20:
        with pytest.raises(SpecError, match="is too small"):
            load(None, {"policy": policy.name, "memory": f"{(least >> 20) - 2}MiB"})
    needed = policy.min_run_ps(resolve(policy.params, {}))
    memory = f"{max(least, 64 << 20) >> 20}MiB"
    ratio = str(max(Fraction(1, 5), policy.min_fast_ratio))
    given = {"policy": policy.name, "memory": memory, "fast_ratio": ratio}
    load(None, given | {"seconds": f"{max(1, -(-needed // PS_PER_MS))}ms"})
    if needed > PS_PER_MS:
        with pytest.raises(SpecError, match="is too short"):
            load(None, given | {"seconds": f"{needed // PS_PER_MS - 1}ms"})


def test_only_what_the_host_does_asks_for_remote_flushes(policy: Policy, costs: Costs) -> None:
    by_host = policy.view == "host" or policy.stages["tracker"] == "host-scan-list"
    report = run_fleet(small_guest(costs, policy.name))[0]
    requests, executions = report["kvm"]["remote_tlb_flush_requests"], report["kvm"]["tlb_flush"]
    asks = by_host and policy.moves_alone
    assert (report["flushes"]["remote_requests"] > 0) == asks
    assert (requests > 0) == asks
    assert report["kvm"]["remote_tlb_flush"] <= requests
    # Requests coalesce: a vCPU executes one flush for all that come before its next entry.
    assert executions <= requests * report["vcpus"]
    assert report["instructions"]["invept_global"] == executions


def test_its_declaration_is_complete(policy: Policy) -> None:
    assert policy.summary
    assert policy.source
    assert set(policy.stages) == {"tracker", "classifier", "migrator"}
    names = [param.name for param in policy.params]
    assert len(names) == len(set(names))
    published = resolve(policy.params, {})
    assert 0 <= policy.gains_ps(published, 1 << 12) <= policy.gains_ps(published, 1 << 24)
    assert set(policy.warm_up) <= set(names)
    for param in policy.params:
        assert param.help
        assert param.source
        for value in (param.default, policy.warm_up.get(param.name, param.default)):
            assert type(value) is type(param.default)
            assert not param.choices or value in param.choices
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert (param.minimum is None or value >= param.minimum) and (
                    param.maximum is None or value <= param.maximum
                )


def test_a_policy_without_hooks_does_nothing_but_end_hint_faults(costs: Costs) -> None:
    fleet = new_fleet(small_guest(costs))
    fleet.run()
    view = fleet.guests[0].view
    tiering = Tiering(view, resolve((), {}))
    first = int(view.on_node(0, view.pages, 1, 1)[0])
    assert view.protect(first, 4) == 4
    pages = view.on_node(first, 4, 1, 4)
    assert tiering.on_hint_faults(pages).tolist() == [costs.hint_fault_ps] * 4
    assert view.protect(first, 4) == 4, "the fault had taken PROT_NONE off again"
