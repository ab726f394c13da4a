"""Hint faults in compiled code against the stages that they stand for: the same machine, accounts, log after a run."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet
from guestd.guest import Guest
from guestd.hint_faults import new_hints
from guestd.tiering.registry import policies
from proto.config import GuestConfig
from proto.costs import Costs
from tests.small_fleet import check_memory, new_fleet, small_guest, with_thp, without_measured

SCAN: dict[str, Any] = {"scan_delay_ms": 0, "scan_period_min_ms": 2, "scan_size_mb": 4, "adapt_scan_period": True}


def run(config: GuestConfig, compiled: bool) -> tuple[Guest, dict[str, Any]]:
    fleet: InProcessFleet = new_fleet(config)
    guest = fleet.guests[0]
    assert guest.tiering.hint_rule is not None
    if not compiled:
        guest._hints = new_hints(None, config.costs, guest.view.hint_fault_ps, guest.meter)
    while fleet.step():
        pass
    check_memory(fleet)
    return guest, fleet.host.reports[0]


def outcome(guest: Guest) -> dict[str, Any]:
    machine, nodes = guest.machine, guest.nodes
    return {
        "gpt": machine.gpt, "ept": machine.ept, "stamps": machine.stamps, "counters": machine.counters,
        "clocks": machine.vcpus.field, "ledger": machine.vcpus.ledger, "latency": machine.vcpus.histogram,
        "page": nodes.page, "flags": nodes.flags, "next": nodes.next, "free": nodes.free_count,
        "modelled": guest.meter.modelled_ps,
    }  # fmt: skip


@pytest.mark.parametrize("thp", ["never", "always"])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_compiled_hint_faults_do_what_the_stages_do(
    costs: Costs, thp: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    params = SCAN | {"active_filter": data.draw(st.booleans()), "scan_period_min_ms": data.draw(st.integers(1, 8))}
    vcpus, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    config = with_thp(small_guest(costs, "g-tpp", params=params, pages=4096, vcpus=vcpus, seed=seed, run_ms=40), thp)
    logs = tmp_path_factory.mktemp("logs")
    found, activations = [], []
    for compiled in (True, False):
        log = logs / str(compiled)
        guest, report = run(msgspec.structs.replace(config, events_path=str(log)), compiled)
        report = without_measured(report)
        activations.append(report["agent_cpu"].pop("activations"))
        found.append((outcome(guest), report, Path(log).read_bytes()))
    (arrays, report, log_bytes), (expected, expected_report, expected_log) = found
    assert activations[0] < activations[1]
    for name, array in expected.items():
        assert np.array_equal(arrays[name], array), name
    assert report == expected_report
    assert log_bytes == expected_log
    assert report["vmstat"]["numa_hint_faults"] > 100
    assert report["migration"]["promoted_pages"] > 10


def test_their_cpu_is_the_agents(costs: Costs) -> None:
    guest, report = run(small_guest(costs, "g-tpp", params=SCAN, run_ms=40), True)
    cpu = report["agent_cpu"]["measured_s"]
    assert cpu["track"] > 0 and cpu["classify"] > 0 and cpu["migrate"] > 0
    assert guest.agent_cpu_ns() >= int(guest._hints.cpu_ns[0]) > 0
    assert cpu["total"] == pytest.approx(cpu["track"] + cpu["classify"] + cpu["migrate"] + cpu["other"])
    assert cpu["other"] > 0


def test_only_tpps_own_stages_in_a_guest_have_a_rule(costs: Costs) -> None:
    def has_rule(policy: str) -> bool:
        return new_fleet(small_guest(costs, policy)).guests[0].tiering.hint_rule is not None

    assert {name for name in policies() if has_rule(name)} == {"g-tpp"}
