"""A whole guest: nothing is lost, the run is a function of its seed, and engine settings move no figure."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fleet.in_process import InProcessFleet
from guestd.errors import GuestError
from guestd.tiering.registry import policies
from proto.config import EngineConfig, GuestConfig, HostConfig, HostKernel, Scalar
from proto.costs import Costs
from proto.entry import FRAME_MASK, FRAME_SHIFT
from proto.trace import Trace, TraceMeta, write_trace
from proto.units import PS_PER_MS
from tests.guestd.machines import guest_config, run_guest

# -- the invariance law ---------------------------------------------------------------------------------------------

SCANNER: dict[str, Scalar] = {
    "scan_size_mb": 4,
    "scan_period_min_ms": 300,
    "scan_period_max_ms": 300,
    "scan_delay_ms": 20,
}
LAW: dict[str, tuple[dict[str, Scalar], int]] = {
    "none": ({}, 500),
    "g-tpp": (SCANNER, 3000),
    "h-tpp": (SCANNER, 1500),
    "hyperplace": ({"epoch_ms": 20, "load_period": 29, "initial": "ram", "tau_split": 5}, 1500),
}
"""Policy parameters scaled to 64 MiB, and virtual ms to run."""
HOST_TICK_MS = 4
"""Host threads see accessed bits as they are at a barrier, so with a host-side design a quantum is at most a tick."""
MEASURED = (
    "agent_cpu.measured",
    "agent_cpu.floor_s",
    "agent_cpu.guest_thread_s",
    "process_cpu.",
    "pebs.cpu_ns_per_sample.measured",
)
"""Of this machine, not of the model."""
BOOKKEEPING = ("agent_cpu.activations", "populate.vmstat.numa", "populate.agent_cpu")
"""How often the emulator handed work over (hint faults go a batch at a time), and whether a host-side scan fell to
populating or to the run, which the host parts at the barrier after the switch."""


def law_config(policy: str, engine: EngineConfig, costs: Costs) -> GuestConfig:
    """64 MiB, 2 vCPUs. Hot pages are scattered: where a hot set at the end is first placed hangs on one tick of kswapd.

    Long think times make virtual time cheap; 98 % of updates are hot, so that few cold pages look hot to a scanner.
    """
    params, run_ms = LAW[policy]
    workload: dict[str, Scalar] = {"layout": "scattered", "think_ns": 2000.0, "hot_updates": 0.98}
    return guest_config(costs, policy, params, "gups", workload, total_pages=16384, fast_pages=4096, vcpus=2,
                        run_ps=run_ms * PS_PER_MS, engine=engine)  # fmt: skip


def figures(report: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a report that the model answers for, by dotted name."""
    found: dict[str, float] = {}
    for key, value in report.items():
        name = prefix + key
        if isinstance(value, dict):
            found |= figures(value, name + ".")
        elif isinstance(value, int | float) and not name.startswith(MEASURED + BOOKKEEPING):
            found[name] = value
    return found


def moved(base: dict[str, float], halved: dict[str, float], wait_ps: float = 3e6) -> dict[str, tuple[float, float]]:
    """Figures that differ by more than the law allows.

    2 %; for a percentile one bin of its histogram (4.096 ns); for a count also 5 sigma of the difference of two Poisson
    counts, since which of a few rare events falls into a run is chance. Times made of rare events (of about 3 us)
    are sums of them; ``wait_ps``: how long a wait for mmu_lock may be.
    """
    wrong = {}
    for name in sorted(base.keys() | halved.keys()):
        a, b = base.get(name, 0), halved.get(name, 0)
        allowed = 0.02 * max(abs(a), abs(b))
        if name.startswith("access.latency_ns."):
            allowed += 4.1
        elif name.endswith("kvm.mmu_lock_wait_ps"):
            allowed += 5 * (a * wait_ps + b * wait_ps) ** 0.5
        elif isinstance(a, int):
            allowed += 5 * (a + b) ** 0.5
        elif name.startswith("time.") and name not in ("time.think_s", "time.stall_s"):
            allowed += 5 * (a * 3e-6 + b * 3e-6) ** 0.5
        if abs(a - b) > allowed:
            wrong[name] = (a, b)
    return wrong


@pytest.mark.parametrize("policy", LAW)
def test_halving_quantum_slice_or_block_moves_no_figure(policy: str, costs: Costs) -> None:
    quantum_ms = HOST_TICK_MS if policy == "h-tpp" else 10
    engine = EngineConfig(quantum_ps=quantum_ms * PS_PER_MS, slice_ps=PS_PER_MS, block=2048)
    base = figures(run_guest(law_config(policy, engine, costs))[1])
    assert base["integrity.mismatches"] == 0
    assert policy == "none" or base["migration.promoted_pages"] > 500
    wrong = {}
    for name in ("quantum_ps", "slice_ps", "block"):
        halved = msgspec.structs.replace(engine, **{name: getattr(engine, name) // 2})
        wrong[name] = moved(base, figures(run_guest(law_config(policy, halved, costs))[1]))
    assert wrong == {name: {} for name in wrong}


def test_the_law_holds_with_the_host_s_threads_at_work(costs: Costs) -> None:
    """Swap and harvests pace themselves, so that no quantum does."""
    host = HostKernel(pml=True, pml_harvest_ps=50 * PS_PER_MS, swap_pages_per_s=100_000)
    engine = EngineConfig(quantum_ps=HOST_TICK_MS * PS_PER_MS, slice_ps=PS_PER_MS, block=2048)

    def run(engine: EngineConfig) -> dict[str, float]:
        return figures(run_guest(msgspec.structs.replace(law_config("none", engine, costs), host=host))[1])

    base = run(engine)
    assert base["swap.out_pages"] > 1000 < base["swap.in_pages"]
    assert base["pml.harvested_pages"] > 1000
    assert base["integrity.mismatches"] == 0
    # A harvest holds mmu_lock while it clears its pages' D bits.
    held_ps = base["pml.harvested_pages"] * costs.scan_pte_ps / (base["virtual_s"] / 0.05)
    for name in ("quantum_ps", "slice_ps", "block"):
        halved = run(msgspec.structs.replace(engine, **{name: getattr(engine, name) // 2}))
        assert moved(base, halved, held_ps) == {}, name


def test_a_fault_is_told_no_time_past_an_operation_that_waits(costs: Costs) -> None:
    """Else the host would give away frames that a move which waits for mmu_lock has yet to leave."""
    host = HostKernel(tdp_mmu=False, swap_pages_per_s=200_000, pml=True, pml_harvest_ps=3 * PS_PER_MS)
    engine = EngineConfig(quantum_ps=HOST_TICK_MS * PS_PER_MS, slice_ps=PS_PER_MS, block=2048)
    config = guest_config(costs, "h-tpp", dict(policies()["h-tpp"].warm_up), vcpus=3, host=host, engine=engine,
                          run_ps=100 * PS_PER_MS)  # fmt: skip
    _, report = run_guest(config)
    assert report["migration"]["demoted_pages"] > 100 < report["swap"]["in_pages"]
    assert report["integrity"]["mismatches"] == 0


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "oracle", "g-tpp", "h-tpp", "hyperplace"])
def test_a_run_is_a_function_of_its_seed(policy: str, costs: Costs) -> None:
    config = guest_config(costs, policy, LAW.get(policy, ({}, 0))[0], vcpus=2, run_ps=60 * PS_PER_MS)
    first, second = (figures(run_guest(config)[1]) for _ in range(2))
    assert first == second
    other = figures(run_guest(msgspec.structs.replace(config, seed=12))[1])
    assert other["access.total"] != first["access.total"]
    assert first["integrity.mismatches"] == other["integrity.mismatches"] == 0


def test_transactions_end_the_run_at_the_access(costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs, vcpus=3, run_ps=0, transactions=12_345))
    assert report["transactions"] == report["access"]["total"] == 12_345
    assert guest.finished and guest.ended_ps > guest.run_started_ps > 0


def test_time_ends_the_run_at_the_time(costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs, start_ps=3 * PS_PER_MS, run_ps=7 * PS_PER_MS))
    assert guest.ended_ps == guest.run_started_ps + 7 * PS_PER_MS
    assert report["virtual_s"] == 0.007
    assert report["populate_virtual_s"] == pytest.approx((guest.run_started_ps - 3 * PS_PER_MS) / 1e12)
    assert guest.run_started_ps > 3 * PS_PER_MS


def test_populating_is_in_no_figure_of_the_run(costs: Costs) -> None:
    _, report = run_guest(guest_config(costs))
    touched = 4096 * 7 // 8
    assert report["populate"]["vmstat"]["pgfault"] == touched
    assert report["vmstat"]["pgfault"] == 0
    # Page-table pages fault, too: one for each 2 MiB, the one that the array's ends share with nothing, those above.
    assert touched < report["populate"]["kvm"]["exits"]["ept_violation"] <= touched + touched // 512 + 2 + 4


def test_first_touch_takes_fast_frames_down_to_the_low_watermark(costs: Costs) -> None:
    guest, _ = run_guest(guest_config(costs))
    assert guest.nodes.free_count[0] == guest.nodes.watermark[0, 1]
    gpt = guest.machine.gpt
    pages = np.flatnonzero(gpt)
    on_slow = (gpt[pages] & FRAME_MASK) >> FRAME_SHIFT >= guest.config.total_pages
    assert not on_slow[: np.count_nonzero(~on_slow)].any(), "in the order of the array"


def test_a_footprint_beyond_memory_is_an_error_that_says_so(tmp_path: Path, costs: Costs) -> None:
    pages = np.arange(5000, dtype=np.uint64)
    ones = np.ones(5000, np.uint8)
    trace = Trace(pages << np.uint64(12), ones, ones.astype(np.uint16), ones.astype(np.uint32), TraceMeta(source="big"))
    write_trace(tmp_path / "big.trace", trace)
    config = guest_config(costs, workload="trace", workload_params={"file": str(tmp_path / "big.trace")})
    with pytest.raises(GuestError, match=r"out of memory: \d+ pages of gVA on 4096 pages of memory; give the VM more"):
        run_guest(config)


def test_guests_do_not_disturb_each_other_s_pages(costs: Costs) -> None:
    """Three policies on one host: contention moves their clocks, nothing else."""
    configs = [
        msgspec.structs.replace(guest_config(costs, policy, LAW.get(policy, ({}, 0))[0], run_ps=40 * PS_PER_MS), vm=vm)
        for vm, policy in enumerate(("g-tpp", "h-tpp", "hyperplace"))
    ]
    host = HostConfig(costs=costs, engine=configs[0].engine, sample_ps=configs[0].sample_ps)
    fleet = InProcessFleet(host, configs)
    reports = fleet.run().reports
    assert [reports[vm]["integrity"]["mismatches"] for vm in range(3)] == [0, 0, 0]
    assert all(reports[vm]["integrity"]["pages_checked"] == 4096 * 7 // 8 for vm in range(3))
