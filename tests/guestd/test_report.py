"""A guest's report: percentiles against numpy, derived figures against the counters they come from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.hotness import in_fast
from guestd.report import percentiles_ns, progress
from guestd.vcpu import LATENCY_BIN_SHIFT, LATENCY_BINS
from proto.costs import Costs
from proto.counters import split
from tests.guestd.machines import guest_config, run_guest
from tests.small_fleet import new_fleet, small_guest, until_populated


@given(latencies=st.lists(st.integers(0, LATENCY_BINS - 1), min_size=1, max_size=300))
def test_percentiles_are_upper_edges_of_the_bins_of_the_sorted_latencies(latencies: list[int]) -> None:
    histogram = np.bincount(latencies, minlength=LATENCY_BINS)
    exact = np.percentile(latencies, (50, 90, 99), method="inverted_cdf")
    expected = [float((int(bin_) + 1) << LATENCY_BIN_SHIFT) / 1000 for bin_ in exact]
    assert list(percentiles_ns(histogram).values()) == expected


def test_no_access_has_no_percentiles() -> None:
    assert percentiles_ns(np.zeros(LATENCY_BINS, np.int64)) == {}


def test_progress_is_a_share_even_where_the_run_began_past_the_barrier(costs: Costs) -> None:
    """The last vCPU to populate may be ahead of the barrier, by what its last faults cost; the host refuses less."""
    fleet = new_fleet(small_guest(costs, run_ms=30))
    guest = until_populated(fleet)
    guest.run_started_ps = guest.now + 1
    assert progress(guest) == 0
    found = [progress(guest)]
    while fleet.step():
        found.append(progress(guest))
    assert found == sorted(found) and found[-1] == 1


def test_ratios_follow_from_the_counts_beside_them(costs: Costs) -> None:
    params = {"scan_delay_ms": 0, "scan_period_min_ms": 5, "scan_size_mb": 4}
    guest, report = run_guest(guest_config(costs, "g-tpp", dict(params), vcpus=2))
    assert guest.populated is not None
    spent = split(guest.machine.counters - guest.populated.counters)
    access, vmstat = report["access"], report["vmstat"]
    assert vmstat == spent["vmstat"]
    assert access["fast_ratio"] == access["fast"] / access["total"]
    assert access["tlb_miss_ratio"] == access["tlb_misses"] / access["total"]
    assert access["walk_ns_mean"] == pytest.approx(spent["access"]["walk_ps"] / 1000 / access["walks"])
    assert report["throughput_mops"] == pytest.approx(access["total"] / report["virtual_s"] / 1e6)
    assert report["flushes"]["total"] == (
        vmstat["nr_tlb_local_flush_one"] + vmstat["nr_tlb_local_flush_all"] + vmstat["nr_tlb_remote_flush"]
    )
    assert report["migration"]["promoted_pages"] == vmstat["pgpromote_success"]
    cpu = report["agent_cpu"]
    assert cpu["modelled_s"]["total"] == pytest.approx(
        sum(cpu["modelled_s"][s] for s in ("track", "classify", "migrate"))
    )
    assert cpu["measured_s"]["total"] == pytest.approx(
        sum(cpu["measured_s"][s] for s in ("track", "classify", "migrate", "other"))
    )
    for kind in ("measured", "modelled"):
        stages = {stage: cpu[f"{kind}_s"][stage] for stage in ("track", "classify", "migrate")}
        assert cpu[f"{kind}_cores"] == pytest.approx(sum(stages.values()) / report["virtual_s"])
    # With what there was before the run it is what the meter has.
    before = report["populate"]["agent_cpu"]["modelled_s"]
    for stage, spent_s in guest.meter.modelled_s().items():
        assert before[stage] + cpu["modelled_s"][stage] == pytest.approx(spent_s)
    assert before["total"] > 0
    assert 0 < report["kvm"]["guest_mode_ratio"] <= 1


@pytest.mark.parametrize("policy", ["none", "h-tpp"])
def test_pages_in_fast_are_found_through_both_tables(policy: str, costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs, policy))
    machine = guest.machine
    fast = np.zeros(machine.gpt.size, np.uint8)
    in_fast(machine.gpt, machine.ept, 4096, fast)
    for page in range(0, machine.gpt.size, 7):
        entry = int(machine.gpt[page])
        slot = int(machine.ept[entry >> 12 & ((1 << 28) - 1)]) >> 12 & ((1 << 28) - 1)
        assert bool(fast[page]) == (entry != 0 and slot < 4096)
    assert 0 < fast.sum() <= 1024
    assert report["hotness"]["oracle_fast_ratio"] > 0.9
